"""Checkpoints of every engine, on the ranks that wrote them and on others."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.distributed import dcp, single
from open_po.training.trainer import Trainer
from tests import cli, tiny

Capture = pytest.CaptureFixture[str]
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp"]
# 9 pairs in steps of 4, 4 and 1, three times over
FIELDS: dict[str, Any] = {
    "num_epochs": 3,
    "per_device_train_batch_size": 2,
    "checkpointing_steps": 2,
    "resume_from_checkpoint": "auto",
}
LORA = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny.text_rows(9))


def noting_pairs(folder: Path, *, die_at: int | None = None) -> Callable[[int], object]:
    """For forked ranks: note the pairs of every step that is done; SIGKILL in the midst of step `die_at`."""

    def prepare(rank: int) -> None:
        step = Trainer.train_step

        def noted(self: Trainer) -> Any:
            number = self.state.progress.step
            if number + 1 == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done = step(self)
            if rank == 0:
                folder.mkdir(exist_ok=True)
                (folder / str(number)).write_text(json.dumps(self.sampler.step_pairs(number)))
            return done

        Trainer.train_step = noted  # type: ignore[method-assign]

    return prepare


def assert_each_pair_once_an_epoch(folder: Path) -> None:
    steps = sorted(int(path.name) for path in folder.iterdir())
    assert steps == list(range(9))
    seen = Counter(index for path in folder.iterdir() for index in json.loads(path.read_text()))
    assert seen == dict.fromkeys(range(9), 3)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], llama: Path) -> None:
    cli.assert_close_weights(got, expected, cli.weights(llama))


QUICK = [("fsdp", "whole")]


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        pytest.param(engine, fields, id=f"{engine}-{name}", marks=[] if (engine, name) in QUICK else [pytest.mark.slow])
        for engine in ENGINES
        for name, fields in (("whole", {}), ("lora", LORA))
    ],
)
def test_killed_ranks_resume(engine: str, fields: dict[str, Any], llama: Path, pairs: Path, tmp_path: Path) -> None:
    fields = FIELDS | fields | {"parallel": engine}
    whole, killed, notes = tmp_path / "whole", tmp_path / "killed", tmp_path / "notes"
    assert cli.forked_ranks(cli.arguments(llama, pairs, whole, **fields)) == [0, 0]
    words = cli.arguments(llama, pairs, killed, **fields)
    assert cli.forked_ranks(words, noting_pairs(notes, die_at=6)) == [-signal.SIGKILL] * 2
    assert cli.checkpoints(killed) == ["step_000002", "step_000004"]
    assert cli.forked_ranks(words, noting_pairs(notes)) == [0, 0]
    assert cli.equal(cli.weights(killed), cli.weights(whole))
    assert cli.without_perf(cli.metrics(killed)) == cli.without_perf(cli.metrics(whole))
    assert_each_pair_once_an_epoch(notes)


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [(None, 1), pytest.param("ddp", 2, marks=pytest.mark.slow), pytest.param("fsdp", 2, marks=pytest.mark.slow)],
)
def test_checkpoints_written_while_training_goes_on(
    engine: str | None, ranks: int, llama: Path, pairs: Path, tmp_path: Path
) -> None:
    """A step passes before one is on disk; what it holds is the state of its own step."""
    fields = FIELDS | {"parallel": engine, "async_checkpointing": True, "per_device_train_batch_size": 4 // ranks}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = cli.arguments(llama, pairs, whole, **fields | {"async_checkpointing": False})
    assert cli.forked_ranks(words, count=ranks) == [0] * ranks

    def slowly(rank: int) -> None:
        write, save = single._write, dcp.dcp.async_save
        step = Trainer.train_step

        def late(*positional: Any) -> None:
            release.wait()
            write(*positional)

        def saved_late(*positional: Any, **named: Any) -> Any:
            inner, outer = save(*positional, **named), Future[Any]()
            threading.Thread(target=lambda: (release.wait(), outer.set_result(inner.result())), daemon=True).start()
            return outer

        def stepping(self: Trainer) -> Any:
            if self.state.progress.step == 3:  # after step 2 a checkpoint was begun, and step 3 is over
                assert not (killed / "checkpoints" / "step_000002").exists()
                release.set()
                self._checkpoint.saving.wait()  # type: ignore[union-attr]
            if self.state.progress.step == 4:
                assert (killed / "checkpoints" / "step_000002").exists()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)

        release = threading.Event()
        single._write, dcp.dcp.async_save = late, saved_late
        Trainer.train_step = stepping  # type: ignore[method-assign]

    words = cli.arguments(llama, pairs, killed, **fields | {"checkpointing_steps": 2})
    assert cli.forked_ranks(words, slowly, count=ranks) == [-signal.SIGKILL] * ranks
    assert cli.checkpoints(killed)[-1] == "step_000002"
    assert cli.forked_ranks(words, count=ranks) == [0] * ranks
    assert cli.equal(cli.weights(killed), cli.weights(whole))
    assert cli.without_perf(cli.metrics(killed)) == cli.without_perf(cli.metrics(whole))
    assert cli.checkpoints(killed) == cli.checkpoints(whole)


def test_deepspeed_says_that_it_waits_for_its_checkpoints(
    llama: Path, pairs: Path, tmp_path: Path, capfd: Capture
) -> None:
    fields = FIELDS | {"parallel": "zero2", "async_checkpointing": True}
    capfd.readouterr()
    assert cli.forked_ranks(cli.arguments(llama, pairs, tmp_path / "run", **fields)) == [2, 2]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert (
        line == "config error: async_checkpointing: DeepSpeed waits for its checkpoints (parallel zero2); leave it out"
    )


@pytest.mark.parametrize(
    ("engine", "count"),
    [("ddp", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("ddp", 3), ("fsdp", 1), ("fsdp", 3)))],
)
def test_another_number_of_ranks_goes_on_with_the_same_steps(
    engine: str, count: int, llama: Path, pairs: Path, tmp_path: Path, capfd: Capture
) -> None:
    fields = FIELDS | {"parallel": engine, "logging_steps": 3}
    whole, moved, notes = tmp_path / "whole", tmp_path / "moved", tmp_path / "notes"
    assert cli.forked_ranks(cli.arguments(llama, pairs, whole, **fields)) == [0, 0]
    words = cli.arguments(llama, pairs, moved, **fields)
    assert cli.forked_ranks(words, noting_pairs(notes, die_at=6)) == [-signal.SIGKILL] * 2
    capfd.readouterr()
    assert cli.forked_ranks(words, noting_pairs(notes), count=count) == [0] * count
    assert f"keeps its global batch of 4 pairs; its ranks are {count} now, 2 before" in capfd.readouterr().out
    assert_close(cli.weights(moved), cli.weights(whole), llama)
    assert_each_pair_once_an_epoch(notes)
    for mine, theirs in zip(cli.steps(moved), cli.steps(whole), strict=True):  # of steps 4 to 6 too, on 2 and `count`
        assert mine.keys() == theirs.keys()
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert mine["rewards/accuracy"] == theirs["rewards/accuracy"]


@pytest.mark.parametrize("engine", [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3")])
def test_zero_says_that_it_needs_the_same_number_of_ranks(
    engine: str, llama: Path, pairs: Path, tmp_path: Path, capfd: Capture
) -> None:
    words = cli.arguments(llama, pairs, tmp_path / "run", parallel=engine, **FIELDS)
    assert cli.forked_ranks(words, noting_pairs(tmp_path / "notes", die_at=4)) == [-signal.SIGKILL] * 2
    capfd.readouterr()
    assert cli.forked_ranks(words, count=1) == [1]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"error: resume_from_checkpoint {checkpoint}: DeepSpeed's checkpoints need the number of ranks that wrote "
        "them, 2, this run has 1; start 2"
    )


def test_another_engine_is_told_which_one_wrote_the_checkpoint(
    llama: Path, pairs: Path, tmp_path: Path, capfd: Capture
) -> None:
    words = cli.arguments(llama, pairs, tmp_path / "run", **FIELDS)
    killed = cli.forked_ranks([*words, "--parallel", "fsdp"], noting_pairs(tmp_path / "notes", die_at=4))
    assert killed == [-signal.SIGKILL] * 2
    capfd.readouterr()
    assert cli.forked_ranks([*words, "--parallel", "zero2"]) == [1, 1]
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"error: resume_from_checkpoint {tmp_path}/run/checkpoints/step_000002: was written under parallel fsdp, this "
        "run is zero2; use fsdp"
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, *ENGINES])
def test_ten_random_kills(engine: str | None, llama: Path, pairs: Path, tmp_path: Path) -> None:
    """One rank or all, at any moment; the run is started again each time, as by a scheduler."""
    ranks = 1 if engine is None else 2
    fields = FIELDS | {"num_epochs": 24, "parallel": engine, "checkpointing_steps": 3}
    fields["per_device_train_batch_size"] = 4 // ranks
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert cli.forked_ranks(cli.arguments(llama, pairs, whole, **fields), count=ranks) == [0] * ranks
    longest = time.monotonic() - started
    words = cli.arguments(llama, pairs, killed, **fields)
    rng, kills, steps = random.Random(7), 0, []

    def prepare(rank: int) -> None:
        if rank in doomed:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, moment)

    while kills < 10:
        doomed = rng.choice([range(ranks), [0], [ranks - 1]])
        moment = rng.uniform(0.05, longest)
        codes = cli.forked_ranks(words, prepare, count=ranks, grace=10)  # one may wait for the others to come
        kills += -signal.SIGKILL in codes
        if (killed / "run_summary.json").exists() and cli.summary(killed)[
            "status"
        ] == "completed":  # at its end: once more from the beginning
            for name in ("run_summary.json", "checkpoints"):
                os.rename(killed / name, tmp_path / f"done_{kills}_{moment}_{name}")
            continue
        assert all(code != 0 for code in codes), codes
        steps.append(cli.checkpoints(killed)[-1:] if (killed / "checkpoints").exists() else [])
    print(engine, "newest checkpoints after each kill:", steps)
    assert sum(map(bool, steps)) >= 3, "the kills came too early to show anything"
    assert cli.forked_ranks(words, count=ranks) == [0] * ranks
    if ranks == 1:
        assert cli.equal(cli.weights(killed), cli.weights(whole))
    assert_close(cli.weights(killed), cli.weights(whole), llama)
    assert [record["training_step"] for record in cli.steps(killed)] == list(range(1, 73))
