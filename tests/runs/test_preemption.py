"""A run that is asked to stop saves and says so, and goes on where it stopped."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from open_po.reference.fill import ReferencePass
from open_po.training.gradients import StepGradients
from tests import cli

Capture = pytest.CaptureFixture[str]
FIELDS: dict[str, Any] = {"num_epochs": 2, "checkpointing_steps": 5, "resume_from_checkpoint": "auto"}


def signals_in_step(number: int, *signals: signal.Signals) -> None:
    """Have this process send itself signals in the middle of a step."""
    backward = StepGradients.backward

    def signalled(self: StepGradients, *positional: Any) -> Any:
        if self.state.progress.step + 1 == number:
            for each in signals:
                os.kill(os.getpid(), each)
        return backward(self, *positional)

    StepGradients.backward = signalled  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    name: str, llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    whole = cli.train(llama, pairs_file, tmp_path / "whole", **FIELDS)
    run = tmp_path / "run"
    words = cli.arguments(llama, pairs_file, run, **FIELDS)
    capfd.readouterr()
    assert cli.forked(words, lambda: signals_in_step(3, signal.Signals[name])) == 75
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"stopped: {name}, after step 3 of 12; saved {run}/checkpoints/step_000003, and the same command goes on from "
        "there with --resume_from_checkpoint auto"
    )
    assert cli.checkpoints(run) == ["step_000003"]
    assert cli.summary(run)["status"] == "interrupted"
    assert cli.forked(words) == 0
    assert cli.equal(cli.weights(run), cli.weights(whole))
    assert cli.without_perf(cli.metrics(run)) == cli.without_perf(cli.metrics(whole))


def test_a_second_signal_ends_the_run_at_once(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS)
    assert cli.forked(words, lambda: signals_in_step(3, signal.SIGUSR1, signal.SIGTERM)) == -signal.SIGTERM
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_signal_ends_a_rank_that_waits_for_another(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Both come while it is in a collective, where Python runs no handler."""
    words = cli.arguments(llama, pairs_file, tmp_path / "run", per_device_train_batch_size=2, **FIELDS)

    def hang(rank: int) -> None:
        if rank == 0:
            waiting = os.getpid()
            backward = StepGradients.backward

            def noted(self: StepGradients, *positional: Any) -> Any:
                (tmp_path / "waiting").write_text(str(waiting))
                return backward(self, *positional)

            StepGradients.backward = noted  # type: ignore[method-assign]
            return

        def signals(self: StepGradients, *positional: Any) -> Any:
            while not (tmp_path / "waiting").exists():
                time.sleep(0.05)
            other = int((tmp_path / "waiting").read_text())
            time.sleep(1.5)  # rank 0 is in the exchange of the step by then
            os.kill(other, signal.SIGUSR1)
            time.sleep(0.3)
            os.kill(other, signal.SIGTERM)
            with suppress(ProcessLookupError):
                for _ in range(100):
                    os.kill(other, 0)
                    time.sleep(0.1)
            os._exit(1)

        StepGradients.size = signals  # type: ignore[method-assign]

    assert cli.forked_ranks(words, hang, seconds=60)[0] == 128 + signal.SIGTERM


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    fields = FIELDS | {"per_device_train_batch_size": 2}
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **fields)
    capfd.readouterr()

    def signal_one(rank: int) -> None:
        if rank == 1:
            signals_in_step(4, signal.SIGTERM)

    assert cli.forked_ranks(words, signal_one) == [75, 75]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("stopped")]
    assert len(said) == 1
    assert "SIGTERM, after step 4 of 12" in said[0]
    assert cli.checkpoints(tmp_path / "run") == ["step_000004"]


def test_a_signal_before_training_is_told_and_nothing_is_lost(
    llama: Path, pairs_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **FIELDS)

    def signal_in_reference_pass() -> None:
        compute = ReferencePass._compute

        def signalled(self: ReferencePass, *positional: Any) -> None:
            compute(self, *positional)
            os.kill(os.getpid(), signal.SIGTERM)

        ReferencePass._compute = signalled  # type: ignore[method-assign]

    capfd.readouterr()
    assert cli.forked(words, signal_in_reference_pass) == 75
    assert capfd.readouterr().err.splitlines()[-1] == (
        "stopped: SIGTERM; what is on disk is kept, and the same command goes on from there"
    )
    assert cli.forked(words) == 0
    assert cli.summary(tmp_path / "run")["reference"]["pairs_reused"] > 0


def test_max_run_time_ends_the_run_again_and_again(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    fields = FIELDS | {"num_epochs": 1, "checkpointing_steps": None}
    whole = cli.train(llama, pairs_file, tmp_path / "whole", **fields)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", max_run_time=1e-7, **fields)
    for _ in range(5):
        assert cli.forked(words) == 75
    assert cli.forked(words) == 0  # the last step ends the run as usual
    assert cli.equal(cli.weights(tmp_path / "run"), cli.weights(whole))
