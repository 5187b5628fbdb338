"""The search for a budget of tokens, where what was found is kept, and the rule of thumb for memory."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection
from pathlib import Path

import pytest

from open_po.distributed.runtime import Runtime
from open_po.model import token_budget
from open_po.model.token_budget import (
    BudgetBook,
    Demand,
    Search,
    Timing,
    Trial,
    candidates,
    fastest,
    filling_budget,
    measured_budget,
    usual,
)

BUDGETS = [1024, 2048, 4096, 8192, 16384]
DEMAND = Demand(together=16_000, total=10**9, pair=500, longest=900)


@pytest.fixture(scope="module")
def alone() -> Runtime:
    return Runtime.start(0)


class Machine:
    """Passes of known speeds, tokens a second by budget; each may be slowed down by other work."""

    def __init__(self, speeds: dict[int, float], disturbed: Collection[int] = ()) -> None:
        self.speeds, self.disturbed = speeds, disturbed
        self.calls: list[tuple[int, int]] = []

    def __call__(self, budget: int, tokens: int) -> Timing:
        self.calls.append((budget, tokens))
        tokens = max(tokens, 500)  # one pair at least
        slower = 3.0 if len(self.calls) in self.disturbed else 1.0
        return Timing(slower * tokens / self.speeds[budget], tokens)


def speeds(*found: float) -> dict[int, float]:
    return dict(zip(BUDGETS, found, strict=False))


@pytest.mark.parametrize(
    ("found", "chosen", "timed"),
    [
        (speeds(100e3, 102e3, 1), 1024, [1024, 2048]),  # 2% is not worth twice the memory
        (speeds(100e3, 110e3, 109e3, 1), 2048, [1024, 2048, 4096]),
        (speeds(100e3, 90e3), 1024, [1024, 2048]),
        (speeds(100e3, 110e3, 120e3, 130e3, 140e3), 16384, BUDGETS),
    ],
)
def test_the_smallest_that_is_about_as_fast_as_any(found: dict[int, float], chosen: int, timed: list[int]) -> None:
    machine = Machine(found)
    assert fastest(BUDGETS, machine, 10**9) == Search(chosen, timed)
    assert max(budget for budget, _ in machine.calls) <= 2 * chosen
    for budget, other in itertools.pairwise(timed):  # each is compared on as many tokens as the other
        assert machine.calls.count((budget, other)) == machine.calls.count((other, other)) == 3


@pytest.mark.parametrize("disturbed", [{1}, {3}, {4}, {3, 6}, {4, 5}, {1, 2, 7, 9}])
def test_other_work_on_the_machine_changes_nothing(disturbed: set[int]) -> None:
    found = fastest(BUDGETS, Machine(speeds(100e3, 110e3, 109e3, 1), disturbed), 10**9)
    assert found == Search(2048, [1024, 2048, 4096])


def test_it_takes_no_longer_than_it_may() -> None:
    slow = speeds(*[700.0] * 5)  # a pair takes 0.7 s, two packs to compare 6 s
    assert fastest(BUDGETS, Machine(slow), 100_000) is None  # 3 s are the least: the pass takes 143 s, 2% of it 2.9
    quick = speeds(7000.0, 7700.0, 1, 1, 1)  # to compare two budgets takes 0.6 s
    assert fastest(BUDGETS, Machine(quick), 40_000) is None, "more than a tenth of the pass's 6 s"
    assert fastest(BUDGETS, Machine(quick), 60_000) is not None
    machine = Machine(slow)
    assert fastest(BUDGETS, machine, 10**9) == Search(1024, [1024, 2048])  # 10 s are the most
    assert sum(machine(*call).seconds for call in machine.calls[:]) <= 10
    assert fastest(BUDGETS, Machine(speeds(10.0)), 10**9) is None


def without_memory(machine: Machine, *budgets: int) -> Trial:
    """Trials of these budgets take more memory than there is."""
    return lambda budget, tokens: Timing(math.inf, 1) if budget in budgets else machine(budget, tokens)


def test_memory_that_runs_out_ends_the_search_and_is_told(tmp_path: Path, alone: Runtime) -> None:
    def settled(trial: Trial) -> tuple[int, str]:
        return measured_budget(DEMAND, trial, 10**6, book, alone)

    book = BudgetBook(tmp_path, {"model": "m"})
    growing = speeds(100e3, 110e3, 120e3, 130e3)
    trial = without_memory(Machine(growing), 8192)
    assert fastest(BUDGETS, trial, 10**9) == Search(4096, [1024, 2048, 4096], 8192)
    said = "measured: the smallest of 1,024, 2,048 and 4,096 that is about as fast as any; memory ran out at 8,192"
    assert settled(trial) == (4096, said)
    assert settled(without_memory(Machine(growing), 2048)) == (1024, "memory ran out at 2,048")
    assert settled(without_memory(Machine(growing), 1024)) == (1024, "memory ran out at 1,024")
    assert book.read() is None, "the next run may have more of it"
    machine = Machine(growing)

    def in_the_end(budget: int, tokens: int) -> Timing:  # of what went well before
        return Timing(math.inf, 1) if (budget, tokens) == (4096, 8192) else machine(budget, tokens)

    assert fastest(BUDGETS, in_the_end, 10**9) == Search(2048, [1024, 2048, 4096], 4096)


def test_what_was_measured_counts_from_then_on(tmp_path: Path, alone: Runtime) -> None:
    def book(**what: object) -> BudgetBook:
        return BudgetBook(tmp_path, {"model": "m", **what})

    machine = Machine(speeds(100e3, 110e3, 109e3, 1))
    first = measured_budget(DEMAND, machine, 10**6, book(), alone)
    assert first.tokens == 2048
    assert "measured: the smallest of 1,024, 2,048 and 4,096" in first.describe("max_tokens_per_batch")
    faster = Machine(speeds(1, 2, 3, 4, 5))
    again = measured_budget(DEMAND, faster, 10**6, book(), alone)
    assert (again.tokens, faster.calls) == (2048, [])
    assert "as measured before" in again.reason
    assert book(threads=8).read() is None
    assert book().keep(4096) == 2048, "another process was first"
    assert book(threads=8).keep(8192) == 8192
    assert measured_budget(DEMAND, None, 1500, book(), alone).tokens == 1024, "memory has room for no more"
    for damage in ("", "[]", "[1]", '{"x": 1}', '{"x'):
        (tmp_path / "token_budgets.json").write_text(damage)
        assert book().read() is None
        assert book().keep(1024) == 1024
        assert len(json.loads((tmp_path / "token_budgets.json").read_text())) == 1
    elsewhere = BudgetBook(tmp_path / "missing", {})
    assert elsewhere.keep(1024) == 1024
    assert elsewhere.read() == 1024, "a folder is made for it"


def test_without_a_measurement(alone: Runtime) -> None:
    nowhere = BudgetBook(Path("missing"), {})
    few = Demand(together=900, total=10**9, pair=500, longest=900)
    assert measured_budget(few, Machine({}), 10**6, nowhere, alone).tokens == 1024, "nothing to choose from"
    assert [usual(pair) for pair in (10, 215, 341, 516, 670, 700)] == [1024, 1024, 1024, 2048, 2048, 4096]
    engine = measured_budget(DEMAND, None, 10**6, nowhere, alone)
    assert (engine.tokens, "not measured under this engine" in engine.reason) == (2048, True)
    assert candidates(1) == candidates(1024) == [1024]
    assert candidates(1025) == [1024, 2048]


def test_what_fills_a_gpu(alone: Runtime) -> None:
    assert filling_budget(DEMAND, 10_000, alone).tokens == 9984, "a multiple of 256"
    assert filling_budget(DEMAND, 16_384, alone).tokens == 16_384, "a step's 16,000 tokens in one pack"
    assert filling_budget(DEMAND, 10**7, alone).tokens == 16_384
    assert filling_budget(DEMAND, -5, alone).tokens == token_budget.SMALLEST
