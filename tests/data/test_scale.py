"""A tenth of the million rows of benchmarks/data.py, within a tenth of its limits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import cli

ROWS = 100_000


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/data.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_data", cli.REPOSITORY / "benchmarks" / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.slow
def test_many_rows_take_little_memory_and_start_quickly(benchmark: Any, tmp_path: Path) -> None:
    """Besides the imports, and what a process needs however few rows there are, a tenth of 2 GB and of 5 seconds."""
    benchmark.write_rows(tmp_path / "rows.jsonl", ROWS, 8)
    benchmark.make_tokenizer(tmp_path / "tokenizer", tmp_path / "rows.jsonl")
    first = benchmark.run(tmp_path, "cache", processes=2)
    again = benchmark.run(tmp_path, "cache", processes=2, mixed=True, plan=True, deduplicate=True)
    assert first["pairs"] == again["pairs"] == ROWS
    fixed = 0.05  # GB
    for found in (first, again):
        assert found["peak"] - found["before"] < 0.1 * (2.0 - found["before"]) + fixed
    assert first["workers"] < first["before"] + fixed
    assert sum(again["processor"][phase] for phase in benchmark.PHASES) < 0.1 * 5.0 + 0.5
