"""Which pairs each optimizer step trains on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws pairs in a new order every epoch, from the seed and the epoch alone.

    It keeps no state, so a resumed run needs nothing but the step number. An epoch's last step may be smaller. With
    `prompt_numbers` [P] it draws whole prompts, with all their pairs.
    """

    num_pairs: int
    global_batch: int  # pairs
    seed: int
    prompt_numbers: NDArray[np.int64] | None = None  # equal for pairs of one prompt
    _orders: dict[int, NDArray[np.int64]] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_pairs // self.global_batch)

    def step_pairs(self, step: int) -> list[int]:
        """Indices of the pairs of step `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices: list[int] = self._order(epoch)[position * self.global_batch :][: self.global_batch].tolist()
        return indices

    def epochs(self, steps: int) -> float:
        """Epochs done after `steps` steps."""
        whole, rest = divmod(steps, self.steps_per_epoch)
        return whole + min(rest * self.global_batch, self.num_pairs) / self.num_pairs

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders.clear()  # steps come in order: one epoch's is enough
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_pairs, generator=generator).numpy()
            if self.prompt_numbers is not None:
                order = _by_prompt(order, self.prompt_numbers, self.global_batch)
            self._orders[epoch] = order
        return self._orders[epoch]


def _by_prompt(order: NDArray[np.int64], prompt_numbers: NDArray[np.int64], global_batch: int) -> NDArray[np.int64]:
    """`order` with the pairs of a prompt together, so that steps of `global_batch` pairs hold whole prompts.

    Prompts come in the order of their first pair, but what does not fit in the rest of a step lets later prompts that
    do go first. One that is larger than a step, or begins where nothing fits, goes on in the next.
    """
    _, firsts, group, sizes = np.unique(
        prompt_numbers[order], return_index=True, return_inverse=True, return_counts=True
    )
    turns = np.argsort(firsts)  # the groups in the order of their first pair
    rank = np.empty_like(turns)
    rank[turns] = np.arange(len(turns))
    pairs, sizes = order[np.argsort(rank[group], kind="stable")], sizes[turns]
    waiting = {int(size): deque(np.flatnonzero(sizes == size).tolist()) for size in np.unique(sizes)}
    drawn, count = [], 0  # groups, and their pairs
    while waiting:
        room = global_batch - count % global_batch
        fitting = [size for size in waiting if size <= room or room == global_batch]
        size = min(fitting or waiting, key=lambda size: waiting[size][0])
        drawn.append(waiting[size].popleft())
        count += size
        if not waiting[size]:
            del waiting[size]
    place = np.empty(len(drawn), dtype=np.int64)  # of each group among those that are drawn
    place[drawn] = np.arange(len(drawn))
    return pairs[np.argsort(np.repeat(place, sizes), kind="stable")]
