"""Metrics of preference pairs, summed over packs and ranks."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from open_po.distributed.runtime import Runtime
from open_po.losses import Counts, MixedLosses, PairLogps
from open_po.output.metrics import (
    AUX_LOSS,
    CHOSEN_LOGPS,
    CHOSEN_REWARDS,
    LOSS,
    REJECTED_LOGPS,
    REJECTED_REWARDS,
    REWARD_ACCURACY,
    REWARD_AVERAGE,
    REWARD_MARGIN,
    Metrics,
)

# Rewards closer than this are a tie: log-probs near -1000 nats carry rounding of that size, and a policy that still is
# its reference would win or lose by it.
_TIE = 1e-4


def wins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen reward is the greater, 0.5 where they are a tie, else 0: [P]."""
    return torch.where((chosen - rejected).abs() < _TIE, 0.5, (chosen > rejected).float())


class PreferenceMeter:
    """Sums the metrics of preference pairs over packs; `means` reduces them over ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, policy: PairLogps, losses: MixedLosses, counts: Counts) -> None:
        """Add one pack of a step, or of an evaluation, that holds `counts`."""
        chosen, rejected = losses.chosen_rewards, losses.rejected_rewards
        found = {
            LOSS: losses.value(counts),
            CHOSEN_LOGPS: policy.chosen,
            REJECTED_LOGPS: policy.rejected,
            CHOSEN_REWARDS: chosen,
            REJECTED_REWARDS: rejected,
            REWARD_ACCURACY: wins(chosen, rejected),
            "pairs": torch.ones_like(chosen),
            "rejected_pairs": (policy.rejected_tokens > 0).float(),
        }
        if len(losses.parts) > 1:
            parts = zip(losses.names, losses.parts, strict=True)
            found |= {f"{LOSS}/{name}": part.value(counts) for name, part in parts}
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum()

    def add_aux(self, loss: Tensor) -> None:
        """Add one pack's part of its step's load balancing loss."""
        self.sums[AUX_LOSS] = self.sums.get(AUX_LOSS, 0) + loss.detach().double()

    def means(self, runtime: Runtime, steps: int = 1) -> Metrics:
        """Metrics over all ranks; losses are means over `steps` steps, the others are means over pairs.

        A reward tie counts half in `rewards/accuracy`. Where rejected responses were not scored, what needs them is
        left out. A mix adds each part's loss as `loss/NAME`, before its weight. Afterwards the meter is empty.
        """
        total: dict[str, float] = defaultdict(float)
        for sums in runtime.gather({name: float(value) for name, value in self.sums.items()}):
            for name, value in sums.items():
                total[name] += value
        self.sums = {}
        pairs = total["pairs"]
        metrics = {name: total[name] / steps for name in total if name.startswith((LOSS, AUX_LOSS))}
        metrics |= {name: total[name] / pairs for name in _PAIR_MEANS}
        if total["rejected_pairs"] == pairs:
            metrics |= {name: total[name] / pairs for name in _BOTH_SIDES}
            metrics[REWARD_AVERAGE] = (metrics[CHOSEN_REWARDS] + metrics[REJECTED_REWARDS]) / 2
            metrics[REWARD_MARGIN] = metrics[CHOSEN_REWARDS] - metrics[REJECTED_REWARDS]
        return metrics


_PAIR_MEANS = (CHOSEN_LOGPS, CHOSEN_REWARDS)
_BOTH_SIDES = (REJECTED_LOGPS, REJECTED_REWARDS, REWARD_ACCURACY)
