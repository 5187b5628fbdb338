"""Every loss by name: its parameters and defaults; and losses of a user's own.

A loss's formula is the function of its name in `formulas.py`, which is imported when a loss is first computed: a
configuration is checked without torch.
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches

from open_po.losses.mix import Loss
from open_po.losses.spec import Choice, LossSpec, Number, Parameter, Value
from open_po.losses.types import Counts, LossOutput, PairLogps


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
        parameters={**_beta(), **_SMOOTHING, "reference_free": Choice((False, True)), **_DIVERGENCE},
        reference_free_if={"reference_free": True},
    ),
    LossSpec(name="dpo_norm", parameters={**_beta(5.0), **_SMOOTHING}),
    LossSpec(
        name="dpo_gamma",
        parameters={**_beta(), "gamma": _number(0.5, low=0.0), **_SMOOTHING, **_DIVERGENCE},
    ),
    LossSpec(name="slic_dpo", formula="hinge", parameters={**_beta(), **_DELTA, **_DIVERGENCE}),
    LossSpec(name="hinge", parameters={**_beta(), **_DELTA, **_DIVERGENCE}),
    LossSpec(name="ipo", parameters={**_beta(), "convention": Choice(("mean", "sum"))}),
    LossSpec(
        name="simpo",
        parameters={**_beta(2.0), "gamma": _number(0.5, low=0.0), **_SMOOTHING},
        takes_reference=False,
    ),
    LossSpec(name="cpo", parameters={**_beta(), **_SMOOTHING, **_SFT}, takes_reference=False),
    LossSpec(name="slic", parameters={**_beta(), **_DELTA, **_SFT}, takes_reference=False),
    LossSpec(
        name="orpo",
        parameters={
            **_beta(),
            "nll": Choice(("token_mean_completion", "token_mean_prompt_and_completion", "sequence_mean")),
        },
        takes_reference=False,
        extras_if={("nll", "token_mean_prompt_and_completion"): "prompt"},
    ),
    LossSpec(
        name="kto_pair",
        parameters={**_beta(), "convention": Choice(("kl_detached", "kl_in_graph"))},
        batch_coupled=True,
    ),
    LossSpec(
        name="wpo",
        parameters={**_beta(), "convention": Choice(("aligned", "mean_logp")), "weight_clamp": Choice((False, True))},
        extras_if={("convention", "aligned"): "log_sum_sq"},
    ),
    LossSpec(
        name="sft",
        parameters={"convention": Choice(("token_mean", "sequence_sum"))},
        takes_reference=False,
        needs_rejected=False,
    ),
    LossSpec(
        name="robust",
        parameters={**_beta(), "label_smoothing": _number(0.0, low=0.0, high=0.5, high_open=True), **_DIVERGENCE},
    ),
    LossSpec(
        name="exo_pair",
        parameters={
            **_beta(),
            "label_smoothing": _number(1e-3, low=0.0, low_open=True, high=0.5),
            **_DIVERGENCE,
        },
    ),
    LossSpec(name="nca_pair", parameters=_beta()),
    LossSpec(
        name="bco_pair",
        parameters={**_beta(), "convention": Choice(("reward_shift", "reward_shift_first_step", "no_shift"))},
        batch_coupled=True,
        uncoupled_if={"convention": "no_shift"},
        running_mean_if={"convention": "reward_shift"},
    ),
    LossSpec(name="sppo_hard", parameters=_beta()),
    LossSpec(name="aot", parameters={**_beta(), **_SMOOTHING}, batch_coupled=True),
    LossSpec(name="aot_unpaired", parameters={**_beta(), **_SMOOTHING}, batch_coupled=True),
    LossSpec(name="apo_zero", parameters=_beta()),
    LossSpec(name="apo_down", parameters=_beta()),
    LossSpec(
        name="discopop",
        parameters={**_beta(), "discopop_tau": _number(0.05, low=0.0, low_open=True), **_DIVERGENCE},
    ),
    LossSpec(name="f_dpo", parameters={**_beta(), **_DIVERGENCE}),
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
    try:
        signature = inspect.signature(LossSpec(name=name, parameters={}).fn)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss_type {name}: cannot be imported ({error})") from error
    parameters: dict[str, Parameter] = {}
    for argument in signature.parameters.values():
        if argument.kind is argument.KEYWORD_ONLY:
            if not isinstance(argument.default, int | float) or isinstance(argument.default, bool):
                raise ValueError(f"loss_type {name}: its parameter {argument.name} needs a number as default")
            parameters[argument.name] = _number(float(argument.default))
    return LossSpec(name=name, parameters=parameters, takes_reference="reference" in signature.parameters)


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
