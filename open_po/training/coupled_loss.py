"""Losses that couple the pairs of a whole optimizer step, or of a whole evaluation, over all packs and ranks.

Such a loss is not a sum over packs. So the log-probs of all its pairs are computed first, without a graph; then the
loss and its derivative to each log-prob; and the derivatives are what a second pass over the packs applies
(`Trainer`). Value and gradient are those of one huge batch, however it was cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_po.losses import Counts, LossMix, MixedLosses, PairLogps

# The fields of PairLogps that a loss has a derivative to.
_DIFFERENTIABLE = ("chosen", "rejected", "prompt")


@dataclass(frozen=True)
class GlobalLoss:
    """The loss of a whole step and its derivative to each pair's log-probs."""

    losses: MixedLosses
    policy: PairLogps
    gradients: dict[int, dict[str, Tensor]]  # by the pair's index and the field of PairLogps

    def surrogate(self, indices: Sequence[int], policy: PairLogps) -> Tensor:
        """A scalar whose gradient to the pairs `indices`, scored again as `policy`, is that of the whole loss."""
        terms = [
            torch.stack([self.gradients[index][name] for index in indices]) * getattr(policy, name)
            for name in self.gradients[indices[0]]
        ]
        return torch.stack(terms).sum()


def global_loss(
    loss: LossMix,
    order: Sequence[int],
    policy: PairLogps,
    reference: PairLogps | None,
    counts: Counts,
    running_means: Sequence[Tensor | None],
) -> GlobalLoss:
    """`loss` of the pairs `order` taken together, and its derivatives."""
    leaves = {
        name: value.detach().requires_grad_()
        for name in _DIFFERENTIABLE
        if (value := getattr(policy, name)) is not None
    }
    with torch.enable_grad():
        losses = loss(dataclasses.replace(policy, **leaves), reference, running_means)
        gradients = torch.autograd.grad(
            losses.value(counts), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    by_pair = {
        index: {name: gradient[position] for name, gradient in zip(leaves, gradients, strict=True)}
        for position, index in enumerate(order)
    }
    return GlobalLoss(losses, policy, by_pair)
