"""Intervals and differences by the bootstrap, against loops that say what is meant."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from open_po.evaluation import bootstrap
from open_po.evaluation.bootstrap import Array, Statistics, difference, estimates
from open_po.output.estimate import Estimate


def estimate(figure: Statistics) -> Estimate:
    return estimates({"it": figure})["it"]


def naive_interval(count: int, score: Callable[[Sequence[int]], float], seed: int = 1) -> tuple[float, float]:
    """4,000 resamples, one at a time, by another generator."""
    rng = random.Random(seed)
    scores = sorted(score([rng.randrange(count) for _ in range(count)]) for _ in range(4000))
    return scores[100], scores[-101]


def test_the_interval_of_a_mean_is_the_one_that_a_loop_finds() -> None:
    rng = np.random.default_rng(3)
    values = rng.exponential(size=60)
    found = estimate(Statistics.mean(values))
    low, high = naive_interval(60, lambda drawn: float(np.mean([values[index] for index in drawn])))
    assert found.value == pytest.approx(values.mean(), rel=1e-14)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.12 * width)
    assert found.high == pytest.approx(high, abs=0.12 * width)


def test_a_ratio_of_sums_is_resampled_as_one() -> None:
    """Not the mean of ratios: as a loss by token, or a corpus metric."""
    rng = np.random.default_rng(4)
    below = rng.integers(1, 40, 50).astype(float)
    above = below * rng.random(50)
    found = estimate(Statistics.ratio(above, below))
    low, high = naive_interval(50, lambda drawn: above[drawn].sum() / below[drawn].sum())
    assert found.value == pytest.approx(above.sum() / below.sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * (high - low))


def test_examples_of_one_group_are_drawn_together() -> None:
    """Ten prompts with five like answers each are ten examples, not fifty."""
    values = np.repeat(np.random.default_rng(5).normal(size=10), 5)
    groups = np.repeat(np.arange(10) * 7, 5)
    together = estimate(Statistics.mean(values).grouped(groups))
    once = estimate(Statistics.mean(values[::5]))
    assert (together.value, together.low, together.high) == pytest.approx((once.value, once.low, once.high))
    alone = estimate(Statistics.mean(values))
    assert together.high - together.low > 1.7 * (alone.high - alone.low)


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    """Of 400 samples of 80 skewed numbers: 95 of 100, and a little less for samples so small."""
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(400):
        found = estimate(Statistics.mean(rng.exponential(size=80)))
        held += found.low <= 1.0 <= found.high
    assert 0.91 <= held / 400 <= 0.97


def test_chance_makes_small_p_as_rarely_as_it_should() -> None:
    """Two equally good models: p below 0.05 in about 5 of 100 comparisons."""
    rng = np.random.default_rng(7)
    small = 0
    for _ in range(400):
        skill = rng.random(80)
        first, other = (Statistics.mean((rng.random(80) < skill).astype(float)) for _ in range(2))
        small += difference(first, other).p < 0.05
    assert 0.02 <= small / 400 <= 0.085


def test_a_difference_is_paired() -> None:
    """Hard and easy examples differ more than the models do; on the same examples the difference is plain."""
    rng = np.random.default_rng(8)
    level = rng.normal(scale=10, size=100)
    first, other = level + rng.normal(size=100), level + 1 + rng.normal(size=100)
    found = difference(Statistics.mean(first), Statistics.mean(other))
    assert found.value == pytest.approx((other - first).mean())
    low, high = naive_interval(100, lambda drawn: float((other - first)[drawn].mean()))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * (high - low))
    assert found.p < 0.002
    assert difference(Statistics.mean(other), Statistics.mean(first)).value == -found.value


def test_a_model_beside_itself() -> None:
    same = Statistics.mean(np.random.default_rng(9).random(30))
    found = difference(same, same)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_p_is_the_share_of_resamples_as_far_from_their_mean() -> None:
    rng = np.random.default_rng(10)
    first, other = Statistics.mean(rng.random(25)), Statistics.mean(rng.random(25) + 0.1)
    drawn = other.resampled() - first.resampled()
    value = other.value() - first.value()
    count = sum(abs(each - sum(drawn) / len(drawn)) >= abs(value) for each in drawn)
    assert difference(first, other).p == pytest.approx((count + 1) / 1001)


def test_what_is_drawn_in_blocks_is_drawn_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(11).random(40)
    whole = estimate(Statistics.mean(values))
    monkeypatch.setattr(bootstrap, "_BLOCK", 100)  # two resamples at a time
    blocks = Statistics.mean(values)
    assert len(blocks.resampled()) == 1000
    assert estimate(blocks).low == pytest.approx(whole.low, abs=0.01)


def test_several_scores_of_the_same_examples_are_what_each_is_by_itself() -> None:
    rng = np.random.default_rng(8)
    groups = rng.integers(0, 9, 40)
    figures = {
        "mean": Statistics.mean(rng.normal(size=40)).grouped(groups),
        "ratio": Statistics.ratio(rng.random(40), 1 + rng.random(40)).grouped(groups),
    }
    for name, found in estimates(figures).items():
        alone = estimate(figures[name])
        assert (found.value, found.low, found.high) == pytest.approx((alone.value, alone.low, alone.high), rel=1e-12)
    assert estimates({}) == {}


def test_some_of_the_examples() -> None:
    values, groups = np.arange(6.0), np.array([1, 1, 2, 2, 3, 3])
    chosen: Array = np.array([True, True, False, False, True, False])
    part = Statistics.mean(values).grouped(groups).select(chosen)
    assert part.value() == pytest.approx(5 / 3)
    assert part.per_example().tolist() == [0, 1, 4]
    assert part.groups is not None
    assert part.groups.tolist() == [1, 1, 3]
