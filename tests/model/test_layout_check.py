"""Every layout against `transformers`, one response at a time, and which one a model takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from open_po.config import ModelConfig
from open_po.data import PreferencePair
from open_po.errors import UserError
from open_po.losses import PairLogps
from open_po.model import attention
from open_po.model.activations import checkpoint_gradients
from open_po.model.attention import Segments, packed_attention
from open_po.model.layout_check import choose_layout
from open_po.model.lora import attach_lora
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.packing import Layout, PackedBatch, Segment, pack
from tests import cli, tiny
from tests.scoring import (
    ALL,
    BFLOAT16,
    FLOAT32,
    LAYOUTS,
    LONGEST,
    PAIRS,
    WEIGHTS,
    as_matrix,
    assert_right,
    choose,
    largest_gradient_error,
    load,
    score,
    token_logps,
    truth,
    twice,
)


@pytest.mark.parametrize("architecture", tiny.SHARING)
def test_every_layout_equals_transformers(architecture: str, tmp_path: Path) -> None:
    """Scores and gradients, with gradient checkpointing off and on; and sharing is what the model chooses."""
    tiny.make_model(tmp_path, architecture, **tiny.SHARING[architecture])
    expected = truth(tmp_path)
    assert len(expected.gradients) == len(dict(tiny.plain_model(tmp_path).named_parameters()))
    scorer = load(tmp_path).train()
    choice = choose(scorer)
    assert (choice.layout, scorer.layout, choice.refused) == ("shared", "shared", {})
    assert choice.difference <= 1e-6
    # GPT-2's code insists on a hidden state for every token.
    assert scorer.last_layer_is_short == (choice.whole_last_layer is None) == (architecture != "gpt2")
    assert_right(scorer, LAYOUTS, expected)
    checkpoint_gradients(scorer)
    assert_right(scorer, LAYOUTS, expected)


INTERFACE = "{} of {} layers use transformers' attention interface"
REASONS = {
    "mamba": INTERFACE.format(0, 2),
    "qwen3_next": INTERFACE.format(1, 4),
    "bloom": INTERFACE.format(0, 2),
    "falcon": INTERFACE.format(0, 2),
    "mpt": INTERFACE.format(0, 2),
    "stablelm": "StableLmAttention gives its attention no segments",
    "llama_dynamic": "rotations depend on the length of rows beyond 64 tokens",
}


@pytest.mark.parametrize("architecture", tiny.ROWS_ONLY)
def test_models_that_cannot_share_fall_back_to_rows(architecture: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture, **tiny.ROWS_ONLY[architecture])
    dynamic = architecture == "llama_dynamic"
    # The gradients of Qwen3-Next's recurrence depend on how a row is padded to chunks of 64: transformers' own batch of
    # padded rows differs from its own single rows by 4e-5, and both differ from float64 by 4e-4.
    tolerance = 1e-4 if architecture == "qwen3_next" else 2e-5
    expected = truth(tmp_path, fresh=dynamic)
    scorer = load(tmp_path).train()
    choice = choose(scorer)
    assert (choice.layout, scorer.layout) == ("rows", "rows")
    why = dict.fromkeys(["shared"] if dynamic else ["shared", "unshared"], REASONS[architecture])
    assert choice.refused == why
    assert choice.describe().startswith("Layout rows: prompts are repeated and rows padded (within ")
    assert choice.describe().endswith(f"; not {' or '.join(why)}: {REASONS[architecture]})")
    assert_right(scorer, ["rows"], expected, gradients=tolerance)
    if scorer.base.supports_gradient_checkpointing:
        checkpoint_gradients(scorer)
        assert_right(scorer, ["rows"], expected, gradients=tolerance)


def test_qwen3_next_in_rows_equals_transformers_batch_of_padded_rows(tmp_path: Path) -> None:
    """The same rows padded the same way leave the usual rounding only."""
    tiny.make_model(tmp_path, "qwen3_next", **tiny.ROWS_ONLY["qwen3_next"])
    batch = pack(PAIRS, layout="rows", pad_token_id=2)
    model = tiny.plain_model(tmp_path)
    logits = model(input_ids=batch.input_ids.view(len(batch.row_lengths), -1), use_cache=False).logits.flatten(0, 1)
    logps = logits.log_softmax(-1)[batch.score_index].gather(1, batch.target_ids[:, None])[:, 0]
    scores = torch.zeros(batch.num_responses).index_add(0, batch.response_id, logps)[batch.pairs]
    (scores * WEIGHTS[: len(PAIRS)]).sum().backward()
    got, gradients = score(load(tmp_path).train(), "rows", PAIRS)
    torch.testing.assert_close(got, scores.detach(), rtol=1e-5, atol=1e-5)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_gradient_error(gradients, theirs) <= 2e-5


# ------------------------------------------------------------------------------------------------------- dynamic RoPE

ROPE_BY_LENGTH: dict[str, dict[str, Any]] = {
    "dynamic": tiny.ROWS_ONLY["llama_dynamic"],
    "longrope": {
        "model_type": "phi3",
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 64,  # Phi-3's configuration copies it over that of `rope_parameters`
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [4.0, 5.0, 6.0, 7.0],
            "original_max_position_embeddings": 64,
        },
    },
}


@pytest.mark.parametrize("rope", ROPE_BY_LENGTH)
def test_the_order_of_rows_changes_no_score_of_a_rope_that_depends_on_length(rope: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, rope, **ROPE_BY_LENGTH[rope])
    long, longer, short = ALL[2], PreferencePair([0, *range(50, 160)], [12, 1], [9, 5, 1]), ALL[0]
    pairs = [short, long, longer]
    with torch.no_grad():
        scores = [
            token_logps(tiny.plain_model(tmp_path), pair.prompt_ids, response).sum()
            for pair in pairs
            for response in (pair.chosen_ids, pair.rejected_ids)
        ]
        expected = torch.stack(scores).view(-1, 2)
        remembering = tiny.plain_model(tmp_path)
        token_logps(remembering, longer.prompt_ids, longer.chosen_ids)
        late = token_logps(remembering, long.prompt_ids, long.chosen_ids).sum()
    changed = abs(late - expected[1, 0]) > 1e-3
    assert changed == (rope == "dynamic"), "whether transformers' own module remembers the longest row it has seen"
    scorer = load(tmp_path)
    assert choose_layout(scorer, pairs, "auto", longest=114, pad=2).layout == "rows"
    with scorer.as_reference():
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [1, 0], [0]):
            got = as_matrix(scorer.score(pack([pairs[i] for i in order], layout="rows", pad_token_id=2)).logps)
            assert ((got - expected[order]).abs() <= 1e-5 * expected[order].abs().clamp(min=1)).all()


@pytest.mark.parametrize("rope", ROPE_BY_LENGTH)
def test_rows_within_the_original_length_share_whatever_the_rope(rope: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, rope, **ROPE_BY_LENGTH[rope])
    scorer, short = load(tmp_path), [pair for pair in ALL if len(pair.prompt_ids) < 60]
    choice = choose_layout(scorer, short, "auto", longest=64, pad=2)
    assert (choice.layout, choice.refused, scorer.row_by_row) == ("shared", {}, False)
    expected = truth(tmp_path, fresh=True).scores[[index for index, pair in enumerate(ALL) if pair in short]]
    for layout in LAYOUTS:
        got, _ = score(scorer, layout, short)
        assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all(), layout
    assert choose_layout(scorer, short, "auto", longest=65, pad=2).layout == "rows"
    assert scorer.row_by_row


# ---------------------------------------------------------------------------------------- precision, adapters, extras


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "phi", "gpt2", "deepseek_v3"])
def test_bfloat16_stays_within_a_percent(architecture: str, tmp_path: Path) -> None:
    """Of the model's own scores in the same precision, and of those in float32."""
    tiny.make_model(tmp_path, architecture, **tiny.SHARING[architecture])
    scorer = load(tmp_path, BFLOAT16)
    assert choose(scorer).layout == "shared"
    exact = truth(tmp_path).scores
    model = tiny.plain_model(tmp_path)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sides = [[(p.prompt_ids, r) for r in (p.chosen_ids, p.rejected_ids)] for p in ALL]
        theirs = torch.tensor([[token_logps(model, *key).sum() for key in pair] for pair in sides])
    for layout in LAYOUTS:
        scorer.use_layout(layout)
        with scorer.as_reference():
            got = as_matrix(scorer.score(pack(ALL, layout=layout, pad_token_id=2)).logps)
        assert got.dtype == torch.float32
        for expected in (theirs, exact):
            assert ((got - expected).abs() <= 1e-2 * expected.abs().clamp(min=1)).all(), layout


def test_adapters_score_and_train_alike_in_every_layout(llama: Path) -> None:
    scorer = load(llama).train()
    choose(scorer)
    config = ModelConfig(
        model_name_or_path="m", lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, lora_target_modules=["all-linear"]
    )
    checkpoint_gradients(scorer)
    attach_lora(scorer, config)
    adapters = {name: p for name, p in scorer.model.named_parameters() if p.requires_grad}
    for number, parameter in enumerate(adapters.values()):  # those that start at 0 would pass no gradient on
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    assert scorer.layout == "shared"
    with scorer.as_reference():
        base = as_matrix(scorer.score(pack(ALL, layout="shared", pad_token_id=2)).logps)
    expected, gradients = score(scorer, "rows")
    assert len(gradients) == len(adapters) == 28
    assert (expected - base).abs().max() > 0.5
    for layout in LAYOUTS[:2]:
        got, mine = score(scorer, layout)
        assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
        assert largest_gradient_error(mine, gradients) <= 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_balancing_counts_a_prompt_with_each_response(layout: Layout, tmp_path: Path) -> None:
    """Value and gradients of transformers' own, over the rows of all pairs, equal ones included."""
    tiny.make_model(tmp_path, "mixtral", **tiny.SHARING["mixtral"])
    rows = [[*pair.prompt_ids, *response] for pair in ALL for response in (pair.chosen_ids, pair.rejected_ids)]
    ids = torch.tensor([row + [2] * (LONGEST - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (LONGEST - len(row)) for row in rows])
    plain = tiny.plain_model(tmp_path)
    expected = plain(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    expected.backward()
    scorer = load(tmp_path).train()
    scorer.balance_experts()
    scorer.use_layout(layout)
    batch = pack(ALL, layout=layout, pad_token_id=2)
    assert batch.tokens == int(mask.sum())
    load_balancing = scorer.score(batch).load_balancing
    assert load_balancing is not None
    load_balancing.backward()
    torch.testing.assert_close(load_balancing, expected)
    mine, theirs = dict(scorer.base.named_parameters()), dict(plain.named_parameters())
    compared = 0
    for name, parameter in theirs.items():
        if parameter.grad is not None and parameter.grad.any():
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-7)
            compared += 1
    assert compared > 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_and_squares_in_every_layout(layout: Layout, llama: Path) -> None:
    """What ORPO's prompt likelihood and WPO's weights read."""
    scorer, plain = load(llama), tiny.plain_model(llama)
    scorer.use_layout(layout)
    with scorer.as_reference():
        batch = pack(ALL, layout=layout, pad_token_id=2, with_prompt=True)
        logps: PairLogps = scorer.score(batch, extras={"log_sum_sq", "prompt"}).logps
        both = scorer.score(pack(ALL, layout=layout, pad_token_id=2)).logps
    torch.testing.assert_close(as_matrix(logps), as_matrix(both), rtol=0, atol=0)
    prompts, squares = [], []
    with torch.no_grad():
        for pair in ALL:
            ids = torch.tensor([pair.prompt_ids])
            own = plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            prompts.append(own.sum())
            for response in (pair.chosen_ids, pair.rejected_ids):
                logits = plain(input_ids=torch.tensor([[*pair.prompt_ids, *response]])).logits
                probs = logits[0, len(pair.prompt_ids) - 1 : -1].softmax(-1)
                squares.append(probs.square().sum(-1).log().sum())
    assert logps.prompt is not None
    assert logps.prompt_tokens is not None
    assert logps.prompt_tokens.tolist() == [len(pair.prompt_ids) - 1 for pair in ALL]
    torch.testing.assert_close(logps.prompt, torch.stack(prompts), rtol=1e-5, atol=1e-5)
    assert logps.chosen_log_sum_sq is not None
    assert logps.rejected_log_sum_sq is not None
    got = torch.stack([logps.chosen_log_sum_sq, logps.rejected_log_sum_sq], 1)
    torch.testing.assert_close(got, torch.stack(squares).view(-1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ld_alpha_cuts_a_shared_response_at_the_length_of_each_pair(layout: Layout, alpha: float, llama: Path) -> None:
    scorer, plain = load(llama).train(), tiny.plain_model(llama)
    scorer.use_layout(layout)
    got = as_matrix(scorer.score(pack(ALL, layout=layout, pad_token_id=2), ld_alpha=alpha).logps)
    (got * WEIGHTS).sum().backward()
    scores = []
    for pair in ALL:
        shorter = min(len(pair.chosen_ids), len(pair.rejected_ids))
        for response in (pair.chosen_ids, pair.rejected_ids):
            own = token_logps(plain, pair.prompt_ids, response)
            scores.append(own[:shorter].sum() + alpha * own[shorter:].sum())
    expected = torch.stack(scores).view(-1, 2)
    (expected * WEIGHTS).sum().backward()
    assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
    mine, theirs = ({name: p.grad for name, p in m.named_parameters()} for m in (scorer.base, plain))
    assert largest_gradient_error(mine, theirs) <= 2e-5


# ---------------------------------------------------------------------------------------------------- which is chosen


def test_off_does_without_sharing(llama: Path, tmp_path: Path) -> None:
    scorer = load(llama)
    choice = choose(scorer, "off")
    assert (choice.layout, scorer.layout, choice.refused) == ("unshared", "unshared", {})
    assert choice.describe().startswith("Layout unshared: prompts are repeated, nothing is padded (within ")
    tiny.make_model(tmp_path, "bloom", **tiny.ROWS_ONLY["bloom"])
    assert choose(load(tmp_path), "off").layout == "rows"


def test_on_takes_sharing(llama: Path) -> None:
    assert choose(load(llama), "on").layout == "shared"


@pytest.mark.parametrize("architecture", ["bloom", "stablelm", "llama_dynamic"])
def test_on_with_a_model_that_cannot_is_one_line(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.ROWS_ONLY[architecture]
    model = tiny.make_model_folder(tmp_path / "model", architecture, **settings)
    rows = tiny.text_rows(4)
    rows[3]["prompt"] = " ".join(60 * ["cat"])
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    line = cli.failure(capsys, cli.arguments(model, data, tmp_path / "run", prompt_sharing="on"))
    name = settings.get("model_type", architecture)
    reason = REASONS[architecture]
    assert line == f"error: prompt_sharing: on is not possible with {name} (shared: {reason}); use auto"


def change_attention(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Let `change` stand between Llama and `packed_attention`, which it is given first."""

    def changed(*positional: Any, **named: Any) -> Any:
        return change(packed_attention, *positional, **named)

    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._global_mapping, attention.ATTENTION_NAME, changed)


def test_attention_that_ignores_segments_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called as often as it must be, and takes the pack for one sequence."""

    def causal(real: Any, module: Any, query: Tensor, *rest: Any, segments: Any, **named: Any) -> Any:
        whole = Segment(0, query.shape[2], 0, 0)
        return real(module, query, *rest, segments=Segments((whole,), segments.device), **named)

    scorer = load(llama)
    change_attention(monkeypatch, causal)
    choice = choose(scorer)
    assert choice.layout == "rows"
    for layout in LAYOUTS[:2]:
        assert choice.refused[layout].startswith("scores are off by ")
    with pytest.raises(UserError, match=r"prompt_sharing: on is not possible with llama \(shared: scores are off by"):
        choose(scorer, "on")


def test_attention_without_the_prefix_may_do_without_sharing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is right only where no prompt is shared."""

    def alone(real: Any, *positional: Any, segments: Any, **named: Any) -> Any:
        ranges = tuple(Segment(s.start, s.end, s.start, s.start) for s in segments.ranges)
        return real(*positional, segments=Segments(ranges, segments.device), **named)

    change_attention(monkeypatch, alone)
    choice = choose(load(llama))
    assert choice.layout == "unshared"
    assert set(choice.refused) == {"shared"}


def not_in_the_last(real: Any, module: Any, *positional: Any, **named: Any) -> Any:
    """The last layer has attention of its own, which happens to be right."""
    if module.layer_idx == 0:
        return real(module, *positional, **named)
    query, key, value, _ = positional
    return attention._by_sdpa(query, key, value, named["segments"], named["scaling"], None), None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (twice, "a layer calls transformers' attention interface more than once"),
        (not_in_the_last, "1 of 2 layers use transformers' attention interface"),
    ],
)
def test_scores_that_agree_are_not_enough(
    change: Callable[..., Any], reason: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention must be called once in each layer: otherwise something is done that was not meant to be."""
    scorer, plain = load(llama), load(llama)
    change_attention(monkeypatch, change)
    with torch.no_grad():
        assert torch.allclose(score_only(scorer, "shared"), score_only(plain, "rows"), atol=1e-5)
    choice = choose(scorer)
    assert choice.layout == "rows"
    for layout in LAYOUTS[:2]:
        assert choice.refused[layout] == reason


def test_one_token_that_is_off_does_not_hide_in_the_mean(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load(llama)
    real = scorer.token_logprobs

    def leaking(batch: PackedBatch) -> Tensor:
        logprobs = real(batch)
        if batch.layout == "shared":
            logprobs[3] += 1.5e-3  # over all tokens a mean below the tolerance of 1e-4
        return logprobs

    monkeypatch.setattr(scorer, "token_logprobs", leaking)
    choice = choose(scorer)
    assert choice.layout == "unshared"
    off, largest = re.findall(r"[0-9.e-]+(?= nats|  ?at most)", choice.refused["shared"])
    assert float(off) < 1e-4 < 1e-3 < float(largest)


def score_only(scorer: Scorer, layout: Layout) -> Tensor:
    scorer.use_layout(layout)
    return as_matrix(scorer.score(pack(PAIRS, layout=layout, pad_token_id=2)).logps)


def test_a_model_that_no_layout_scores_rightly_is_refused(llama: Path) -> None:
    """One whose rows change one another, as with attention over the batch."""
    scorer = load(llama)
    forward = scorer.base.model.forward

    def mixed(*positional: Any, **named: Any) -> Any:
        result = forward(*positional, **named)
        rows, tokens = result.last_hidden_state.shape[:2]
        result.last_hidden_state = result.last_hidden_state * (1 + 0.1 * (rows - 1) + 0.001 * (tokens - tokens % 100))
        return result

    scorer.base.model.forward = mixed
    with pytest.raises(UserError, match=r"llama: this architecture is not supported, its scores differ from its own"):
        choose(scorer)


def test_a_score_that_is_not_finite_is_left_to_those_who_can_name_its_pair(llama: Path) -> None:
    scorer = load(llama)
    embedding = scorer.base.get_input_embeddings().weight
    with torch.no_grad():
        embedding[12] = float("inf")  # in ALL[2] only
    choice = choose(scorer)
    assert (choice.layout, choice.refused, choice.responses) == ("shared", {}, 4)
    with pytest.raises(UserError, match="its weights are damaged, or too large for float32"):
        choose_layout(scorer, [ALL[2]], "auto", longest=LONGEST, pad=2)
    with torch.no_grad():
        embedding[0] = float("nan")
    with pytest.raises(UserError, match="its weights are damaged, or too large for float32"):
        choose(scorer)


def test_a_pack_in_another_layout_is_refused(llama: Path) -> None:
    scorer = load(llama)
    choose(scorer)
    with pytest.raises(ValueError, match="a pack in layout rows for a scorer that takes shared"):
        scorer.score(pack(PAIRS, layout="rows", pad_token_id=2))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_ends_in_the_check_refuses_no_layout(
    error: RuntimeError, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    scorer = load(llama)
    change_attention(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="memory"):
        choose(scorer)


def test_numerics_without_sharing_have_the_same_key() -> None:
    """A cache that one layout filled serves the others."""
    assert "layout" not in Numerics(**vars(FLOAT32)).key()
