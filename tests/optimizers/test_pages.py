"""The pages about optimizers say what the catalogue says, and what they show works."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from open_po.config import load_config
from open_po.optimizers import OPTIMIZERS, OptimizerSpec
from tests import cli
from tests.tiny import text_rows, write_jsonl

DOCS = Path(__file__).parents[2] / "docs"


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def test_the_table_of_optimizers_is_the_catalogue() -> None:
    _, *rows = re.findall(r"^\| `\w+` \|.*$", (DOCS / "numerics.md").read_text(), re.MULTILINE)  # but the heading
    assert [cells(row)[0].strip("`") for row in rows] == list(OPTIMIZERS)
    for row in rows:
        name, exact, coarse, keeps, decays, parallel, summary = cells(row)
        spec = OPTIMIZERS[name.strip("`")]
        for said, weight in ((exact, 4), (coarse, 2)):
            least = (spec.matrix_bytes or spec.state_bytes)(weight)
            most = spec.state_bytes(weight)
            assert [float(word) for word in said.split(" to ")] == pytest.approx(
                [least, most] if least != most else [most], abs=0.005
            )
        assert (keeps, decays) == ("yes" if spec.keeps_small_updates else "no", "yes" if spec.decays else "no")
        assert parallel in (", ".join(spec.parallel), "all")
        assert (parallel == "all") == (len(spec.parallel) == 8)
        assert summary == spec.summary


def test_the_ways_table_adds_weights_and_states() -> None:
    page = (DOCS / "numerics.md").read_text()
    found = dict(re.findall(r"`optimizer: (\w+)` \| ([\d.]+) \|", page))
    assert found.keys() == {"adamw", "adamw_kahan", "adamw_sr", "adamw_8bit"}
    for name, said in found.items():
        weight = 2 if OPTIMIZERS[name].keeps_small_updates else 4
        assert float(said) == pytest.approx(weight + OPTIMIZERS[name].state_bytes(weight), abs=0.005)


def test_the_experiments_figures_are_those_of_the_benchmark() -> None:
    result = (cli.REPOSITORY / "benchmarks" / "results" / "bf16_weights.md").read_text()
    table = re.findall(r"^(?:\|.*|The movement of.*)$", result, re.MULTILINE)
    assert len(table) == 8
    page = (DOCS / "numerics.md").read_text()
    assert all(line in page for line in table)


def test_an_optimizer_of_ones_own(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's code, through the command line, against the formula."""
    code, entry = re.findall(r"```python\n(.*?)```", (DOCS / "add_an_optimizer.md").read_text(), re.DOTALL)
    module: Any = ModuleType("open_po.optimizers.sign")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert entry.count("\n") <= 10
    monkeypatch.setitem(OPTIMIZERS, "sign", eval(entry, {"OptimizerSpec": OptimizerSpec}))
    data = write_jsonl(tmp_path / "data.jsonl", text_rows(4))
    fields = {"optimizer": "sign", "learning_rate": 1e-3, "num_epochs": 3, "lr_scheduler_type": "constant"}
    folder = cli.train(llama, data, tmp_path / "run", **fields, warmup_ratio=0.0, checkpointing_steps=1)
    start, end = cli.weights(llama), cli.weights(folder)
    for name, value in end.items():  # three steps of the rate, each up or down, or none where there was no gradient
        steps = (value - start[name]) / 1e-3
        assert (steps - steps.round()).abs().max() < 1e-3
        assert steps.abs().max() <= 3.001
    assert torch.cat([(end[name] != start[name]).flatten() for name in end]).float().mean() > 0.5
    with pytest.raises(Exception, match="weight_decay: is not applied by optimizer sign"):
        load_config(cli.arguments(llama, data, tmp_path / "other", optimizer="sign", weight_decay=0.1))
