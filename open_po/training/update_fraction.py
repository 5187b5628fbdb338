"""Which share of the trained weights a step changes, found from a fixed sample of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_po.distributed.engine import Engine, Held
from open_po.distributed.runtime import Runtime

# Of all ranks together: the share is then known to 0.002, and a copy of the sample takes no memory to speak of.
_SAMPLED = 2**16


@dataclass(frozen=True)
class WeightSample:
    """Every k-th of the trained weights, as they were when the sample was taken.

    Every weight is as likely to be in it as any other, so the share that changed is right on average. What an
    optimizer keeps of a weight besides belongs to the weight.
    """

    engine: Engine
    before: list[Tensor]

    @staticmethod
    def take(engine: Engine) -> WeightSample:
        """Sample this rank's part of the weights."""
        return WeightSample(engine, _sampled(engine.held()))

    def changed(self, runtime: Runtime) -> float:
        """The share, 0 to 1, of weights that have another value now; all ranks call this."""
        counts: dict[torch.device, Tensor] = {}
        for old, new in zip(self.before, _sampled(self.engine.held()), strict=True):
            differ = (old != new).any(-1).sum()
            counts[old.device] = counts[old.device] + differ if old.device in counts else differ
        mine = sum(int(count) for count in counts.values()), sum(len(old) for old in self.before)
        changed, seen = map(sum, zip(*runtime.gather(mine), strict=True))
        return changed / seen if seen else 0.0


def _sampled(held: list[Held]) -> list[Tensor]:
    """The sample of each weight, with what is kept besides (0: nothing): [S, 2]."""
    # Odd, so that it is not always the same columns of a matrix.
    every = -(-sum(weight.whole for weight in held) // _SAMPLED) | 1
    found, passed = [], 0
    for weight in held:
        first = -passed % every
        sample = weight.values[first::every].float()
        besides = None if weight.compensation is None else weight.compensation[first::every].float()
        found.append(torch.stack([sample, torch.zeros_like(sample) if besides is None else besides], -1))
        passed += len(weight.values)
    return found
