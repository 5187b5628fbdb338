"""`python -m open_po plan`: what it prints, and what it answers to mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from open_po.commands.plan import main
from open_po.memory_plan import MemoryPlan, ModelBytes, PassBytes, TrainingShape, WeightBytes
from tests import tiny

GB = 1e9


class Lines:
    """Passes of a model that holds a megabyte a token, and half of it where it only scores."""

    def training(self, tokens: int) -> PassBytes:
        return PassBytes(tokens=tokens, activations=1e6 * tokens, head_peak=1e6 * tokens + GB, layers_peak=0.0)

    def scoring(self, tokens: int) -> float:
        return 0.5e6 * tokens


def plan(**changes: object) -> MemoryPlan:
    """Of a billion weights in ten layers, 16 bytes each, packs of 1,000 tokens."""
    layer = WeightBytes(parameters=10**8, trained=10**8, size=0.4 * GB, trained_size=0.4 * GB)
    nothing = WeightBytes(parameters=0, trained=0, size=0.0, trained_size=0.0)
    shape = TrainingShape(
        device="cuda", max_tokens=1000, reference_tokens=1000, prompt_tokens=100, response_tokens=100, pairs_of_rank=32
    )
    return MemoryPlan(
        dataclasses.replace(shape, **changes),  # type: ignore[arg-type]
        ModelBytes(layers=(layer,) * 10, around=nothing),
        Lines(),
    )


def test_parts_add_up_to_what_is_worked_out_by_hand() -> None:
    found = plan()
    changing = 1 * GB + 1 * GB  # a thousand tokens of a megabyte, and the head
    assert found.total == pytest.approx(16 * GB + 1.06 * changing + 0.034 * GB + 0.8 * GB)
    assert found.allocated == pytest.approx(16 * GB + changing + 0.034 * GB)
    assert found.reference_total == pytest.approx(4 * GB + 1.06 * 0.5 * GB + 0.834 * GB)


def test_a_step_of_one_pack_has_gradients_or_activations() -> None:
    found = plan(pairs_of_rank=1)
    assert found.parts["gradients"] + found.parts["activations"] + found.parts["head"] == 4 * GB
    large = plan(pairs_of_rank=1, max_tokens=20_000)
    assert (large.parts["gradients"], large.parts["activations"]) == (0.0, 20 * GB)


@pytest.mark.parametrize("room", [24 * GB, 40 * GB, 80 * GB])
def test_the_budget_fills_the_card(room: float) -> None:
    found = plan()
    tokens = found.tokens_that_fill(room)
    assert 0.99 * room <= dataclasses.replace(found, shape=dataclasses.replace(found.shape, max_tokens=tokens)).total
    assert dataclasses.replace(found, shape=dataclasses.replace(found.shape, max_tokens=tokens)).total <= room
    assert found.tokens_that_fill(17 * GB) == 0


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer"),
    [("ddp", 4, 8, 8), ("zero1", 5, 4, 2), ("zero3", 1, 1, 2), ("fsdp", 1, 1, 2), ("layers", 1.2, 1.2, 2.4)],
)
def test_what_four_ranks_hold(engine: str, weights: float, gradients: float, optimizer: float) -> None:
    """Of layers, the first GPU of four gets three of ten; under ddp packs add up beside the buckets of its reducer."""
    rank = dataclasses.replace(plan(engine=engine, ranks=4), card=10 * GB).rank
    assert [rank.weights, rank.gradients, rank.optimizer] == pytest.approx(
        [n * GB for n in (weights, gradients, optimizer)]
    )


@pytest.mark.slow
def test_a_plan_needs_no_weights_and_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    tiny.make_model(folder, num_hidden_layers=4)
    (folder / "model.safetensors").unlink()
    words = f"--model_name_or_path {folder} --mixer_list nowhere.jsonl 1.0 --max_seq_length 64".split()
    assert main(["--gpu-memory", "24GB", *words]) == 0
    printed = capsys.readouterr().out
    assert "fits 24 GB" in printed
    assert "optimizer" in printed or "training" in printed
    assert main(["--gpu-memory", "0.82GB", *words, "--max_tokens_per_batch", "16384"]) == 3
    printed = capsys.readouterr().out
    assert "What to change first" in printed
    assert "gradient_checkpointing: true" in printed


def test_mistakes_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--model_name_or_path {tmp_path} --mixer_list nowhere.jsonl 1.0".split()
    assert main(words) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: has no config.json\n"
    with pytest.raises(SystemExit) as ended:
        main(["--gpu-memory", "many", *words])
    assert ended.value.code == 2
    assert "must be a size such as 24GB, got many" in capsys.readouterr().err
