"""run_summary.json: one type writes and reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from open_po.output.estimate import Estimate, Group, Groups
from open_po.output.run_folder import RunFolder
from open_po.output.summary import (
    DataTotals,
    ReferenceTotals,
    RunFacts,
    RunResult,
    RunSummary,
    Status,
    TrainTotals,
    versions,
)
from tests import cli

GROUP = Group(pairs=3, figures={"loss": Estimate(value=0.5, low=0.4, high=0.7)})
RESULT = RunResult(
    reference=ReferenceTotals(
        seconds=1.5,
        pairs_computed=3,
        pairs_reused=4,
        responses_computed=6,
        rows_verified=2,
        max_tokens_per_batch=1024,
        packing={"packs": 1.0},
    ),
    train=TrainTotals(
        seconds=2.5,
        steps=7,
        pairs=14,
        tokens=100,
        response_tokens=60,
        layout="shared",
        max_tokens_per_batch=2048,
        packing={"packs": 2.0},
    ),
    eval={"loss": 0.5, "training_step": 7},
    eval_before={"loss": 0.7, "training_step": 0},
    data=DataTotals(
        pairs=14, by_source={"a": 14}, left_out={"empty response": 1}, truncated_prompts=2, truncated_responses=3
    ),
    run=RunFacts(model_name_or_path="m", loss_type=["dpo"], processes=2, device="cpu"),
    numerics={"compute_dtype": "float32"},
    peak_memory_bytes=9,
    versions={"python": "3.11"},
    held_out=Groups(all=GROUP, by_source={"a": GROUP}, by_length={"long": GROUP}, by_longer={}),
)


@pytest.mark.parametrize(
    "summary",
    [
        RunSummary(status=Status.RUNNING),
        RunSummary(status=Status.FAILED, error="no space"),
        RunSummary(status=Status.INTERRUPTED, error="interrupted"),
        RunSummary(status=Status.COMPLETED, result=RESULT),
        RunSummary(
            status=Status.COMPLETED,
            result=dataclasses.replace(RESULT, reference=None, eval=None, eval_before=None, held_out=None),
        ),
    ],
)
def test_what_is_written_is_read(summary: RunSummary, tmp_path: Path) -> None:
    path = tmp_path / "run_summary.json"
    summary.write(path)
    assert RunSummary.read(path) == summary
    assert json.loads(path.read_text())["status"] == str(summary.status)


def test_the_file_has_the_result_beside_the_status(tmp_path: Path) -> None:
    path = tmp_path / "run_summary.json"
    RunSummary(status=Status.RUNNING).write(path)
    assert json.loads(path.read_text()) == {"status": "running"}
    RunSummary(status=Status.FAILED, error="why").write(path)
    assert json.loads(path.read_text()) == {"status": "failed", "error": "why"}
    RunSummary(status=Status.COMPLETED, result=RESULT).write(path)
    content = json.loads(path.read_text())
    names = "status reference train eval eval_before data run numerics peak_memory_bytes versions "
    names += "predicted_memory_bytes held_out"
    assert list(content) == names.split()
    assert content["train"]["layout"] == "shared"


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3", "{}", '{"status": "dancing"}', '{"status": []}'])
def test_what_is_no_summary_is_none(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "run_summary.json"
    if content is not None:
        path.write_text(content)
    assert RunSummary.read(path) is None


def test_a_summary_of_another_version_keeps_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "run_summary.json"
    RunSummary(status=Status.COMPLETED, result=RESULT).write(path)
    content = json.loads(path.read_text())
    content["train"]["flops"] = 1
    content["weather"] = "fine"
    path.write_text(json.dumps(content))
    assert RunSummary.read(path) == RunSummary(status=Status.COMPLETED, result=RESULT)
    del content["train"]["layout"], content["reference"]["rows_verified"]
    path.write_text(json.dumps(content))
    found = RunSummary.read(path)
    assert found is not None
    assert found.result is not None
    assert found.result.eval == RESULT.eval
    assert found.result.train.seconds == RESULT.train.seconds
    assert found.result.train.layout is None


def test_an_update_keeps_all_else(tmp_path: Path) -> None:
    path = tmp_path / "run_summary.json"
    RunSummary(status=Status.COMPLETED, result=RESULT).write(path)
    content = json.loads(path.read_text()) | {"weather": "fine"}
    del content["reference"]["rows_verified"]
    path.write_text(json.dumps(content))
    RunSummary.update(path, error="why")
    assert json.loads(path.read_text()) == content | {"error": "why"}


def test_a_failure_after_the_result_keeps_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def end() -> None:
        folder.write_summary(RunSummary(status=Status.COMPLETED, result=RESULT))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), folder.recording_failure(is_main=True):
        end()
    assert folder.read_summary() == RunSummary(status=Status.INTERRUPTED, error="KeyboardInterrupt", result=RESULT)


def test_a_runs_summary_reads_as_the_type(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = cli.train(llama, pairs_file, tmp_path / "run", max_train_steps=2, eval_mixer_list=[pairs_file, "1.0"])
    summary = RunSummary.read(output / "run_summary.json")
    assert summary is not None
    assert (summary.status, summary.error) == (Status.COMPLETED, None)
    assert summary.result is not None
    assert summary.result.reference is not None
    assert summary.result.reference.pairs_computed == 48  # training and held-out pairs
    assert summary.result.data.pairs == 24
    assert summary.result.train.steps == 2
    assert summary.result.eval is not None
    assert summary.result.eval["training_step"] == 2
    assert summary.result.versions == versions()
