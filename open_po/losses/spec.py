"""What describes a loss: its name, its parameters with their ranges, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from open_po.losses.types import PairLosses

Value = float | str | bool
Extra = Literal["log_sum_sq", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A finite number that a loss takes, with its default and the interval it must lie in."""

    default: float
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def problem(self, name: str, value: Value) -> str | None:
        """One line saying why `value` is refused, or None."""
        if isinstance(value, bool | str):
            return f"{name} is {value!r} but must be a number"
        below = value <= self.low if self.low_open else value < self.low
        above = value >= self.high if self.high_open else value > self.high
        if math.isfinite(value) and not below and not above:
            return None
        closed_low = math.isfinite(self.low) and not self.low_open
        closed_high = math.isfinite(self.high) and not self.high_open
        interval = f"{'[' if closed_low else '('}{self.low:g}, {self.high:g}{']' if closed_high else ')'}"
        return f"{name} is {value:g} but must lie in {interval}"


@dataclass(frozen=True)
class Choice:
    """A word, or true and false, that a loss takes; the first is the default."""

    options: tuple[str, ...] | tuple[bool, ...]

    @property
    def default(self) -> Value:
        return self.options[0]

    def problem(self, name: str, value: Value) -> str | None:
        """One line saying why `value` is refused, or None."""
        if value in self.options and isinstance(value, type(self.default)):
            return None
        return f"{name} is {value!r} but must be one of {', '.join(map(str, self.options))}"


Parameter = Number | Choice


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """A loss and what it needs. Callers ask the spec and never compare names."""

    name: str
    parameters: Mapping[str, Parameter]
    function: str = ""  # the function of formulas.py, if it is not called as the loss is
    # For people, in Markdown, as docs/losses.md has them; letters are those of NOTATION.
    formula: str = ""  # of a pair's loss; of a user's own function, what it says of itself
    rewards: str = "`beta a`, `beta d`"  # of the chosen and the rejected response
    paper: str = ""
    takes_reference: bool = True
    needs_rejected: bool = True  # False: the rejected responses need not be scored in training
    batch_coupled: bool = False  # a pair's loss depends on the other pairs of the step
    # Parameter values under which a loss needs less or more than its other fields say: {parameter: {value: needs}}.
    reference_free_if: Mapping[str, Value] = field(default_factory=dict)
    uncoupled_if: Mapping[str, Value] = field(default_factory=dict)
    extras_if: Mapping[tuple[str, Value], Extra] = field(default_factory=dict)
    running_mean_if: Mapping[str, Value] = field(default_factory=dict)

    @property
    def is_custom(self) -> bool:
        """Whether it is a user's own function, `module:function`."""
        return ":" in self.name

    @property
    def fn(self) -> Callable[..., PairLosses]:
        """What computes it, fn(policy, reference, **parameters), without reference if it takes none.

        Found when it is asked for: formulas need torch, and the rest of a spec does not. Raises ImportError or
        AttributeError if a user's function is not there.
        """
        module, _, function = self.name.partition(":")
        if not self.is_custom:
            module, function = "open_po.losses.formulas", self.function or self.name
        fn: Callable[..., PairLosses] = getattr(import_module(module), function)
        return fn

    def resolve(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Parameters with defaults filled in. Raises ValueError with one line per problem."""
        problems = [
            f"loss_type {self.name} takes no {name}; it takes {', '.join(self.parameters) or 'no parameters'}"
            for name in given
            if name not in self.parameters
        ]
        values = {name: given.get(name, parameter.default) for name, parameter in self.parameters.items()}
        problems += [p for name, value in values.items() if (p := self.parameters[name].problem(name, value))]
        if problems:
            raise ValueError("\n".join(problems))
        return values
