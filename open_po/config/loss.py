"""The section of the preference loss, and how its fields become losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from open_po.config.field import option
from open_po.losses import Loss, LossMix, LossSpec, Value, loss_spec

Numbers = float | list[float | None] | None
Words = str | list[str | None] | None


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The preference loss, or a weighted mix. A parameter is one value for all that take it, or one for each loss."""

    loss_type: str | list[str] = option(
        "dpo", "a loss, or several to add up; docs/losses.md has all; or MODULE:FUNCTION"
    )
    loss_weights: float | list[float] | None = option(None, "weight of each loss in the mix; default 1")
    beta: Numbers = option(None, "strength of the pull to the reference, or the scale of the margin; default by loss")
    gamma: Numbers = option(None, "dpo_gamma, simpo: margin in reward units; default 0.5")
    delta: Numbers = option(None, "slic_dpo, hinge, slic: hinge margin in reward units; default 1")
    label_smoothing: Numbers = option(None, "share of labels taken to be wrong; default 0, exo_pair 0.001")
    reference_free: bool | list[bool | None] | None = option(None, "dpo: leave the reference out; default false")
    convention: Words = option(None, "which form of ipo, kto_pair, wpo, bco_pair or sft, see docs/losses.md")
    weight_clamp: bool | list[bool | None] | None = option(None, "wpo: keep pair weights at most 1; default false")
    lambda_sft: Numbers = option(None, "cpo, slic: weight of the likelihood term; default 1")
    sft_type: Words = option(None, "cpo, slic: likelihood per token or per instance; default token")
    nll: Words = option(None, "orpo: which likelihood is added; default token_mean_completion")
    discopop_tau: Numbers = option(None, "discopop: temperature of the modulation; default 0.05")
    f_divergence_type: Words = option(
        None, "reverse_kl, forward_kl, js_divergence or alpha_divergence, for losses built on log-ratios"
    )
    f_alpha_divergence_coef: Numbers = option(None, "alpha of alpha_divergence, in (0, 1]; default 0.5")
    ld_alpha: float | None = option(
        None,
        "LD-DPO: weight, 0 to 1, of the longer response's tokens beyond the shorter's length, in every log-prob "
        "that the loss reads; default 1",
    )
    load_balancing_loss: bool = option(
        False, "mixture-of-experts models: add transformers' load balancing loss, of each pack by its share of tokens"
    )
    load_balancing_weight: float = option(
        None, "weight of the load balancing loss; default 0.001", derived=True, above=0, needs="load_balancing_loss"
    )
    loss_parameters: dict[str, str] | None = option(None, "parameters of a loss of your own, NAME: NUMBER")

    @property
    def names(self) -> list[str]:
        """The losses of the mix."""
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    def mix(self) -> LossMix:
        """The losses with their parameters filled in. Raises ValueError with one line per problem."""
        problems: list[str] = []
        specs = [spec for name in self.names if (spec := _known_spec(name, problems)) is not None]
        weights = [1.0] * len(self.names) if self.loss_weights is None else self.loss_weights
        weights = [weights] if isinstance(weights, float) else weights
        if len(weights) != len(self.names):
            problems.append(f"loss_weights: gives {len(weights)} weights for {len(self.names)} losses")
        problems += [f"loss_weights: {weight:g} is not above 0" for weight in weights if not 0 < weight < float("inf")]
        parts: list[Loss] = []
        if len(specs) == len(self.names):
            given = self._given(specs, problems)
            for spec, values, weight in zip(specs, given, weights, strict=False):
                try:
                    parts.append(Loss(spec, spec.resolve(values), weight))
                except ValueError as error:
                    lines = str(error).splitlines()
                    problems += [x if x.startswith("loss_type") else f"loss_type {spec.name}: {x}" for x in lines]
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            problems.append(f"ld_alpha: must lie in [0, 1], got {self.ld_alpha:g}")
        if self.ld_alpha is not None and not all(spec.needs_rejected for spec in specs):
            problems.append("ld_alpha: needs both responses of a pair scored, which sft does not")
        if problems:
            raise ValueError("\n".join(problems))
        return LossMix(tuple(parts), 1.0 if self.ld_alpha is None else self.ld_alpha)

    def _given(self, specs: list[LossSpec], problems: list[str]) -> list[dict[str, Value]]:
        """The parameters that were set, by loss."""
        given: list[dict[str, Value]] = [{} for _ in specs]
        for name in LOSS_PARAMETERS:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(specs):
                problems.append(f"{name}: gives {len(value)} values for {len(specs)} losses; null leaves one out")
            elif isinstance(value, list):
                for values, item in zip(given, value, strict=True):
                    values |= {} if item is None else {name: item}
            elif value is not None:
                takers = [values for values, spec in zip(given, specs, strict=True) if name in spec.parameters]
                for values in takers or given[:1]:  # if none takes it, the first complains
                    values[name] = value
        for name, word in (self.loss_parameters or {}).items():
            own = [values for values, spec in zip(given, specs, strict=True) if spec.is_custom]
            if not own:
                problems.append(f"loss_parameters: {name} belongs to no loss of your own (MODULE:FUNCTION)")
            for values in own:
                try:
                    values[name] = float(word)
                except ValueError:
                    problems.append(f"loss_parameters: {name} is {word!r} but must be a number")
        return given

    def resolved(self) -> LossConfig:
        """The same losses with every parameter written out."""
        mix = self.mix()
        values: dict[str, Any] = {}
        for name in LOSS_PARAMETERS:
            by_part = [part.parameters.get(name) for part in mix.parts]
            if any(value is not None for value in by_part):
                values[name] = by_part[0] if len(by_part) == 1 else by_part
        return dataclasses.replace(self, **values)


_NO_PARAMETERS = (
    "loss_type",
    "loss_weights",
    "loss_parameters",
    "ld_alpha",
    "load_balancing_loss",
    "load_balancing_weight",
)
LOSS_PARAMETERS = tuple(f.name for f in dataclasses.fields(LossConfig) if f.name not in _NO_PARAMETERS)


def _known_spec(name: str, problems: list[str]) -> LossSpec | None:
    try:
        return loss_spec(name)
    except ValueError as error:
        problems.append(str(error))
        return None
