"""Losses with their parameters filled in, and weighted sums of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add, or_
from typing import TYPE_CHECKING

from open_po.losses.spec import Extra, LossSpec, Value
from open_po.losses.types import Counts, PairLogps, PairLosses, not_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A spec with its parameters filled in, and its weight in a mix."""

    spec: LossSpec
    parameters: Mapping[str, Value] = field(default_factory=dict)
    weight: float = 1.0

    def _holds(self, conditions: Mapping[str, Value]) -> bool:
        return any(self.parameters.get(name) == value for name, value in conditions.items())

    @property
    def needs_reference(self) -> bool:
        return self.spec.takes_reference and not self._holds(self.spec.reference_free_if)

    @property
    def batch_coupled(self) -> bool:
        return self.spec.batch_coupled and not self._holds(self.spec.uncoupled_if)

    @property
    def keeps_running_mean(self) -> bool:
        """Whether the loss takes the mean of all its rewards so far as `running_mean`."""
        return self._holds(self.spec.running_mean_if)

    @property
    def extras(self) -> set[Extra]:
        """The optional fields of `PairLogps` that the loss reads."""
        return {extra for condition, extra in self.spec.extras_if.items() if self._holds(dict([condition]))}

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None, running_mean: Tensor | None = None
    ) -> PairLosses:
        """Losses and rewards of P pairs. Raises ValueError if a needed reference is missing."""
        state = {"running_mean": running_mean} if self.keeps_running_mean else {}
        if not self.spec.takes_reference:
            return self.spec.fn(policy, **self.parameters, **state)
        if reference is None and self.needs_reference:
            raise ValueError(f"loss {self.spec.name} needs reference log-probs")
        return self.spec.fn(policy, reference if self.needs_reference else None, **self.parameters, **state)


@dataclass(frozen=True)
class MixedLosses:
    """What a mix returns for P pairs: each part's losses, in the mix's order."""

    names: Sequence[str]
    parts: Sequence[PairLosses]
    weights: Sequence[float]

    def value(self, counts: Counts) -> Tensor:
        """This batch's part of the weighted loss of a step that holds `counts`."""
        return reduce(add, (weight * part.value(counts) for part, weight in zip(self.parts, self.weights, strict=True)))

    @property
    def chosen_rewards(self) -> Tensor:
        """The rewards [P] of the chosen responses by the first part, which gives the mix its rewards."""
        return self.parts[0].chosen_rewards

    @property
    def rejected_rewards(self) -> Tensor:
        """The rewards [P] of the rejected responses by the first part."""
        return self.parts[0].rejected_rewards

    def not_finite(self) -> Tensor:
        """Whether [P] a pair has a loss that is infinite or not a number."""
        return reduce(or_, map(not_finite, self.parts))


@dataclass(frozen=True)
class LossMix:
    """Losses added up with weights; a single loss is a mix of one."""

    parts: tuple[Loss, ...]
    ld_alpha: float = 1.0  # weight of a longer response's tokens beyond the shorter's length, in all log-probs

    @property
    def names(self) -> list[str]:
        """The parts' names, a repeated one numbered."""
        names = [part.spec.name for part in self.parts]
        return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]

    @property
    def needs_reference(self) -> bool:
        return any(part.needs_reference for part in self.parts)

    @property
    def needs_rejected(self) -> bool:
        return any(part.spec.needs_rejected for part in self.parts)

    @property
    def batch_coupled(self) -> bool:
        return any(part.batch_coupled for part in self.parts)

    @property
    def extras(self) -> set[Extra]:
        return {extra for part in self.parts for extra in part.extras}

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None, running_means: Sequence[Tensor | None] | None = None
    ) -> MixedLosses:
        """Losses of P pairs. `running_means` has one entry per part, for the parts that keep one."""
        means = running_means or [None] * len(self.parts)
        losses = [part(policy, reference, mean) for part, mean in zip(self.parts, means, strict=True)]
        return MixedLosses(self.names, losses, [part.weight for part in self.parts])
