"""Small learning rates: what bfloat16 weights come to beside float32 ones, in benchmarks/bf16_weights.py."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest

from tests import cli

SHORT = {"hidden": 64, "layers": 2, "vocabulary": 128, "pairs": 8, "steps": 24}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(cli.REPOSITORY / "benchmarks"))
    return importlib.import_module("bf16_weights")


def check(benchmark: Any, fields: dict[str, Any], names: tuple[str, ...], *, noise: float) -> None:
    runs, compared = benchmark.experiment(benchmark.Setting(**fields), names)
    kahan, plain = compared["adamw_kahan"], compared["adamw"]
    assert kahan.length == pytest.approx(1, abs=0.05)
    assert kahan.cosine > 0.99
    assert kahan.logps > 0.99
    assert plain.length < 0.2
    assert plain.along < 0.05
    exact = runs[benchmark.EXACT]
    bound = benchmark.expected_cosine(exact.start, exact.movement)
    for name in set(names) - {"adamw_kahan", "adamw"}:
        by_chance = compared[name]
        assert by_chance.along == pytest.approx(1, abs=noise)
        assert by_chance.logps > 1 - noise / 5
        # The noise is that of probability, to what a few weights near 1, whose neighbours are far away, change in it.
        assert by_chance.cosine == pytest.approx(bound, rel=2 * noise)
        assert by_chance.length == pytest.approx(1 / bound, rel=2 * noise)
        assert math.isclose(by_chance.cosine * by_chance.length, by_chance.along, rel_tol=1e-6)


def test_a_short_run(benchmark: Any) -> None:
    check(benchmark, SHORT, ("adamw_kahan", "adamw_sr", "adamw"), noise=0.15)


@pytest.mark.slow
def test_two_hundred_steps_at_1e_7(benchmark: Any) -> None:
    check(benchmark, {}, benchmark.NAMES, noise=0.05)
