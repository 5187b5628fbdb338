"""Which layout of packs a model takes: found by comparing its scores with the model's own forward at the start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from open_po.config import Sharing
from open_po.data import PreferencePair
from open_po.errors import UserError, first_line, is_out_of_memory
from open_po.model.attention import count_calls
from open_po.model.last_layer import decoder_layer
from open_po.model.rope import rope_limit
from open_po.model.scorer import Scorer
from open_po.packing import Group, Layout, group_pairs, pack_responses

# Mean difference, in nats a token, from the model's own forward. In bfloat16 logits above 16 are rounded by 0.06 nats
# and more; a token that sees a wrong context is off by several times that.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_LARGEST = 10  # times the tolerance: no token may be off by more, or a leak into few of them would hide in the mean
_WANTED: dict[Sharing, tuple[Layout, ...]] = {
    "auto": get_args(Layout),
    "on": ("shared",),
    "off": ("unshared", "rows"),
}
_HEAD_TOKENS = 32  # of the prompt and of the response whose logits the head is compared with


@dataclass(frozen=True)
class LayoutChoice:
    """A layout, and why those that share more were not taken."""

    layout: Layout
    difference: float  # from the model's own forward, nats per token
    responses: int  # compared
    refused: dict[Layout, str]
    whole_last_layer: str | None = None  # why the last layer computes all tokens, where it need not

    def describe(self) -> str:
        """A line for the console."""
        what: dict[Layout, str] = {
            "shared": "each prompt is computed once",
            "unshared": "prompts are repeated, nothing is padded",
            "rows": "prompts are repeated and rows padded",
        }
        by_reason: dict[str, list[str]] = {}
        for layout, reason in self.refused.items():
            by_reason.setdefault(reason, []).append(layout)
        why = "".join(f"; not {' or '.join(layouts)}: {reason}" for reason, layouts in by_reason.items())
        if self.whole_last_layer is not None:
            why += f"; the last layer computes every token: {self.whole_last_layer}"
        close = f"within {self.difference:.0e} nats a token of" if self.difference else "exactly"
        return (
            f"Layout {self.layout}: {what[self.layout]} ({close} the model's own forward on {self.responses} "
            f"responses{why})"
        )


@torch.no_grad()
def choose_layout(
    scorer: Scorer, pairs: Sequence[PreferencePair], sharing: Sharing, *, longest: int, pad: int
) -> LayoutChoice:
    """Set the scorer to the first layout in which it scores `pairs` as the model does, one response at a time.

    `pairs` should hold the longest of the data, so that windows and long positions matter as they will; `longest` is
    the length of the data's longest row in tokens. `sharing`: "on" takes `shared` or nothing, "off" does without it.
    Raises UserError if the model cannot be scored rightly, or not with shared prompts if they are asked for.
    """
    with scorer.as_reference():
        _check_head(scorer, pairs[0])
        limit = rope_limit(scorer.base.config)
        scorer.row_by_row = limit is not None and longest > limit
        if scorer.row_by_row and scorer.lockstep:
            raise UserError(
                f"{scorer.base.config.model_type}: rows beyond {limit} tokens are computed one by one, of which ranks "
                "that divide a model have different numbers; use parallel ddp or zero2, or lower max_seq_length"
            )
        refused: dict[Layout, str] = {}
        wanted = [layout for layout in _WANTED[sharing] if layout == "rows" or not scorer.row_by_row]
        if scorer.row_by_row and "shared" in _WANTED[sharing]:
            refused["shared"] = f"rotations depend on the length of rows beyond {limit} tokens"
        groups, expected = _finite(scorer, group_pairs(pairs)[0])
        for layout in wanted:
            scorer.shorten_last_layer(None)
            found = _try(scorer, layout, groups, expected, pad)
            if found.wrong is not None:
                refused[layout] = found.wrong
                continue
            whole_last_layer = None
            if layout != "rows":
                found, whole_last_layer = _shorten(scorer, found, groups, expected, pad)
            return LayoutChoice(layout, found.difference, len(expected), refused, whole_last_layer)
    model = scorer.base.config.model_type
    reasons = "; ".join(f"{layout}: {reason}" for layout, reason in refused.items())
    if sharing == "on":
        raise UserError(f"prompt_sharing: on is not possible with {model} ({reasons}); use auto")
    raise UserError(f"{model}: this architecture is not supported, its scores differ from its own forward ({reasons})")


def _check_head(scorer: Scorer, pair: PreferencePair) -> None:
    """Compare the fused log-probs of one short row with the model's own logits.

    Raises UserError if they differ: the model then does something to its logits that `Scorer.head` does not know.
    """
    group = Group(pair.prompt_ids[-_HEAD_TOKENS:], [pair.chosen_ids[:_HEAD_TOKENS]])
    got = _one_by_one(scorer, [group])[0]
    expected = scorer.own_logprobs(pack_responses([group], layout="rows", pad_token_id=0))
    if not expected.isfinite().all():
        raise _not_finite(scorer)
    # A few tokens' slack: one bfloat16 step of a logit above 32 is 0.25 nats.
    allowed = _TOLERANCE[scorer.numerics.compute_dtype] * (len(expected) + 4)
    if not (got - expected).sum().abs() <= allowed:
        raise UserError(
            f"{scorer.base.config.model_type}: fused log-probs differ from the model's own ({got.sum().item():.4f} "
            f"against {expected.sum().item():.4f} nats); this architecture is not supported"
        )


def _one_by_one(scorer: Scorer, groups: Sequence[Group]) -> list[Tensor]:
    """Token log-probs of each response by the model's own forward of that response alone."""
    scorer.use_layout("rows")
    alone = [response for group in groups for response in group.alone()]
    return [scorer.token_logprobs(pack_responses([group], layout="rows", pad_token_id=0)) for group in alone]


def _not_finite(scorer: Scorer) -> UserError:
    return UserError(
        f"{scorer.base.name_or_path}: the model's own log-probs are not finite; its weights are damaged, or too large "
        f"for {scorer.numerics.key()['compute_dtype']}"
    )


def _finite(scorer: Scorer, groups: Sequence[Group]) -> tuple[list[Group], list[Tensor]]:
    """The groups whose scores are finite, and these scores. The others' pairs are named when they are computed."""
    scored = [(group, _one_by_one(scorer, [group])) for group in groups]
    finite = [(group, scores) for group, scores in scored if torch.cat(scores).isfinite().all()]
    if not finite:
        raise _not_finite(scorer)
    return [group for group, _ in finite], [score for _, scores in finite for score in scores]


def _shorten(
    scorer: Scorer, whole: LayoutTrial, groups: Sequence[Group], expected: Sequence[Tensor], pad: int
) -> tuple[LayoutTrial, str | None]:
    """Compute the last layer for scored tokens only, if that changes no score; the trial that holds, and why not."""
    layer = decoder_layer(scorer.base, whole.calls[-1])
    if layer is None:
        return whole, "its module is not known"
    scorer.shorten_last_layer(layer)
    short = _try(scorer, scorer.layout, groups, expected, pad)
    wrong = short.wrong or _worse(short, whole, scorer)
    if wrong is None:
        return short, None
    scorer.shorten_last_layer(None)
    return whole, wrong


def _worse(short: LayoutTrial, whole: LayoutTrial, scorer: Scorer) -> str | None:
    """Whether a short last layer adds more than rounding to what a whole one is off by.

    The tolerance alone would in bfloat16 let through what one wrong layer of many does.
    """
    allowed = 2 * whole.difference + 0.1 * _TOLERANCE[scorer.numerics.compute_dtype]
    if short.difference <= allowed:
        return None
    return f"scores are off by {short.difference:.2g} nats a token, by {whole.difference:.2g} otherwise"


@dataclass(frozen=True)
class LayoutTrial:
    """What came of scoring packs in a layout."""

    wrong: str | None  # what is wrong with it, if anything
    difference: float = 0.0  # mean, from the model's own forward, in nats a token
    calls: Sequence[nn.Module] = ()  # the attention modules in the order of their calls


def _try(scorer: Scorer, layout: Layout, groups: Sequence[Group], expected: Sequence[Tensor], pad: int) -> LayoutTrial:
    """Compare the scores of `groups` in `layout` with those that are `expected`."""
    attends = layout != "rows"
    try:
        scorer.use_layout(layout)
        with count_calls() as calls:
            got = scorer.token_logprobs(pack_responses(groups, layout=layout, pad_token_id=pad))
    except Exception as error:  # whatever a model's code makes of arguments that it was not written for
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return LayoutTrial(first_line(error))
    layers = int(scorer.base.config.get_text_config(decoder=True).num_hidden_layers)
    times = Counter(calls)
    if attends and len(times) != layers:
        return LayoutTrial(f"{len(times)} of {layers} layers use transformers' attention interface")
    if attends and set(times.values()) != {1}:
        return LayoutTrial("a layer calls transformers' attention interface more than once")
    differences = (got - torch.cat(list(expected))).abs()
    difference, largest = float(differences.mean()), float(differences.max())
    tolerance = _TOLERANCE[scorer.numerics.compute_dtype]
    if not (difference <= tolerance and largest <= _LARGEST * tolerance):
        return LayoutTrial(f"scores are off by {difference:.2g} nats a token, {largest:.2g} at most")
    return LayoutTrial(None, difference, calls)
