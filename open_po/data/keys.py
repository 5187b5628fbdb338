"""Arrays of 16-byte keys: millions of them are numbered and compared in a moment."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def key_numbers(keys: NDArray[np.void]) -> NDArray[np.int64]:
    """Small numbers, equal where `keys` [N] are, in the order in which they appear."""
    halves = _halves(keys)
    order = np.argsort(halves[:, 0], kind="stable")
    ordered = halves[order]
    if _have_twins(ordered):  # once in a very long time, if keys are hashes
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


def may_be_shared(keys: NDArray[np.void], others: NDArray[np.void]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of `keys` may be among `others`, and the other way round; the rest surely is not.

    The first half of each is compared, and the larger array is searched first: of a million few are then left.
    """
    mine, theirs = _halves(keys)[:, 0], _halves(others)[:, 0]
    if len(mine) < len(theirs):
        theirs_shared = _are_among(theirs, mine)
        mine_shared = _are_among(mine, theirs[theirs_shared])
    else:
        mine_shared = _are_among(mine, theirs)
        theirs_shared = _are_among(theirs, mine[mine_shared])
    return mine_shared.reshape(keys.shape), theirs_shared.reshape(others.shape)


def _have_twins(ordered: NDArray[np.uint64]) -> bool:
    """Whether keys with equal first halves differ in the second."""
    return bool(((ordered[1:, 0] == ordered[:-1, 0]) & (ordered[1:, 1] != ordered[:-1, 1])).any())


def _are_among(values: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(others):
        return np.zeros(len(values), dtype=bool)
    ordered = np.sort(others)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    found: NDArray[np.bool_] = ordered[places] == values
    return found


def _halves(keys: NDArray[np.void]) -> NDArray[np.uint64]:
    """[N, 2] of all keys."""
    halves: NDArray[np.uint64] = np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
    return halves
