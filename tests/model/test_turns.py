"""Scores, losses and gradients of masked conversations against `transformers`, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_po.data import PreferencePair
from open_po.data.turns import Turns
from open_po.losses import PairLogps, preference_loss
from open_po.model.scorer import Scorer
from open_po.packing import pack
from tests import tiny
from tests.masked import label_logps, labels_of
from tests.scoring import LAYOUTS, as_matrix, choose, largest_gradient_error, load

PROMPT = [0, *range(40, 70)]
TURNS = ((3, 9), (15, 16), (20, 28))
# Two pairs of one prompt that share a response; a prompt that ends in a turn; answers with others' turns in them; one
# whose first token is not scored; a pair without anything unusual.
PAIRS = [
    PreferencePair(PROMPT, [44, 3, 17, 1], [8, 1], Turns(TURNS)),
    PreferencePair(PROMPT, [9, 200, 14, 5, 66, 1], [8, 1], Turns(TURNS, chosen=((1, 3),))),
    PreferencePair([0, 5, 6, 7], [70, 71, 72, 73, 74, 75], [90, 91, 92], Turns(((2, 4),), ((0, 2), (4, 5)), ((2, 3),))),
    PreferencePair([0, 99], [7], [9, 200, 14, 5, 66, 1]),
]
WEIGHTS = torch.randn(len(PAIRS), 2, generator=torch.Generator().manual_seed(0))


def naive(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[P, 2] summed log-probs, labels, and sums of log of summed squared probabilities."""
    found = [[label_logps(model, *labels_of(pair, side)) for side in (0, 1)] for pair in PAIRS]
    sums = torch.stack([torch.stack([logps.sum() for logps, _ in sides]) for sides in found])
    squares = torch.stack([torch.stack([squares.sum() for _, squares in sides]) for sides in found])
    return sums, torch.tensor([[len(logps) for logps, _ in sides] for sides in found]), squares


def logps_of(sums: Tensor, counts: Tensor) -> PairLogps:
    (chosen, rejected), (chosen_tokens, rejected_tokens) = sums.unbind(1), counts.float().unbind(1)
    return PairLogps(chosen=chosen, rejected=rejected, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def plain(folder: Path, loss: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    model = tiny.plain_model(folder)
    sums, counts, squares = naive(model)
    loss(logps_of(sums, counts)).backward()
    return sums.detach(), gradients(model), counts, squares


LOSSES: dict[str, Any] = {
    "weighted": lambda logps: (as_matrix(logps) * WEIGHTS).sum(),
    "dpo_norm": lambda logps: preference_loss("dpo_norm", logps, REFERENCE, beta=5.0).loss,
    "dpo": lambda logps: preference_loss("dpo", logps, REFERENCE, beta=0.1).loss,
    "sft": lambda logps: preference_loss("sft", logps).loss,
}
REFERENCE = logps_of(-30 - 5 * WEIGHTS, torch.full((len(PAIRS), 2), 4.0))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", pytest.param("mistral", marks=pytest.mark.slow), "mamba", "llama_dynamic"]
)
def test_scores_and_gradients_equal_transformers(architecture: str, loss: str, tmp_path: Path) -> None:
    if loss != "weighted" and architecture != "llama":
        pytest.skip("losses know nothing of architectures")
    tiny.make_model(tmp_path, architecture, **(tiny.SHARING | tiny.ROWS_ONLY)[architecture])
    expected, theirs, counts, squares = plain(tmp_path, LOSSES[loss])
    scorer = load(tmp_path).train()
    choice = choose(scorer)
    assert choice.layout == ("rows" if architecture in tiny.ROWS_ONLY else "shared")
    assert scorer.last_layer_is_short == (choice.layout == "shared")
    for layout in LAYOUTS if choice.layout == "shared" else ("rows",):
        scorer.use_layout(layout)  # type: ignore[arg-type]
        scorer.zero_grad()
        scores = scorer.score(pack(PAIRS, layout=layout, pad_token_id=2), extras=["log_sum_sq"])  # type: ignore[arg-type]
        LOSSES[loss](scores.logps).backward()
        got = as_matrix(scores.logps).detach()
        assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all(), layout
        assert largest_gradient_error(gradients(scorer.base), theirs) <= 2e-5, layout
        mine = scores.logps
        assert torch.stack([mine.chosen_tokens, mine.rejected_tokens], 1).tolist() == counts.tolist()
        assert mine.chosen_log_sum_sq is not None
        assert mine.rejected_log_sum_sq is not None
        torch.testing.assert_close(
            torch.stack([mine.chosen_log_sum_sq, mine.rejected_log_sum_sq], 1), squares, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_longer_responses_last_labels_weigh_less(layout: Any, tmp_path: Path) -> None:
    """LD-DPO: labels beyond as many as the shorter response has, those of the prompt in front."""
    tiny.make_model(tmp_path)
    model, scorer = tiny.plain_model(tmp_path), load(tmp_path)
    choose(scorer)
    scorer.use_layout(layout)
    got = as_matrix(scorer.score(pack(PAIRS, layout=layout, pad_token_id=2), ld_alpha=0.3).logps)
    for pair, row in zip(PAIRS, got, strict=True):
        sides = [label_logps(model, *labels_of(pair, side))[0] for side in (0, 1)]
        shorter = min(map(len, sides))
        for logps, mine in zip(sides, row, strict=True):
            assert float(mine) == pytest.approx(float(logps[:shorter].sum() + 0.3 * logps[shorter:].sum()), rel=1e-5)


def test_the_layout_check_sees_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares what will be scored, the turns in prompts too."""
    from open_po.model.layout_check import choose_layout

    tiny.make_model(tmp_path)
    scorer, seen = load(tmp_path), []
    real = Scorer.token_logprobs
    monkeypatch.setattr(
        Scorer,
        "token_logprobs",
        lambda self, batch: seen.append(len(batch.spread(batch.target_ids))) or real(self, batch),
    )
    choose_layout(scorer, PAIRS, "auto", longest=100, pad=2)
    distinct = {(tuple(labels_of(pair, side)[0]), tuple(labels_of(pair, side)[1])) for pair in PAIRS for side in (0, 1)}
    assert max(seen) == sum(sum(label != -100 for label in labels) for _, labels in distinct)
