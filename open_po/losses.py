"""Preference losses: pure functions of log-probs, tensors in, tensors out.

Letters in shapes: P pairs. Log-probs are in nats and summed over the response's tokens.

A loss returns one numerator per pair, and its `LossSpec` says what the sum of the numerators is divided by: the number
of pairs, or the number of chosen tokens. Callers sum over every pack and every rank and divide once, so the value of
an optimizer step never depends on how its pairs were cut into packs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Log-probs of P pairs under one model. A response that was not scored has sum 0 and 0 tokens."""

    chosen: Tensor  # [P] summed log-prob of the chosen response, nats, float32
    rejected: Tensor  # [P]
    chosen_tokens: Tensor  # [P] scored tokens
    rejected_tokens: Tensor  # [P]


@dataclass(frozen=True, kw_only=True)
class PairLosses:
    """What a loss function returns for P pairs."""

    numerators: Tensor  # [P]; their sum over a step is divided by the spec's divisor
    chosen_rewards: Tensor  # [P] detached
    rejected_rewards: Tensor  # [P] detached


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """`preference_loss` of one batch taken alone."""

    losses: Tensor  # [P] per-pair losses; for a token mean every entry is the mean
    loss: Tensor  # scalar to call backward on
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A finite number that a loss takes, with its default and the open or closed interval it must lie in."""

    default: float
    low: float = float("-inf")
    high: float = float("inf")
    low_open: bool = False

    def problem(self, name: str, value: float) -> str | None:
        """One line saying why `value` is refused, or None."""
        below = value <= self.low if self.low_open else value < self.low
        if math.isfinite(value) and not below and value <= self.high:
            return None
        closed_low, closed_high = math.isfinite(self.low) and not self.low_open, math.isfinite(self.high)
        interval = f"{'[' if closed_low else '('}{self.low:g}, {self.high:g}{']' if closed_high else ')'}"
        return f"{name} is {value:g} but must lie in {interval}"


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """A loss and what it needs. Callers ask the spec and never compare names."""

    name: str
    fn: Callable[..., PairLosses]  # fn(policy, reference, **parameters); no reference argument if it needs none
    parameters: Mapping[str, Parameter]
    needs_reference: bool = True
    needs_rejected: bool = True  # False: the rejected responses need not be scored in training
    divisor: Literal["pairs", "chosen_tokens"] = "pairs"

    def resolve(self, given: Mapping[str, float]) -> dict[str, float]:
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
    """A spec with its parameters filled in, ready to apply."""

    spec: LossSpec
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> PairLosses:
        """Numerators and rewards of P pairs. Raises ValueError if a needed reference is missing."""
        if not self.spec.needs_reference:
            return self.spec.fn(policy, **self.parameters)
        if reference is None:
            raise ValueError(f"loss {self.spec.name} needs reference log-probs")
        return self.spec.fn(policy, reference, **self.parameters)

    def divisor(self, pairs: int, chosen_tokens: int) -> int:
        """What the summed numerators of a step with so many pairs and chosen tokens are divided by."""
        return pairs if self.spec.divisor == "pairs" else chosen_tokens


def _smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """C(z) = -(1 - e) log s(z) - e log s(-z): the conservative DPO of E. Mitchell's 2023 note."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _with_rewards(numerators: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PairLosses:
    return PairLosses(
        numerators=numerators, chosen_rewards=chosen_rewards.detach(), rejected_rewards=rejected_rewards.detach()
    )


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> PairLosses:
    """DPO: C(beta (a - d)), a and d the policy's log-ratios to the reference (arXiv 2305.18290)."""
    chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
    return _with_rewards(_smoothed_logistic(chosen - rejected, label_smoothing), chosen, rejected)


def dpo_norm(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> PairLosses:
    """Length-normalised DPO of Tulu 3: C(beta (a / n_chosen - d / n_rejected)) (arXiv 2411.15124).

    Rewards are means per token too, as open-instruct logs them.
    """
    chosen = beta * (policy.chosen - reference.chosen) / policy.chosen_tokens
    rejected = beta * (policy.rejected - reference.rejected) / policy.rejected_tokens
    return _with_rewards(_smoothed_logistic(chosen - rejected, label_smoothing), chosen, rejected)


def dpo_gamma(
    policy: PairLogps, reference: PairLogps, *, beta: float, gamma: float, label_smoothing: float
) -> PairLosses:
    """DPO with a margin in reward units: C(beta (a - d) - gamma) (M. Santos' thesis; cf. ODPO, arXiv 2402.10571)."""
    chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
    return _with_rewards(_smoothed_logistic(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def slic_dpo(policy: PairLogps, reference: PairLogps, *, beta: float, delta: float) -> PairLosses:
    """Hinge on the DPO margin: max(0, delta - beta (a - d)) (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
    return _with_rewards(torch.relu(delta - (chosen - rejected)), chosen, rejected)


def sft(policy: PairLogps) -> PairLosses:
    """Negative log-likelihood of the chosen responses, averaged over the chosen tokens of the whole step.

    Without a reference there is no implicit reward; what is logged as rewards is the mean log-prob per token.
    """
    return _with_rewards(
        -policy.chosen,
        policy.chosen / policy.chosen_tokens.clamp(min=1),
        policy.rejected / policy.rejected_tokens.clamp(min=1),
    )


_SMOOTHING = Parameter(default=0.0, low=0.0, high=0.5)


def _beta(default: float) -> Parameter:
    return Parameter(default=default, low=0.0, low_open=True)


LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec(name="dpo", fn=dpo, parameters={"beta": _beta(0.1), "label_smoothing": _SMOOTHING}),
        LossSpec(name="dpo_norm", fn=dpo_norm, parameters={"beta": _beta(5.0), "label_smoothing": _SMOOTHING}),
        LossSpec(
            name="dpo_gamma",
            fn=dpo_gamma,
            parameters={"beta": _beta(0.1), "gamma": Parameter(default=0.5, low=0.0), "label_smoothing": _SMOOTHING},
        ),
        LossSpec(
            name="slic_dpo",
            fn=slic_dpo,
            parameters={"beta": _beta(0.1), "delta": Parameter(default=1.0, low=0.0, low_open=True)},
        ),
        LossSpec(
            name="sft", fn=sft, parameters={}, needs_reference=False, needs_rejected=False, divisor="chosen_tokens"
        ),
    )
}


def loss_spec(name: str) -> LossSpec:
    """The spec called `name`. Raises ValueError naming the closest ones."""
    if name not in LOSSES:
        close = get_close_matches(name, LOSSES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(LOSSES)}"
        raise ValueError(f"loss_type {name!r} is unknown; {hint}")
    return LOSSES[name]


def preference_loss(
    name: str, policy: PairLogps, reference: PairLogps | None = None, **parameters: float
) -> LossOutput:
    """The loss called `name` of one batch, for people with their own loop.

    Missing parameters take the loss's defaults. Raises ValueError for an unknown loss, a parameter it does not take or
    that lies outside its range, and a missing reference.
    """
    spec = loss_spec(name)
    pairs = Loss(spec, spec.resolve(parameters))(policy, reference)
    if spec.divisor == "pairs":
        losses = pairs.numerators
        loss = losses.mean()
    else:
        loss = pairs.numerators.sum() / policy.chosen_tokens.sum()
        losses = loss.expand_as(pairs.numerators)
    return LossOutput(
        losses=losses, loss=loss, chosen_rewards=pairs.chosen_rewards, rejected_rewards=pairs.rejected_rewards
    )
