"""Figures that say how far they might be off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure of a sample, and the interval that its true value lies in, 95 of 100 times."""

    value: float
    low: float
    high: float

    def interval(self, form: str) -> str:
        """`38.1 to 46.2`, each number in `form`; examples that are all alike tell of no interval."""
        return f"{self.low:{form}} to {self.high:{form}}" if self.low < self.high else "all alike"

    def text(self, form: str) -> str:
        """`42.0 (38.1 to 46.2)`."""
        return f"{self.value:{form}} ({self.interval(form)})"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some pairs and their figures."""

    pairs: int
    figures: dict[str, Estimate]  # by the metric's name

    @staticmethod
    def of(content: Mapping[str, Any]) -> Group:
        """From its JSON. Raises KeyError, TypeError, AttributeError."""
        figures = {name: Estimate(**estimate) for name, estimate in content["figures"].items()}
        return Group(pairs=content["pairs"], figures=figures)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Preference metrics of pairs with their intervals: of all, and of the parts of them that a person asks for."""

    all: Group
    by_source: dict[str, Group]  # by the data set's name in the mixture
    by_length: dict[str, Group]  # quarters of the pairs, by the tokens of their longer response
    by_longer: dict[str, Group]  # by which response has more tokens

    @staticmethod
    def of(content: Mapping[str, Any]) -> Groups:
        """From its JSON. Raises KeyError, TypeError, AttributeError."""

        def parts(name: str) -> dict[str, Group]:
            return {label: Group.of(part) for label, part in content[name].items()}

        return Groups(
            all=Group.of(content["all"]),
            by_source=parts("by_source"),
            by_length=parts("by_length"),
            by_longer=parts("by_longer"),
        )

    def parts(self) -> dict[str, Group]:
        """The parts that say more than the whole does, by label: no source if there is but one."""
        several = self.by_source if len(self.by_source) > 1 else {}
        return {**several, **(self.by_length if len(self.by_length) > 1 else {}), **self.by_longer}
