"""Rows of one answer: trained on, evaluated, shown and reported where no other is needed, and refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.commands import cache, inspect, score
from tests import cli, tiny
from tests.report.pages import make_page

Capture = pytest.CaptureFixture[str]
PAIRS = tiny.text_rows(6, seed=3)
HELD_OUT = tiny.text_rows(3, seed=4)
FIELDS: dict[str, Any] = {"loss_type": "sft", "num_epochs": 2, "eval_steps": 1}
SAMPLES: dict[str, Any] = {"sample_during_eval": 2, "sample_max_new_tokens": 4}


def alone(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def train(model: Path, folder: Path, rows: list[Any], held_out: list[Any], **fields: Any) -> Path:
    folder.mkdir()
    data = tiny.write_jsonl(folder / "data.jsonl", rows)
    other = tiny.write_jsonl(folder / "held_out.jsonl", held_out)
    fields = {**FIELDS, "eval_mixer_list": [other, "1.0"], **fields}
    return cli.train(model, data, folder / "run", **fields)


def test_they_train_as_the_chosen_responses_of_pairs_do(llama: Path, tmp_path: Path) -> None:
    """To the last bit, and evaluate to the same figures, but for those of two responses."""
    single = train(llama, tmp_path / "single", alone(PAIRS), alone(HELD_OUT), **SAMPLES)
    paired = train(llama, tmp_path / "paired", PAIRS, HELD_OUT, **SAMPLES)
    ours, theirs = cli.weights(single), cli.weights(paired)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for mine, other in zip(cli.metrics(single), cli.metrics(paired), strict=True):
        both = {"eval/logps/rejected", "eval/rewards/rejected", "eval/rewards/accuracy", "eval/rewards/margin"}
        both |= {"eval/lengths/rejected"}
        two = {name for name in other if name not in mine}
        assert two == (both | {"eval/rewards/average"} if "eval/loss" in other else set())
        for name in mine:
            if not name.startswith("perf/"):
                assert mine[name] == pytest.approx(other[name], rel=1e-6), name
    samples = [json.loads(line) for line in (single / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert {sample["rejected"] for sample in samples} == {""}
    card = (single / "README.md").read_text()
    assert "trained on the chosen responses of 6 rows" in card
    page = make_page(tmp_path / "report.html", single)
    assert "chosen" in page.text
    assert "rejected" not in page.text.split("Samples before and after")[1]


def test_they_may_stand_among_pairs(llama: Path, tmp_path: Path) -> None:
    """Figures of two responses are left out where some have one."""
    rows = [*alone(PAIRS[:3]), *PAIRS[3:]]
    mixed = train(llama, tmp_path / "mixed", rows, [*alone(HELD_OUT[:1]), *HELD_OUT[1:]])
    paired = train(llama, tmp_path / "paired", PAIRS, HELD_OUT)
    ours, theirs = cli.weights(mixed), cli.weights(paired)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any("accuracy" in name for record in cli.metrics(mixed) for name in record)


def test_answers_of_both_labels(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    """Those with a label of false are left out and counted; the others train as they do alone."""
    rows = [{**row, "label": number % 2 == 0} for number, row in enumerate(alone(PAIRS))]
    output = train(llama, tmp_path / "labelled", rows, alone(HELD_OUT))
    only = train(llama, tmp_path / "only", alone(PAIRS[::2]), alone(HELD_OUT))
    ours, theirs = cli.weights(output), cli.weights(only)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left_out = cli.summary(output)["data"]["left_out"]
    assert sum(left_out.values()) == 3


def test_inspect_shows_one_answer(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", alone(PAIRS))
    capsys.readouterr()
    assert inspect.main(cli.arguments(llama, data, tmp_path / "run", loss_type="sft")) == 0
    shown = capsys.readouterr().out
    assert "there are no rejected responses" in shown
    assert "there are none" in shown
    assert "nan" not in shown
    for row in shown.split("Row ")[1:]:
        assert "chosen, " in row
        assert "rejected, " not in row


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "which loss_type dpo needs; give it a field rejected, or set loss_type sft (4 more like it)"),
        (
            {"loss_type": ["sft", "dpo"], "loss_weights": [1, 1]},
            "which loss_type sft + dpo needs; give it a field rejected, or set loss_type sft (4 more like it)",
        ),
    ],
)
def test_losses_of_pairs_refuse_them(fields: Any, said: str, llama: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", [PAIRS[0], *alone(PAIRS[1:])])
    line = cli.failure(capsys, cli.arguments(llama, data, tmp_path / "run", **fields))
    assert line == f"error: {data} row 2: has no rejected response, {said}"
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_held_out_rows_are_refused_too(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", PAIRS)
    other = tiny.write_jsonl(tmp_path / "held_out.jsonl", alone(HELD_OUT[:1]))
    words = cli.arguments(llama, data, tmp_path / "run", loss_type="dpo", eval_mixer_list=[other, "1.0"])
    said = "has no rejected response, which loss_type dpo needs; give it a field rejected, or set loss_type sft"
    assert cli.failure(capsys, words) == f"error: {other} row 1: {said}"


def test_commands_that_compare_two_refuse_them(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", alone(PAIRS[:1]))
    cached = ["--reference_cache_dir", str(tmp_path / "reference"), "--preprocessing_num_workers", "1"]
    words = ["--model", str(llama), "--data", str(data), "--out", str(tmp_path / "scores.jsonl"), *cached]
    capsys.readouterr()
    assert score.main(words) == 1
    said = capsys.readouterr().err
    assert cli.only_error(said) == f"error: {data} row 1: has no rejected response, and score compares two"
    assert cache.main(["build", *cli.arguments(llama, data, tmp_path / "run", loss_type="dpo")]) == 1
    assert "has no rejected response, which loss_type dpo needs" in cli.only_error(capsys.readouterr().err)
