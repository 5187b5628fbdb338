"""A metric over the steps, with no more points than a page can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeGuard

import numpy as np

from open_po.output.metrics import STEP, Metrics


@dataclass(frozen=True, kw_only=True)
class Series:
    """A metric at the steps at which it was written."""

    steps: list[int]
    values: list[float]

    def finite(self) -> Series:
        """The values that can be drawn."""
        kept = np.flatnonzero(np.isfinite(np.asarray(self.values, dtype=float)))
        return self._at(kept)

    def _at(self, kept: Iterable[int]) -> Series:
        return Series(steps=[self.steps[at] for at in kept], values=[self.values[at] for at in kept])

    def thinned(self, most: int) -> Series:
        """At most `most` points: the first, the last, and of every stretch between them the lowest and the highest."""
        return self._at(_extremes(self.values, most))

    def mean(self, window: int, most: int) -> Series:
        """At `most` evenly spaced points, the mean of the last `window` values up to each, none of them left out."""
        values = np.asarray(self.values)
        at = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
        means = [float(values[max(0, end + 1 - window) : end + 1].mean()) for end in at]
        return Series(steps=[self.steps[end] for end in at], values=means)


def all_series(records: Sequence[Metrics]) -> dict[str, Series]:
    """Every metric of some records, infinities and what is no number among its values."""
    found: dict[str, Series] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float):
                series = found.get(name)
                if series is None:
                    series = found[name] = Series(steps=[], values=[])
                series.steps.append(int(record[STEP]))
                series.values.append(value)
    return found


def is_number(value: object) -> TypeGuard[float]:
    """Whether a record's value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _extremes(values: Sequence[float], most: int) -> list[int]:
    """Which points `thinned` keeps, in order."""
    if len(values) <= most:
        return list(range(len(values)))
    array = np.asarray(values)
    edges = np.linspace(1, len(values) - 1, max(1, (most - 2) // 2) + 1).round().astype(int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(edges):
        stretch = array[start:end]
        kept |= {int(start + stretch.argmin()), int(start + stretch.argmax())}
    return sorted(kept)
