"""The reference pass of a model that the ranks divide: the same store, whoever fills it, and what goes wrong in it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.model.scorer import Scorer
from open_po.packing import PackedBatch
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


@pytest.mark.parametrize("fields", [{}, {"parallel": "fsdp"}, {"parallel": "zero3"}], ids=str)
@pytest.mark.parametrize("separate", [False, True], ids=["policy", "separate"])
def test_the_store_is_that_of_a_whole_model(
    fields: dict[str, Any], separate: bool, llama: Path, many: Path, tmp_path: Path, capfd: Capture
) -> None:
    if not separate and not fields:
        pytest.skip("a policy that each rank holds as a whole is its own reference")
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


def test_an_error_of_one_rank_is_told_and_what_was_scored_is_kept(
    llama: Path, many: Path, tmp_path: Path, capfd: Capture
) -> None:
    words = cli.arguments(llama, many, tmp_path / "run", parallel="fsdp", **FIELDS)

    def run_out_of_memory(rank: int) -> None:
        compute, score, windows = LockstepPass._compute, Scorer.token_logprobs, 0

        def counting(self: LockstepPass, *positional: Any) -> None:
            nonlocal windows
            windows += 1
            compute(self, *positional)

        def failing(self: Scorer, batch: PackedBatch) -> Any:
            found = score(self, batch)
            if rank == 1 and windows == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return found

        LockstepPass._compute = counting  # type: ignore[method-assign]
        Scorer.token_logprobs = failing  # type: ignore[method-assign]

    capfd.readouterr()
    assert cli.forked_ranks(words, run_out_of_memory) == [1, 1]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "out of memory in the reference pass, with" in line
    assert line.endswith("lower reference_max_tokens_per_batch")
    assert stored(tmp_path / "reference")


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
