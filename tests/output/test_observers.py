"""What observers of a run are told, and when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import open_po.training.run
from open_po.output.metrics import Metrics
from open_po.output.observers import Observers, RunObserver
from open_po.output.summary import RunSummary, Status
from tests import cli


class Notes(RunObserver):
    """Keeps what it is told, and what lay on disk at that moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: list[Metrics] = []
        self.checkpoints: list[tuple[str, bool]] = []
        self.trained: list[tuple[int, bool]] = []
        self.ends: list[tuple[RunSummary, RunSummary | None, bool]] = []

    def metrics_written(self, metrics: Metrics) -> None:
        self.metrics.append(metrics)

    def checkpoint_written(self, checkpoint: Path) -> None:
        self.checkpoints.append((checkpoint.name, (checkpoint / "weights.safetensors").is_file()))

    def training_ended(self) -> None:
        self.trained.append((len(self.metrics), (self.folder / "model.safetensors").is_file()))

    def completed(self, summary: RunSummary) -> None:
        on_disk = RunSummary.read(self.folder / "run_summary.json")
        self.ends.append((summary, on_disk, (self.folder / "model.safetensors").is_file()))


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    found = Notes(tmp_path / "run")
    monkeypatch.setattr(open_po.training.run, "_open_hub", lambda *_: [found])
    return found


def test_an_observer_learns_of_metrics_checkpoints_and_the_end(llama: Path, pairs_file: Path, notes: Notes) -> None:
    fields = {"max_train_steps": 5, "checkpointing_steps": 2, "eval_mixer_list": [pairs_file, "1.0"], "eval_steps": 3}
    output = cli.train(llama, pairs_file, notes.folder, **fields)
    written = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert notes.metrics == written
    assert [record["training_step"] for record in written] == [0, 1, 2, 3, 3, 4, 5, 5]
    assert notes.checkpoints == [("step_000002", True), ("step_000004", True)]
    assert notes.trained == [(len(written), False)]  # after the last metrics, before the model is saved
    ((summary, on_disk, has_model),) = notes.ends
    assert summary == on_disk
    assert summary.status == Status.COMPLETED
    assert has_model


def test_a_run_that_fails_tells_no_end(
    llama: Path, pairs_file: Path, notes: Notes, capsys: pytest.CaptureFixture[str]
) -> None:
    words = cli.arguments(llama, pairs_file, notes.folder, learning_rate=1e30, max_train_steps=5, max_grad_norm=0)
    assert "not finite" in cli.failure(capsys, words)
    assert notes.metrics
    assert not notes.trained
    assert not notes.ends


def test_several_observers_are_told_in_turn(tmp_path: Path) -> None:
    told = []

    class Named(RunObserver):
        def __init__(self, name: str) -> None:
            self.name = name

        def metrics_written(self, metrics: Metrics) -> None:
            told.append((self.name, metrics.pop("training_step")))  # what one does to them is not seen by the next

        def checkpoint_written(self, checkpoint: Path) -> None:
            told.append((self.name, checkpoint.name))

        def training_ended(self) -> None:
            told.append((self.name, "trained"))

        def completed(self, summary: RunSummary) -> None:
            told.append((self.name, summary.status))

    both = Observers([Named("a"), RunObserver(), Named("b")])
    both.metrics_written({"training_step": 1})
    both.checkpoint_written(tmp_path / "step_1")
    both.training_ended()
    both.completed(RunSummary(status=Status.COMPLETED))
    assert told == [(name, what) for what in (1, "step_1", "trained", "completed") for name in ("a", "b")]
