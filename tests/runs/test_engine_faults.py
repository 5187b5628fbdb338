"""What goes wrong under each engine is told in one line, and leaves what was there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from open_po.training.gradients import StepGradients
from open_po.training.trainer import Trainer
from tests import cli

Capture = pytest.CaptureFixture[str]
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp"]
FIELDS: dict[str, Any] = {"per_device_train_batch_size": 2, "checkpointing_steps": 1}


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[] if name in ("zero2", "fsdp") else pytest.mark.slow) for name in ENGINES]
)
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    engine: str, llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    """On one rank, in the second step: DeepSpeed by itself would leave the step out and go on."""

    def prepare(rank: int) -> None:
        backward = StepGradients.backward

        def overflowing(self: StepGradients, *positional: Any) -> Any:
            factor = float("inf") if rank == 1 and self.state.progress.step == 1 else 1.0
            plain = self.engine.backward
            self.engine.backward = lambda value: plain(value * factor)  # type: ignore[method-assign]
            return backward(self, *positional)

        StepGradients.backward = overflowing  # type: ignore[method-assign]

    words = cli.arguments(llama, pairs_file, tmp_path / "run", parallel=engine, **FIELDS)
    capfd.readouterr()
    assert cli.forked_ranks(words, prepare) == [1, 1]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: step 2: the gradient is not finite, stopped before the update; pairs: ")
    assert cli.checkpoints(tmp_path / "run") == ["step_000001"]
    if engine == "ddp":
        kept = load_file(tmp_path / "run" / "checkpoints" / "step_000001" / "weights.safetensors")
        assert all(weight.isfinite().all() for weight in kept.values())
    assert cli.summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("engine", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero3"))])
def test_a_rank_that_dies_ends_the_other_within_seconds(
    engine: str, llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    died = tmp_path / "died"

    def prepare(rank: int) -> None:
        step = Trainer.train_step

        def dying(self: Trainer) -> Any:
            if rank == 1 and self.state.progress.step == 2:
                died.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)

        Trainer.train_step = dying  # type: ignore[method-assign]

    words = cli.arguments(llama, pairs_file, tmp_path / "run", parallel=engine, **FIELDS)
    capfd.readouterr()
    assert cli.forked_ranks(words, prepare) == [1, -signal.SIGKILL]
    assert time.time() - float(died.read_text()) < 30
    assert "error: another process of this run has stopped; its own line says why" in capfd.readouterr().err
    assert cli.checkpoints(tmp_path / "run") == ["step_000001", "step_000002"]


@pytest.mark.parametrize("engine", ["zero2", "fsdp"])
def test_a_disk_that_refuses_a_checkpoint(
    engine: str, llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    """Files of more than a few kB fail on one rank, as on a full disk."""

    def prepare(rank: int) -> None:
        import resource

        save = Trainer.train_step

        def limited(self: Trainer) -> Any:
            if rank == 1 and self.state.progress.step == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            return save(self)

        Trainer.train_step = limited  # type: ignore[method-assign]

    words = cli.arguments(llama, pairs_file, tmp_path / "run", parallel=engine, **FIELDS)
    capfd.readouterr()
    assert cli.forked_ranks(words, prepare) == [1, 1]  # neither waits for the other
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert any("step_000002: the checkpoint cannot be written (" in line for line in errors), errors
    assert cli.checkpoints(tmp_path / "run") == ["step_000001"]


def test_a_node_that_does_not_share_the_folder_is_named(
    llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = cli.arguments(llama, pairs_file, Path("run"), reference_cache_dir=tmp_path / "reference", **FIELDS)

    def own_folder(rank: int) -> None:
        (tmp_path / str(rank)).mkdir()
        os.chdir(tmp_path / str(rank))

    capfd.readouterr()
    assert cli.forked_ranks(words, own_folder) == [1, 1]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "output_dir run: is not the same folder on" in line
