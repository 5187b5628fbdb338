"""docs/add_a_loss.md does what it says: its own code is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.losses import preference_loss
from tests import cli
from tests.plain import Plain, Recipe, Scores, assert_metrics
from tests.tiny import text_rows, write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "add_a_loss.md"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's Python blocks, the first of them importable as my_losses."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_losses.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(tmp_path)
    return blocks


def test_the_page_prints_what_it_says(module: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    exec(module[1], {})
    said = re.search(r"print\(output.losses\)  # (.*)", module[1])
    assert said is not None
    assert capsys.readouterr().out.strip() == said[1]


def cauchy(policy: Scores, reference: Scores) -> Any:
    chosen, rejected = 0.2 * (policy.chosen - reference.chosen), 0.2 * (policy.rejected - reference.rejected)
    return torch.log(1 + (1 - chosen + rejected) ** 2 / 4), chosen, rejected


def test_the_loss_trains_through_the_command_line(module: list[str], llama: Path, tmp_path: Path) -> None:
    rows = text_rows(4, seed=3)
    output = cli.train(
        llama,
        write_jsonl(tmp_path / "data.jsonl", rows),
        tmp_path / "run",
        loss_type="my_losses:cauchy",
        beta=0.2,
        loss_parameters="{width: 2}",
        num_epochs=3,
        learning_rate=1e-3,
    )
    plain = Plain.of(llama, rows, Recipe(loss=cauchy, flags={}))
    plain.train([[0, 1, 2, 3]] * 3, learning_rate=1e-3)
    cli.assert_close_weights(cli.weights(output), plain.model.state_dict(), cli.weights(llama))
    for mine, expected in zip(cli.steps(output), plain.records, strict=True):
        assert_metrics(mine, {"train_loss" if k == "loss" else k: v for k, v in expected.items()})


def test_it_mixes_and_refuses_what_it_does_not_take(module: list[str], llama: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", text_rows(4, seed=3))
    mixed = cli.train(llama, data, tmp_path / "mix", loss_type=["my_losses:cauchy", "sft"], loss_weights=[1.0, 0.05])
    (record,) = cli.steps(mixed)
    total = record["loss/my_losses:cauchy"] + 0.05 * record["loss/sft"]
    assert record["train_loss"] == pytest.approx(total, rel=1e-6)
    with pytest.raises(ValueError, match="loss_type my_losses:cauchy takes no gamma; it takes beta, width"):
        preference_loss("my_losses:cauchy", None, None, gamma=1.0)  # type: ignore[arg-type]
