"""How far a score might be off: the bootstrap over examples (Efron 1979), paired between two models (Koehn 2004).

Resamples are drawn by a constant seed, so that all scores of the same examples are resampled alike: differences between
models are paired, and a figure that is computed twice is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_po.output.estimate import Estimate

Array = NDArray[np.float64]

RESAMPLES = 1000
_LEVEL = 0.95  # of intervals
_SEED = 42
_BLOCK = 2**22  # numbers that are held at a time


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A score of N examples that follows from sums over them: a mean, or a corpus metric such as BLEU."""

    rows: Array  # [N, K]
    score: Callable[[Array], Array]  # from sums [R, K] to scores [R]
    examples: Array | None = None  # [N] the score of each example, where it is not `score` of its row
    groups: NDArray[Any] | None = None  # [N] examples with the same number are drawn together; None: each by itself

    @staticmethod
    def mean(values: Any) -> Statistics:
        """The mean of one number for each example."""
        return Statistics.ratio(values, np.ones(len(values)))

    @staticmethod
    def ratio(above: Any, below: Any) -> Statistics:
        """The sum of some numbers over the sum of others."""
        rows = np.stack([np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)], axis=1)
        return Statistics(rows=rows, score=lambda sums: sums[:, 0] / sums[:, 1])

    def grouped(self, groups: NDArray[Any]) -> Statistics:
        """The same, with pairs of one prompt, say, drawn together: they are not independent of one another."""
        return replace(self, groups=groups)

    def select(self, chosen: NDArray[np.bool_]) -> Statistics:
        """Of some of the examples."""
        examples, groups = (None if array is None else array[chosen] for array in (self.examples, self.groups))
        return replace(self, rows=self.rows[chosen], examples=examples, groups=groups)

    def value(self) -> float:
        """The score of all examples."""
        return float(self.score(self.rows.sum(0)[None])[0])

    def per_example(self) -> Array:
        """The score of each example [N]."""
        return self.score(self.rows) if self.examples is None else self.examples

    def drawn(self) -> Array:
        """The sums [G, K] over what is drawn together: the rows themselves, or those of each group."""
        return self.rows if self.groups is None else _by_group(self.rows, self.groups)

    def resampled(self) -> Array:
        """Scores of as many resamples as `RESAMPLES`."""
        return self.score(_resampled_sums(self.drawn()))


def estimates(figures: Mapping[str, Statistics]) -> dict[str, Estimate]:
    """Several scores of the same examples, in the same groups, with their intervals: they are drawn once for all."""
    drawn = {name: figure.drawn() for name, figure in figures.items()}
    if not drawn:
        return {}
    sums = _resampled_sums(np.concatenate(list(drawn.values()), axis=1))
    found, start = {}, 0
    for name, figure in figures.items():
        end = start + drawn[name].shape[1]
        low, high = _interval(figure.score(sums[:, start:end]))
        found[name] = Estimate(value=figure.value(), low=low, high=high)
        start = end
    return found


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much higher one score of the same examples is than another."""

    value: float
    low: float
    high: float
    p: float  # two-sided: how often chance alone makes a difference as large


def difference(first: Statistics, other: Statistics) -> Difference:
    """`other` minus `first`, over the same resamples of both.

    p is the share of resamples whose difference lies as far from their mean as that of all examples lies from zero
    (Riezler and Maxwell 2005), the sample itself counted among them.
    """
    differences = other.resampled() - first.resampled()
    value = other.value() - first.value()
    low, high = _interval(differences)
    # Differences of like sums are equal but for rounding.
    as_far = np.abs(differences - differences.mean()) >= abs(value) * (1 - 1e-9)
    return Difference(value=value, low=low, high=high, p=(int(as_far.sum()) + 1) / (RESAMPLES + 1))


def _interval(scores: Array) -> tuple[float, float]:
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(scores, [tail, 100 - tail])
    return float(low), float(high)


def _by_group(rows: Array, groups: NDArray[Any]) -> Array:
    """The sums [G, K] of rows with the same number."""
    _, numbers = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(numbers.max()) + 1, rows.shape[1]))
    np.add.at(sums, numbers, rows)
    return sums


def _resampled_sums(rows: Array) -> Array:
    """Sums [R, K] of N rows drawn from N with replacement, R times over."""
    count = len(rows)
    generator = np.random.default_rng(_SEED)
    found = []
    at_once = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = generator.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        found.append(times.astype(np.float64) @ rows)
    return np.concatenate(found)
