"""What each loss is called, takes and needs; losses with their parameters filled in; mixes of them."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor

from open_po.losses import formulas
from open_po.losses.types import Counts, LossOutput, PairLogps, PairLosses, not_finite

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
    fn: Callable[..., PairLosses]  # fn(policy, reference, **parameters), without reference if it takes none
    parameters: Mapping[str, Parameter]
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
        values = [weight * part.value(counts) for part, weight in zip(self.parts, self.weights, strict=True)]
        return torch.stack(values).sum()

    @property
    def chosen_rewards(self) -> Tensor:
        """[P] those of the first part, which gives the mix its rewards."""
        return self.parts[0].chosen_rewards

    @property
    def rejected_rewards(self) -> Tensor:
        """[P]"""
        return self.parts[0].rejected_rewards

    def not_finite(self) -> Tensor:
        """[P] whether a pair has a loss that is infinite or not a number."""
        return torch.stack([not_finite(part) for part in self.parts]).any(0)


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


def _number(default: float, **interval: float | bool) -> Number:
    return Number(default=default, **interval)  # type: ignore[arg-type]


def _beta(default: float = 0.1) -> dict[str, Parameter]:
    return {"beta": _number(default, low=0.0, low_open=True)}


_SMOOTHING: dict[str, Parameter] = {"label_smoothing": _number(0.0, low=0.0, high=0.5)}
_DELTA: dict[str, Parameter] = {"delta": _number(1.0, low=0.0, low_open=True)}
_SFT: dict[str, Parameter] = {"lambda_sft": _number(1.0, low=0.0), "sft_type": Choice(("token", "instance"))}
_DIVERGENCE: dict[str, Parameter] = {
    "f_divergence_type": Choice(("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")),
    "f_alpha_divergence_coef": _number(0.5, low=0.0, high=1.0, low_open=True),
}

_SPECS = (
    LossSpec(
        name="dpo",
        fn=formulas.dpo,
        parameters={**_beta(), **_SMOOTHING, "reference_free": Choice((False, True)), **_DIVERGENCE},
        reference_free_if={"reference_free": True},
    ),
    LossSpec(name="dpo_norm", fn=formulas.dpo_norm, parameters={**_beta(5.0), **_SMOOTHING}),
    LossSpec(
        name="dpo_gamma",
        fn=formulas.dpo_gamma,
        parameters={**_beta(), "gamma": _number(0.5, low=0.0), **_SMOOTHING, **_DIVERGENCE},
    ),
    LossSpec(name="slic_dpo", fn=formulas.hinge, parameters={**_beta(), **_DELTA, **_DIVERGENCE}),
    LossSpec(name="hinge", fn=formulas.hinge, parameters={**_beta(), **_DELTA, **_DIVERGENCE}),
    LossSpec(name="ipo", fn=formulas.ipo, parameters={**_beta(), "convention": Choice(("mean", "sum"))}),
    LossSpec(
        name="simpo",
        fn=formulas.simpo,
        parameters={**_beta(2.0), "gamma": _number(0.5, low=0.0), **_SMOOTHING},
        takes_reference=False,
    ),
    LossSpec(name="cpo", fn=formulas.cpo, parameters={**_beta(), **_SMOOTHING, **_SFT}, takes_reference=False),
    LossSpec(name="slic", fn=formulas.slic, parameters={**_beta(), **_DELTA, **_SFT}, takes_reference=False),
    LossSpec(
        name="orpo",
        fn=formulas.orpo,
        parameters={
            **_beta(),
            "nll": Choice(("token_mean_completion", "token_mean_prompt_and_completion", "sequence_mean")),
        },
        takes_reference=False,
        extras_if={("nll", "token_mean_prompt_and_completion"): "prompt"},
    ),
    LossSpec(
        name="kto_pair",
        fn=formulas.kto_pair,
        parameters={**_beta(), "convention": Choice(("kl_detached", "kl_in_graph"))},
        batch_coupled=True,
    ),
    LossSpec(
        name="wpo",
        fn=formulas.wpo,
        parameters={**_beta(), "convention": Choice(("aligned", "mean_logp")), "weight_clamp": Choice((False, True))},
        extras_if={("convention", "aligned"): "log_sum_sq"},
    ),
    LossSpec(
        name="sft",
        fn=formulas.sft,
        parameters={"convention": Choice(("token_mean", "sequence_sum"))},
        takes_reference=False,
        needs_rejected=False,
    ),
    LossSpec(
        name="robust",
        fn=formulas.robust,
        parameters={**_beta(), "label_smoothing": _number(0.0, low=0.0, high=0.5, high_open=True), **_DIVERGENCE},
    ),
    LossSpec(
        name="exo_pair",
        fn=formulas.exo_pair,
        parameters={
            **_beta(),
            "label_smoothing": _number(1e-3, low=0.0, low_open=True, high=0.5),
            **_DIVERGENCE,
        },
    ),
    LossSpec(name="nca_pair", fn=formulas.nca_pair, parameters=_beta()),
    LossSpec(
        name="bco_pair",
        fn=formulas.bco_pair,
        parameters={**_beta(), "convention": Choice(("reward_shift", "reward_shift_first_step", "no_shift"))},
        batch_coupled=True,
        uncoupled_if={"convention": "no_shift"},
        running_mean_if={"convention": "reward_shift"},
    ),
    LossSpec(name="sppo_hard", fn=formulas.sppo_hard, parameters=_beta()),
    LossSpec(name="aot", fn=formulas.aot, parameters={**_beta(), **_SMOOTHING}, batch_coupled=True),
    LossSpec(name="aot_unpaired", fn=formulas.aot_unpaired, parameters={**_beta(), **_SMOOTHING}, batch_coupled=True),
    LossSpec(name="apo_zero", fn=formulas.apo_zero, parameters=_beta()),
    LossSpec(name="apo_down", fn=formulas.apo_down, parameters=_beta()),
    LossSpec(
        name="discopop",
        fn=formulas.discopop,
        parameters={**_beta(), "discopop_tau": _number(0.05, low=0.0, low_open=True), **_DIVERGENCE},
    ),
    LossSpec(name="f_dpo", fn=formulas.f_dpo, parameters={**_beta(), **_DIVERGENCE}),
)
LOSSES: dict[str, LossSpec] = {spec.name: spec for spec in _SPECS}


def loss_spec(name: str) -> LossSpec:
    """The spec called `name`, or of the function `module:function`. Raises ValueError naming the closest ones."""
    if ":" in name:
        return _custom_spec(name)
    if name not in LOSSES:
        close = get_close_matches(name, LOSSES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(LOSSES)}"
        raise ValueError(f"loss_type {name!r} is unknown; {hint}")
    return LOSSES[name]


def _custom_spec(name: str) -> LossSpec:
    """The spec of a user's function: its keyword arguments are the loss's parameters (docs/add_a_loss.md)."""
    module, _, function = name.partition(":")
    try:
        fn = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss_type {name}: cannot be imported ({error})") from error
    arguments = inspect.signature(fn).parameters.values()
    parameters: dict[str, Parameter] = {}
    for argument in arguments:
        if argument.kind is argument.KEYWORD_ONLY:
            if not isinstance(argument.default, int | float) or isinstance(argument.default, bool):
                raise ValueError(f"loss_type {name}: its parameter {argument.name} needs a number as default")
            parameters[argument.name] = _number(float(argument.default))
    takes_reference = "reference" in inspect.signature(fn).parameters
    return LossSpec(name=name, fn=fn, parameters=parameters, takes_reference=takes_reference)


def preference_loss(
    name: str, policy: PairLogps, reference: PairLogps | None = None, **parameters: Value
) -> LossOutput:
    """The loss called `name` of one batch taken alone, for people with their own loop.

    Missing parameters take the loss's defaults. Raises ValueError for an unknown loss, a parameter it does not take or
    that lies outside its range, and a missing reference.
    """
    spec = loss_spec(name)
    pairs = Loss(spec, spec.resolve(parameters))(policy, reference)
    counts = Counts.of(policy)
    loss = pairs.value(counts)
    nll = None if pairs.nll is None else pairs.nll.mean(counts)
    return LossOutput(
        losses=loss.expand_as(pairs.chosen_rewards) if pairs.losses is None else pairs.losses,
        loss=loss,
        nll_loss=nll,
        chosen_rewards=pairs.chosen_rewards,
        rejected_rewards=pairs.rejected_rewards,
        details=pairs.details,
    )
