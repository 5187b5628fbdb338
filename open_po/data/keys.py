"""Arrays of 16-byte keys: millions of them are numbered and compared in a moment."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def key_numbers(keys: NDArray[np.void]) -> NDArray[np.int64]:
    """Small numbers, equal where `keys` [N] are, in the order in which they appear."""
    halves = _halves(keys)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1)
    firsts = order[begins]  # the sort is stable
    ranks = np.empty(len(firsts), dtype=np.int64)
    ranks[np.argsort(firsts)] = np.arange(len(firsts))
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = ranks[np.cumsum(begins) - 1]
    return numbers


def may_be_among(keys: NDArray[np.void], others: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which of `keys` may be among `others`, by the first half of each: those that are not surely are not."""
    found: NDArray[np.bool_] = np.isin(_halves(keys)[:, 0], _halves(others)[:, 0])
    return found.reshape(keys.shape)


def _halves(keys: NDArray[np.void]) -> NDArray[np.uint64]:
    """[N, 2] of all keys."""
    halves: NDArray[np.uint64] = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    return halves
