"""`python -m open_po plan`: what it prints, and what it answers to mistakes."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import open_po.commands.plan_memory as plan_memory_module
from open_po.commands.place import Place
from open_po.commands.plan import main
from open_po.config import RunConfig, load_config
from open_po.memory_plan import MemoryPlan, ModelBytes, PassBytes, TrainingShape, WeightBytes, usable
from open_po.memory_plan.tables import engines_table
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
    [("ddp", 4, 4, 8), ("zero1", 5, 4, 2), ("zero3", 1, 1, 2), ("fsdp", 1, 1, 2), ("layers", 1.2, 1.2, 2.4)],
)
def test_what_four_ranks_hold(engine: str, weights: float, gradients: float, optimizer: float) -> None:
    """Of layers, the first GPU of four gets three of ten; under ddp packs add up in the buckets of its reducer."""
    rank = dataclasses.replace(plan(engine=engine, ranks=4), card=10 * GB).rank
    assert [rank.weights, rank.gradients, rank.optimizer] == pytest.approx(
        [n * GB for n in (weights, gradients, optimizer)]
    )


@pytest.mark.parametrize(
    ("changes", "card", "weights"),
    [
        ({}, 10, 4),  # each rank has a copy: 4 GB are within 60% of the card
        ({}, 6, 1),
        ({"reference_sharding": "on"}, 10, 1),
        ({"reference_sharding": "off"}, 6, 4),
        ({"separate_reference": True, "reference_weight": 2}, 6, 2),
        ({"separate_reference": True, "reference_weight": 2}, 3, 0.5),
        ({"separate_reference": True, "reference_weight": 2, "engine": "ddp"}, 3, 0.5),
        ({"engine": "ddp"}, 3, 4),  # it is the policy, whose ranks divide nothing
        ({"engine": "layers"}, 3, 1.2),
    ],
)
def test_a_reference_is_planned_whole_or_divided_as_a_run_has_it(
    changes: dict[str, object], card: float, weights: float
) -> None:
    found = dataclasses.replace(plan(**{"engine": "fsdp", "ranks": 4} | changes), card=card * GB)
    parts = found.reference_parts
    assert parts["weights"] == pytest.approx(weights * GB)
    layer = 2 * 0.4 * GB * (0.5 if "reference_weight" in changes else 1)  # two of them are gathered
    assert parts["gathered"] == pytest.approx(layer if weights in (0.5, 1) else 0.0)
    assert parts["gradients"] == (4 * GB if changes == {"engine": "ddp"} else 0.0), "DDP's buckets are there already"


def test_one_share_of_a_card_decides_what_fits_and_which_budget() -> None:
    """What takes 98% of a card does not fit; what the table says would fill it does."""
    found = plan()
    card = found.peak / 0.98
    told = shown(found, card)
    assert re.search(r"fits \d+ GB +│ +no", told), told
    (tokens,) = re.findall(r"as many would fill it +│ +([\d,]+)", told)
    smaller = dataclasses.replace(found.shape, max_tokens=int(tokens.replace(",", "")))
    assert re.search(r"fits \d+ GB +│ +yes", shown(dataclasses.replace(found, shape=smaller), card))


def shown(found: MemoryPlan, card: float) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(engines_table({"single": found}, card, usable(card)))
    return console.export_text()


def test_a_dry_run_shows_the_budget_that_fills_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `plan` does, and as the run will have it."""
    config = load_config(["--model_name_or_path", "model", "--mixer_list", "data", "1.0"])

    def plan_memory(config: RunConfig, device: str, *, engine: str, ranks: int, card: float | None) -> MemoryPlan:
        return dataclasses.replace(plan(device=device, engine=engine, ranks=ranks, pairs_of_rank=4096), card=card)

    monkeypatch.setattr(plan_memory_module, "plan_memory", plan_memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place = Place(nodes=1, node=0, address="", port=0, processes=8, devices=True)
    line = plan_memory_module.planned_memory(config, place)
    filled = plan(engine="ddp", ranks=8, pairs_of_rank=4096).tokens_that_fill(usable(80 * GB))
    assert f" on each rank, of 80 GB, with packs of {filled:,} tokens; parallel ddp; " in line
    (size,) = re.findall(r"predicted: ([\d.]+) GB", line)
    assert 0.98 * 0.97 * 80 <= float(size) <= 0.97 * 80
    monkeypatch.setattr(plan_memory_module, "_DEFAULT_CARD", 10 * GB)
    line = plan_memory_module.planned_memory(config, place)
    assert ", which is too much for 10 GB, with packs of 1,024 tokens" in line
    on_cpu = dataclasses.replace(place, devices=False)
    assert " on each rank; parallel ddp; " in plan_memory_module.planned_memory(config, on_cpu)


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
