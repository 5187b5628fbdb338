"""What losses take and return. Letters in shapes: P pairs. Log-probs are in nats.

Tensors bring their methods along, so this and the mixes import no torch; the formulas do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What a sum of numerators is divided by, counted over a whole optimizer step.
Divisor = Literal["pairs", "chosen_tokens", "prompt_and_chosen_tokens"]


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Log-probs of P pairs under one model. A response that was not scored has sum 0 and 0 tokens.

    The fields after the first four are None unless a loss asks for them (`LossSpec.extras`).
    """

    chosen: Tensor  # [P] summed log-prob of the chosen response, float32
    rejected: Tensor  # [P]
    chosen_tokens: Tensor  # [P] scored tokens
    rejected_tokens: Tensor  # [P]
    chosen_log_sum_sq: Tensor | None = None  # [P] sum over the response's tokens of log sum_v p(v)^2, no gradient
    rejected_log_sum_sq: Tensor | None = None  # [P]
    prompt: Tensor | None = None  # [P] summed log-prob of the prompt's tokens but the first
    prompt_tokens: Tensor | None = None  # [P] how many those are

    def select(self, indices: Sequence[int], device: torch.device) -> PairLogps:
        """The pairs `indices`, in that order, on `device`."""
        rows = list(indices)
        tensors = {name: value[rows].to(device) for name, value in vars(self).items() if value is not None}
        return PairLogps(**tensors)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much a step, or a batch taken alone, holds: the divisors of its losses."""

    pairs: int | Tensor
    chosen_tokens: int | Tensor
    prompt_and_chosen_tokens: int | Tensor = 0

    @staticmethod
    def of(policy: PairLogps) -> Counts:
        """The counts of a batch taken alone."""
        chosen = policy.chosen_tokens.sum()
        prompts = 0 if policy.prompt_tokens is None else policy.prompt_tokens.sum()
        return Counts(pairs=len(policy.chosen), chosen_tokens=chosen, prompt_and_chosen_tokens=chosen + prompts)

    def get(self, divisor: Divisor) -> int | Tensor:
        value: int | Tensor = getattr(self, divisor)
        return value


@dataclass(frozen=True, kw_only=True)
class NllTerm:
    """A negative log-likelihood added to a preference loss: weight x sum of `sums` / `divisor`."""

    sums: Tensor  # [P]
    divisor: Divisor
    weight: float = 1.0

    def mean(self, counts: Counts) -> Tensor:
        """This batch's part of the term over a step of `counts`, before its weight."""
        return self.sums.sum() / counts.get(self.divisor)


@dataclass(frozen=True, kw_only=True)
class PairLosses:
    """What a loss function returns for P pairs."""

    losses: Tensor | None  # [P], or [2P] where both responses have a loss of their own: chosen first; averaged
    chosen_rewards: Tensor  # [P] detached
    rejected_rewards: Tensor  # [P] detached
    nll: NllTerm | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)  # intermediate values, detached

    def value(self, counts: Counts) -> Tensor:
        """This batch's part of the loss of a step that holds `counts`: parts of a step add up to its loss."""
        pairs = len(self.chosen_rewards)
        value = self.chosen_rewards.new_zeros(())
        if self.losses is not None:
            value = value + self.losses.sum() * (pairs / max(1, len(self.losses))) / counts.pairs
        if self.nll is not None:
            value = value + self.nll.weight * self.nll.mean(counts)
        return value


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """`preference_loss` of one batch taken alone."""

    losses: Tensor  # [P], or [2P]: per-pair preference losses; for a mean over tokens every entry is the mean
    loss: Tensor  # scalar to call backward on
    nll_loss: Tensor | None  # scalar: the likelihood term before its weight, if the loss has one
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P]
    details: Mapping[str, Tensor]  # e.g. KTO's KL estimates, WPO's weights, BCO's shift


def not_finite(losses: PairLosses) -> Tensor:
    """Whether [P] a pair's loss, likelihood or rewards are infinite or not a number."""
    pairs = len(losses.chosen_rewards)
    bad = ~(losses.chosen_rewards.isfinite() & losses.rejected_rewards.isfinite())
    if losses.losses is not None:
        bad = bad | ~losses.losses.detach().view(-1, pairs).isfinite().all(0)
    if losses.nll is not None:
        bad = bad | ~losses.nll.sums.detach().isfinite()
    return bad
