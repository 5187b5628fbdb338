"""Models of every kind, and what transformers itself says of their log-probs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from open_po.data import PreferencePair
from open_po.losses import PairLogps
from open_po.model.layout_check import LayoutChoice, choose_layout
from open_po.model.load import load_scorer
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource
from open_po.packing import Layout, pack
from tests import tiny

CPU = torch.device("cpu")


FLOAT32 = Numerics(compute_dtype=torch.float32, weights_dtype=torch.float32, use_liger=False)


PAIRS = [
    PreferencePair([0, 5, 9, 30], [44, 3, 17, 1], [8, 1]),
    PreferencePair([0], [7], [9, 200, 14, 5, 66, 1]),
    PreferencePair([0, *range(100, 180)], [12, 13, 1], [300, 12, 1]),
]


def load(folder: Path, numerics: Numerics = FLOAT32) -> Scorer:
    return load_scorer(ModelSource(name=str(folder)), numerics, CPU)


def scores_one_by_one(model: PreTrainedModel, pairs: list[PreferencePair], dtype: torch.dtype) -> Tensor:
    """[P, 2] summed log-probs by the model's own forward, one unpadded response at a time."""
    scores = []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + response])
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                logits = model(input_ids=ids, use_cache=False).logits[0].float()
            logps = logits.log_softmax(-1)
            start = len(pair.prompt_ids)
            scores.append(sum(logps[start + i - 1, token] for i, token in enumerate(response)))
    return torch.stack(scores).view(-1, 2)


def as_matrix(logps: PairLogps) -> Tensor:
    return torch.stack([logps.chosen, logps.rejected], 1)


BFLOAT16 = replace(FLOAT32, compute_dtype=torch.bfloat16)


LAYOUTS: tuple[Layout, ...] = ("shared", "unshared", "rows")
# Several pairs of one prompt that share responses; a prompt and a response of one token; a pair that comes twice; a
# response that two prompts have.
PROMPT, SHORT, LONG = [0, 5, 9, 30], [8, 1], [9, 200, 14, 5, 66, 1]
FAMILY = [
    PreferencePair(PROMPT, [44, 3, 17, 1], SHORT),
    PreferencePair(PROMPT, LONG, SHORT),
    PreferencePair([3], [7], LONG),
    PreferencePair(PROMPT, [7], [44, 3, 17, 1]),
    PreferencePair(PROMPT, LONG, SHORT),
    PreferencePair(PROMPT, SHORT, [7]),
]


ALL = [*PAIRS, *FAMILY]
WEIGHTS = torch.randn(len(ALL), 2, generator=torch.Generator().manual_seed(0))
LONGEST = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in ALL)


class Truth(NamedTuple):
    """What `transformers` says of `ALL`: scores [P, 2], and gradients of their sum weighted by `WEIGHTS`."""

    scores: Tensor
    gradients: dict[str, Tensor]


def token_logps(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-prob of each token of one response, by the model's own forward."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]


def truth(folder: Path, *, fresh: bool = False) -> Truth:
    """`fresh`: by a model loaded anew for each response, for models that remember the longest row they have seen."""
    model = tiny.plain_model(folder)
    weights: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for pair, row in zip(ALL, WEIGHTS.tolist(), strict=True):
        for response, weight in zip((pair.chosen_ids, pair.rejected_ids), row, strict=True):
            key = (tuple(pair.prompt_ids), tuple(response))
            weights[key] = weights.get(key, 0.0) + weight
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    gradients: dict[str, Tensor] = {}
    for key, weight in weights.items():
        model = tiny.plain_model(folder) if fresh else model
        model.zero_grad()
        score = token_logps(model, *key).sum()
        (weight * score).backward()
        found[key] = score.item()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0.0) + parameter.grad
    scores = [[found[tuple(p.prompt_ids), tuple(r)] for r in (p.chosen_ids, p.rejected_ids)] for p in ALL]
    return Truth(torch.tensor(scores), gradients)


def largest_gradient_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst of all tensors, relative to the tensor's largest gradient.

    A bias of keys changes no score: its gradients are rounding errors, and taken relative to the model's largest.
    """
    assert got.keys() == expected.keys()
    overall = max(float(value.abs().max()) for value in expected.values())
    errors = []
    for name, value in expected.items():
        largest = float(value.abs().max())
        errors.append(float((got[name] - value).abs().max()) / (largest if largest > 1e-6 * overall else overall))
    return max(errors)


def score(scorer: Scorer, layout: Layout, pairs: Sequence[PreferencePair] = ALL) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores [P, 2] in a layout, and gradients of their sum weighted by `WEIGHTS`."""
    scorer.use_layout(layout)
    scorer.zero_grad()
    got = as_matrix(scorer.score(pack(pairs, layout=layout, pad_token_id=2)).logps)
    (got * WEIGHTS[: len(pairs)]).sum().backward()
    parameters = scorer.base.named_parameters()
    return got.detach(), {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def choose(scorer: Scorer, sharing: str = "auto", longest: int = LONGEST) -> LayoutChoice:
    return choose_layout(scorer, ALL[:3], sharing, longest=longest, pad=2)  # type: ignore[arg-type]


def assert_right(
    scorer: Scorer, layouts: Collection[Layout], expected: Truth, *, scores: float = 1e-5, gradients: float = 2e-5
) -> None:
    for layout in layouts:
        got, mine = score(scorer, layout)
        assert ((got - expected.scores).abs() <= scores * expected.scores.abs().clamp(min=1)).all(), layout
        assert largest_gradient_error(mine, expected.gradients) <= gradients, layout


def twice(real: Any, *positional: Any, **named: Any) -> Any:
    real(*positional, **named)
    return real(*positional, **named)
