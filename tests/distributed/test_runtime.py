"""Who runs what on two ranks, who gets the result, and who hears of an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from tests import cli


def on_two_ranks(folder: Path, body: Callable[[Runtime, int], Any]) -> list[Any]:
    """What `body` returns on each rank, or the error that it raises, as text."""

    def job(rank: int) -> None:
        runtime = Runtime.start(0)
        try:
            found = body(runtime, rank)
        except Exception as error:
            found = f"{type(error).__name__}: {error}; shared: {getattr(error, 'shared', False)}"
        (folder / f"{rank}.json").write_text(json.dumps(found))
        runtime.close()

    assert cli.forked_ranks(["--help"], job) == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_who_runs_and_who_gets_the_result(tmp_path: Path) -> None:
    def body(runtime: Runtime, rank: int) -> Any:
        ran: list[str] = []

        def action(name: str, *, add: int) -> int:
            ran.append(name)
            return 10 * rank + add

        results = [
            runtime.on_main(action, "on_main", add=1),
            runtime.from_main(action, "from_main", add=2),
            runtime.main_first(action, "main_first", add=3),
            runtime.on_every_rank(action, "on_every_rank", add=4),
            runtime.gather(rank),
        ]
        return [ran, results]

    main, other = on_two_ranks(tmp_path, body)
    assert main == [["on_main", "from_main", "main_first", "on_every_rank"], [1, 2, 3, 4, [0, 1]]]
    assert other == [["main_first", "on_every_rank"], [None, 2, 13, 14, [0, 1]]]


def test_the_main_rank_is_done_before_the_others_begin(tmp_path: Path) -> None:
    made = tmp_path / "made"

    def body(runtime: Runtime, rank: int) -> bool:
        def action() -> bool:
            found = made.exists()
            made.touch()
            return found

        return runtime.main_first(action)

    assert on_two_ranks(tmp_path, body) == [False, True]


@pytest.mark.parametrize("how", ["on_main", "from_main", "main_first", "on_every_rank"])
def test_an_error_of_the_main_rank_is_raised_on_both(how: str, tmp_path: Path) -> None:
    def body(runtime: Runtime, rank: int) -> None:
        def action() -> None:
            if rank == 0:
                raise UserError("the disk is full")

        getattr(runtime, how)(action)

    assert on_two_ranks(tmp_path, body) == ["UserError: the disk is full; shared: True"] * 2


@pytest.mark.parametrize("how", ["main_first", "on_every_rank"])
def test_an_error_of_another_rank_is_raised_on_both(how: str, tmp_path: Path) -> None:
    def body(runtime: Runtime, rank: int) -> None:
        def action() -> None:
            if rank == 1:
                raise OSError(28, "No space left on device", "a file")

        getattr(runtime, how)(action)

    assert on_two_ranks(tmp_path, body) == ["UserError: a file: No space left on device; shared: True"] * 2
