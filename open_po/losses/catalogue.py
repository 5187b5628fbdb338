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


def _arxiv(*numbers: str) -> str:
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)


# The letters of the formulas, in Markdown.
NOTATION = (
    "`w`, `l` the policy's log-prob of the chosen and the rejected response, summed over its tokens; `a`, `d` the same "
    "minus the reference's; `n` a response's token count; `D = a - d`; `s` the logistic function; `L(z) = -log s(z)`; "
    "`e` = `label_smoothing`; `C(z) = (1 - e) L(z) + e L(-z)`; NLL the negative log-prob of the chosen responses."
)
# g(x) by `f_divergence_type`: in place of `D` stands `g(a) - g(d)`.
DIVERGENCES = {
    "reverse_kl": "x",
    "forward_kl": "1 - exp(-x)",
    "js_divergence": "log 2 - L(x)",
    "alpha_divergence": "(1 - exp(-alpha x)) / alpha",
}

_SMOOTHING: dict[str, Parameter] = {"label_smoothing": _number(0.0, low=0.0, high=0.5)}
_DELTA: dict[str, Parameter] = {"delta": _number(1.0, low=0.0, low_open=True)}
_SFT: dict[str, Parameter] = {"lambda_sft": _number(1.0, low=0.0), "sft_type": Choice(("token", "instance"))}
_DIVERGENCE: dict[str, Parameter] = {
    "f_divergence_type": Choice(tuple(DIVERGENCES)),
    "f_alpha_divergence_coef": _number(0.5, low=0.0, high=1.0, low_open=True),
}

_SPECS = (
    LossSpec(
        name="dpo",
        formula="`C(beta D)`; `reference_free`: `C(beta (w - l))`",
        rewards="`beta a`, `beta d` (`beta w`, `beta l`)",
        paper=_arxiv("2305.18290"),
        parameters={**_beta(), **_SMOOTHING, "reference_free": Choice((False, True)), **_DIVERGENCE},
        reference_free_if={"reference_free": True},
    ),
    LossSpec(
        name="dpo_norm",
        formula="`C(beta (a/n - d/n))`",
        rewards="`beta a/n`, `beta d/n`",
        paper=_arxiv("2411.15124"),
        parameters={**_beta(5.0), **_SMOOTHING},
    ),
    LossSpec(
        name="dpo_gamma",
        formula="`C(beta D - gamma)`",
        paper="M. Santos' thesis; cf. " + _arxiv("2402.10571"),
        parameters={**_beta(), "gamma": _number(0.5, low=0.0), **_SMOOTHING, **_DIVERGENCE},
    ),
    LossSpec(
        name="slic_dpo",
        formula="`max(0, delta - beta D)`",
        paper=_arxiv("2305.10425", "2309.06657"),
        function="hinge",
        parameters={**_beta(), **_DELTA, **_DIVERGENCE},
    ),
    LossSpec(
        name="hinge",
        formula="`max(0, delta - beta D)`",
        paper=_arxiv("2305.10425", "2309.06657"),
        parameters={**_beta(), **_DELTA, **_DIVERGENCE},
    ),
    LossSpec(
        name="ipo",
        formula="`(D - 1/(2 beta))^2`, `D` per token (`mean`) or not (`sum`)",
        paper=_arxiv("2310.12036"),
        parameters={**_beta(), "convention": Choice(("mean", "sum"))},
    ),
    LossSpec(
        name="simpo",
        formula="`C(beta (w/n - l/n) - gamma)`",
        rewards="`beta w/n`, `beta l/n`",
        paper=_arxiv("2405.14734"),
        parameters={**_beta(2.0), "gamma": _number(0.5, low=0.0), **_SMOOTHING},
        takes_reference=False,
    ),
    LossSpec(
        name="cpo",
        formula="`C(beta (w - l)) + lambda NLL`",
        rewards="`beta w`, `beta l`",
        paper=_arxiv("2401.08417"),
        parameters={**_beta(), **_SMOOTHING, **_SFT},
        takes_reference=False,
    ),
    LossSpec(
        name="slic",
        formula="`max(0, delta - beta (w - l)) + lambda NLL`",
        rewards="`beta w`, `beta l`",
        paper=_arxiv("2305.10425", "2210.00045"),
        parameters={**_beta(), **_DELTA, **_SFT},
        takes_reference=False,
    ),
    LossSpec(
        name="orpo",
        formula="`beta L(o) + NLL`, `o = log odds(w/n) - log odds(l/n)`",
        rewards="`beta w/n`, `beta l/n`",
        paper=_arxiv("2403.07691"),
        parameters={
            **_beta(),
            "nll": Choice(("token_mean_completion", "token_mean_prompt_and_completion", "sequence_mean")),
        },
        takes_reference=False,
        extras_if={("nll", "token_mean_prompt_and_completion"): "prompt"},
    ),
    LossSpec(
        name="kto_pair",
        formula=(
            "`1 - s(beta (a - KLl))` and `1 - s(beta (KLw - d))`, averaged; "
            "`KLw = max(0, mean a)`, `KLl = max(0, mean d)` over the step"
        ),
        paper=_arxiv("2402.01306"),
        parameters={**_beta(), "convention": Choice(("kl_detached", "kl_in_graph"))},
        batch_coupled=True,
    ),
    LossSpec(
        name="wpo",
        formula=(
            "`W L(beta D)`, `W` constant: `exp((w - q)/n + (l - q)/n)` (`aligned`), "
            "`q` the sum of `log sum_v p(v)^2`, or `exp(w/n + l/n)` (`mean_logp`)"
        ),
        paper=_arxiv("2406.11827"),
        parameters={**_beta(), "convention": Choice(("aligned", "mean_logp")), "weight_clamp": Choice((False, True))},
        extras_if={("convention", "aligned"): "log_sum_sq"},
    ),
    LossSpec(
        name="sft",
        formula="NLL per chosen token of the step (`token_mean`) or per pair (`sequence_sum`)",
        rewards="`w/n`, `l/n`",
        parameters={"convention": Choice(("token_mean", "sequence_sum"))},
        takes_reference=False,
        needs_rejected=False,
    ),
    LossSpec(
        name="robust",
        formula="`((1 - e) L(beta D) - e L(-beta D)) / (1 - 2e)`",
        paper=_arxiv("2403.00409"),
        parameters={**_beta(), "label_smoothing": _number(0.0, low=0.0, high=0.5, high_open=True), **_DIVERGENCE},
    ),
    LossSpec(
        name="exo_pair",
        formula="`s(z)(log s(z) - log(1 - e)) + s(-z)(log s(-z) - log e)`, `z = beta D`",
        paper=_arxiv("2402.00856"),
        parameters={
            **_beta(),
            "label_smoothing": _number(1e-3, low=0.0, low_open=True, high=0.5),
            **_DIVERGENCE,
        },
    ),
    LossSpec(
        name="nca_pair",
        formula="`L(beta a) + L(-beta a)/2 + L(-beta d)/2`",
        paper=_arxiv("2402.05369"),
        parameters=_beta(),
    ),
    LossSpec(
        name="bco_pair",
        formula=(
            "`L(beta a - delta) + L(-(beta d - delta))`; `delta` the mean of all rewards so far "
            "(`reward_shift`), of the step's (`reward_shift_first_step`), or 0 (`no_shift`)"
        ),
        paper=_arxiv("2404.04656"),
        parameters={**_beta(), "convention": Choice(("reward_shift", "reward_shift_first_step", "no_shift"))},
        batch_coupled=True,
        uncoupled_if={"convention": "no_shift"},
        running_mean_if={"convention": "reward_shift"},
    ),
    LossSpec(
        name="sppo_hard",
        formula="`(a - 1/(2 beta))^2 + (d + 1/(2 beta))^2`",
        paper=_arxiv("2405.00675"),
        parameters=_beta(),
    ),
    LossSpec(
        name="aot",
        formula="sort `w - l` and the reference's over the step; `C(beta x difference of equal ranks)`",
        paper=_arxiv("2406.05882"),
        parameters={**_beta(), **_SMOOTHING},
        batch_coupled=True,
    ),
    LossSpec(
        name="aot_unpaired",
        formula="sort `a` and `d` over the step; `C(beta x difference of equal ranks)`",
        paper=_arxiv("2406.05882"),
        parameters={**_beta(), **_SMOOTHING},
        batch_coupled=True,
    ),
    LossSpec(
        name="apo_zero",
        formula="`1 - s(beta a) + s(beta d)`",
        paper=_arxiv("2408.06266"),
        parameters=_beta(),
    ),
    LossSpec(
        name="apo_down",
        formula="`s(beta a) + 1 - s(beta D)`",
        paper=_arxiv("2408.06266"),
        parameters=_beta(),
    ),
    LossSpec(
        name="discopop",
        formula="`(1 - m) L(z) + m exp(-z)`, `z = beta D`, `m = s(z / tau)`",
        paper=_arxiv("2406.08414"),
        parameters={**_beta(), "discopop_tau": _number(0.05, low=0.0, low_open=True), **_DIVERGENCE},
    ),
    LossSpec(
        name="f_dpo",
        formula="`L(beta (g(a) - g(d)))`",
        paper=_arxiv("2309.16240"),
        parameters={**_beta(), **_DIVERGENCE},
    ),
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
        fn = LossSpec(name=name, parameters={}).fn
        signature = inspect.signature(fn)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss_type {name}: cannot be imported ({error})") from error
    parameters: dict[str, Parameter] = {}
    for argument in signature.parameters.values():
        if argument.kind is argument.KEYWORD_ONLY:
            if not isinstance(argument.default, int | float) or isinstance(argument.default, bool):
                raise ValueError(f"loss_type {name}: its parameter {argument.name} needs a number as default")
            parameters[argument.name] = _number(float(argument.default))
    takes_reference = "reference" in signature.parameters
    said = (inspect.getdoc(fn) or "").partition("\n")[0]
    return LossSpec(name=name, formula=said, rewards="", parameters=parameters, takes_reference=takes_reference)


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
