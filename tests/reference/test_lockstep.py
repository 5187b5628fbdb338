"""The reference pass of a model that the ranks divide: the same store, whoever fills it, and what goes wrong in it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.model.scorer import Scorer
from open_po.reference.lockstep import LockstepPass
from tests import cli, tiny
from tests.stores import expected_rows, stored

Capture = pytest.CaptureFixture[str]
FIELDS: dict[str, Any] = {
    "reference_sharding": "on",
    "reference_max_tokens_per_batch": 100,
    "max_train_steps": 1,
    "per_device_train_batch_size": 2,
}


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """31 pairs: packs of uneven size, and not the same number for two ranks."""
    return tiny.write_jsonl(tmp_path / "many.jsonl", tiny.text_rows(31))


@pytest.mark.parametrize(
    ("fields", "separate"),
    [
        pytest.param({"parallel": "fsdp"}, False, id="policy_fsdp"),
        pytest.param({}, True, id="separate_ddp", marks=pytest.mark.slow),
        pytest.param({"parallel": "zero3"}, False, id="policy_zero3", marks=pytest.mark.slow),
        pytest.param({"parallel": "fsdp"}, True, id="separate_fsdp", marks=pytest.mark.slow),
        pytest.param({"parallel": "zero3"}, True, id="separate_zero3", marks=pytest.mark.slow),
    ],
)
def test_the_store_is_that_of_a_whole_model(
    fields: dict[str, Any], separate: bool, llama: Path, many: Path, tmp_path: Path, capfd: Capture
) -> None:
    reference = tiny.make_model_folder(tmp_path / "reference_model", seed=1) if separate else llama
    more = FIELDS | fields | ({"reference_model_name_or_path": reference} if separate else {})
    words = cli.arguments(llama, many, tmp_path / "run", **more)
    assert cli.forked_ranks(words) == [0, 0]
    rows = [tiny.text_rows(31)[index] for index in range(31)]
    expected, got = expected_rows(reference, rows), stored(tmp_path / "reference")
    assert got.keys() == expected.keys()
    for key, (logp, tokens) in expected.items():
        assert got[key][1] == tokens
        assert got[key][0] == pytest.approx(logp, abs=1e-5 * tokens)
    cli.train(llama, many, tmp_path / "alone", **more | {"reference_sharding": "off", "parallel": None})
    capfd.readouterr()
    words = cli.arguments(llama, many, tmp_path / "again", **more, verify_reference_rows=8)
    assert cli.forked_ranks(words) == [0, 0]  # and a whole store is not filled again
    assert "31 pairs from the cache" in capfd.readouterr().out


def test_a_killed_pass_goes_on(llama: Path, many: Path, tmp_path: Path) -> None:
    words = cli.arguments(llama, many, tmp_path / "run", parallel="fsdp", **FIELDS)

    def die_in_window(rank: int) -> None:
        compute, windows = LockstepPass._compute, 0

        def dying(self: LockstepPass, *positional: Any) -> None:
            nonlocal windows
            windows += 1
            if windows == 2:
                signal.raise_signal(signal.SIGKILL)
            compute(self, *positional)

        LockstepPass._compute = dying  # type: ignore[method-assign]

    assert cli.forked_ranks(words, die_in_window) == [-signal.SIGKILL] * 2
    before = stored(tmp_path / "reference")
    assert before
    assert cli.forked_ranks([*words, "--resume_from_checkpoint", "auto"]) == [0, 0]
    after = stored(tmp_path / "reference")
    assert len(after) == 62
    assert before.items() <= after.items()


def in_second_window(score: str, fail: Callable[[int], None]) -> Callable[[int], None]:
    """For forked ranks: call `fail` with the rank when this method of the scorer is called in the second window."""

    def prepare(rank: int) -> None:
        compute, method, windows = LockstepPass._compute, getattr(Scorer, score), 0

        def counting(self: LockstepPass, *positional: Any) -> None:
            nonlocal windows
            windows += 1
            compute(self, *positional)

        def failing(self: Scorer, *positional: Any, **named: Any) -> Any:
            if windows == 2:
                fail(rank)
            return method(self, *positional, **named)

        LockstepPass._compute = counting  # type: ignore[method-assign]
        setattr(Scorer, score, failing)

    return prepare


def test_memory_that_runs_out_on_one_rank_ends_all(llama: Path, many: Path, tmp_path: Path, capfd: Capture) -> None:
    def fail(rank: int) -> None:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    words = cli.arguments(llama, many, tmp_path / "run", parallel="fsdp", **FIELDS)
    capfd.readouterr()
    assert cli.forked_ranks(words, in_second_window("forward", fail)) == [1, 1]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert any(line.startswith("error: rank 1: out of memory, with ") for line in errors), errors
    assert stored(tmp_path / "reference"), "the first window is kept"


def test_a_log_prob_that_is_not_finite_is_told_once_and_the_others_are_stored(
    llama: Path, many: Path, tmp_path: Path, capfd: Capture
) -> None:
    def poison(rank: int) -> None:
        rows = LockstepPass._rows

        def poisoned(self: LockstepPass, logps: torch.Tensor, *positional: Any) -> Any:
            return rows(self, logps * float("nan") if rank == 1 else logps, *positional)

        LockstepPass._rows = poisoned  # type: ignore[method-assign]

    words = cli.arguments(llama, many, tmp_path / "run", parallel="fsdp", **FIELDS)
    capfd.readouterr()
    assert cli.forked_ranks(words, in_second_window("token_logprobs", poison)) == [1, 1]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "the reference model's log-prob of the" in line
    assert stored(tmp_path / "reference")


def test_a_signal_in_the_pass_ends_all_ranks(llama: Path, many: Path, tmp_path: Path) -> None:
    words = cli.arguments(llama, many, tmp_path / "run", parallel="fsdp", **FIELDS)
    signalled = in_second_window("token_logprobs", lambda rank: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.forked_ranks(words, signalled) == [75, 75]


def test_files_that_are_cut_off_are_told_on_all_ranks(tmp_path: Path, many: Path, capfd: Capture) -> None:
    folder = tiny.make_model_folder(tmp_path / "model")
    os.truncate(folder / "model.safetensors", 3000)
    words = cli.arguments(folder, many, tmp_path / "run", parallel="fsdp", **FIELDS)
    capfd.readouterr()
    assert cli.forked_ranks(words) == [1, 1]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "its weights cannot be read (" in line


def test_rows_that_go_one_by_one_are_refused(tmp_path: Path, many: Path, capfd: Capture) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", "llama_dynamic", **tiny.ROWS_ONLY["llama_dynamic"])
    data = tiny.write_jsonl(tmp_path / "long.jsonl", [row | {"prompt": "the cat " * 60} for row in tiny.text_rows(4)])
    words = cli.arguments(folder, data, tmp_path / "run", parallel="fsdp", **FIELDS | {"max_seq_length": 200})
    capfd.readouterr()
    assert cli.forked_ranks(words) == [1, 1]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "rows beyond 64 tokens are computed one by one" in line


def test_a_view_of_the_store_that_differs_between_ranks(llama: Path, many: Path, tmp_path: Path) -> None:
    """One rank believes that all is stored, as where another run has stored the last rows between two looks."""
    words = cli.arguments(llama, many, tmp_path / "run", parallel="fsdp", **FIELDS)

    def all_there(rank: int) -> None:
        if rank == 1:
            make = LockstepPass.__init__

            def made(self: LockstepPass, *positional: Any, **named: Any) -> None:
                make(self, *positional, **named)
                self.responses.stored[:] = True

            LockstepPass.__init__ = made  # type: ignore[method-assign]

    assert cli.forked_ranks(words, all_there) == [0, 0]
    assert len(stored(tmp_path / "reference")) == 62


def test_each_node_divides_a_model_by_itself(llama: Path, many: Path, tmp_path: Path) -> None:
    """Four ranks on two nodes: two teams, each with claims of its own, fill one store."""
    separate = tiny.make_model_folder(tmp_path / "reference_model", seed=1)
    teams = tmp_path / "teams"
    teams.mkdir()

    def note(rank: int) -> None:
        compute = LockstepPass._compute

        def noted(self: LockstepPass, window: Any, *positional: Any) -> None:
            keys = sorted(key.hex() for pack in window for key in self.responses.keys[pack.numbers].tolist())
            (teams / f"{rank}-{keys[0]}").write_text(f"{self.runtime.rank} of {self.runtime.world_size}")
            compute(self, window, *positional)

        LockstepPass._compute = noted  # type: ignore[method-assign]

    fields = FIELDS | {"reference_model_name_or_path": separate, "per_device_train_batch_size": 1}
    words = cli.arguments(llama, many, tmp_path / "run", **fields)
    assert cli.forked_ranks(words, note, count=4, per_node=2) == [0] * 4
    expected, got = expected_rows(separate, tiny.text_rows(31)), stored(tmp_path / "reference")
    assert got.keys() == expected.keys()
    assert all(got[key][0] == pytest.approx(logp, abs=1e-5 * tokens) for key, (logp, tokens) in expected.items())
    by_rank = [{path.name.split("-")[1] for path in teams.glob(f"{rank}-*")} for rank in range(4)]
    assert by_rank[0] == by_rank[1]
    assert by_rank[2] == by_rank[3]
    assert by_rank[0], "the first node had nothing to do"
    assert by_rank[2], "the second node had nothing to do"
    assert by_rank[0].isdisjoint(by_rank[2])
    assert {path.read_text() for path in teams.iterdir()} == {"0 of 2", "1 of 2"}
