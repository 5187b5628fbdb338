"""Fields of the runs that a plain trainer repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.plain import Scores

Formula = Callable[[Scores, Scores], tuple[Tensor, Tensor, Tensor]]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x): the logistic loss of -x."""
    return torch.log(1 + torch.exp(x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def on_ratios(beta: float, per_pair: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    """A loss of beta times each response's log-ratio; rewards are those products."""

    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
        return per_pair(chosen, rejected), chosen, rejected

    return loss


def on_likelihoods(
    beta: float, per_pair: Callable[[Tensor, Tensor], Tensor], *, means: bool = False, nll: Any = None
) -> Formula:
    """The same without a reference, of sums or of means per token, and with a likelihood term."""

    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen = beta * policy.chosen / (policy.chosen_tokens if means else 1)
        rejected = beta * policy.rejected / (policy.rejected_tokens if means else 1)
        return per_pair(chosen, rejected) + (nll(policy) if nll else 0), chosen, rejected

    return loss


def ipo(beta: float, *, means: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        margin = a / policy.chosen_tokens - d / policy.rejected_tokens if means else a - d
        return (margin - 0.5 / beta) ** 2, beta * a, beta * d

    return loss


def wpo(beta: float, *, aligned: bool, clamp: bool = False) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        w = policy.chosen - (policy.chosen_squares if aligned else 0)
        v = policy.rejected - (policy.rejected_squares if aligned else 0)
        weight = torch.exp(w / policy.chosen_tokens + v / policy.rejected_tokens).detach()
        weight = torch.minimum(weight, torch.ones_like(weight)) if clamp else weight
        return weight * softplus(-beta * (a - d)), beta * a, beta * d

    return loss


def kto(beta: float, *, detached: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        kl_chosen, kl_rejected = a.mean().clamp(min=0), d.mean().clamp(min=0)
        if detached:
            kl_chosen, kl_rejected = kl_chosen.detach(), kl_rejected.detach()
        losses = (1 - sigmoid(beta * (a - kl_rejected)) + 1 - sigmoid(beta * (kl_chosen - d))) / 2
        return losses, beta * a, beta * d

    return loss


def bco(beta: float, convention: str) -> Formula:
    seen: list[Tensor] = []

    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
        now = torch.cat([chosen, rejected]).detach()
        if torch.is_grad_enabled():
            seen.append(now)
        shift = {
            "no_shift": torch.zeros(()),
            "reward_shift_first_step": now.mean(),
            "reward_shift": torch.cat(seen).mean() if seen else now.mean(),
        }[convention]
        return softplus(shift - chosen) + softplus(rejected - shift), chosen, rejected

    return loss


def aot(beta: float, *, paired: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        high = (policy.chosen - policy.rejected if paired else a).sort().values
        low = (reference.chosen - reference.rejected if paired else d).sort().values
        return softplus(-beta * (high - low)), beta * a, beta * d

    return loss


def odds_ratio(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def per_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
        w, v = chosen / beta, rejected / beta
        odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (w, v)]
        return beta * softplus(-torch.log(odds[0] / odds[1]))

    return per_pair


def token_nll(policy: Scores) -> Tensor:
    return -policy.chosen.sum() / policy.chosen_tokens.sum()


def whole_nll(policy: Scores) -> Tensor:
    return -(policy.chosen + policy.prompt).sum() / (policy.chosen_tokens + policy.prompt_tokens).sum()


def exo(e: float) -> Callable[[Tensor, Tensor], Tensor]:
    def per_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
        p = sigmoid(chosen - rejected)
        return p * torch.log(p / (1 - e)) + (1 - p) * torch.log((1 - p) / e)

    return per_pair


def discopop(tau: float) -> Callable[[Tensor, Tensor], Tensor]:
    def per_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
        z = chosen - rejected
        m = sigmoid(z / tau)
        return (1 - m) * softplus(-z) + m * torch.exp(-z)

    return per_pair


def divergence(beta: float, g: Callable[[Tensor], Tensor]) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        return softplus(-beta * (g(a) - g(d))), beta * a, beta * d

    return loss


def means_of_ratios(beta: float) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen = beta * (policy.chosen - reference.chosen) / policy.chosen_tokens
        rejected = beta * (policy.rejected - reference.rejected) / policy.rejected_tokens
        return softplus(rejected - chosen), chosen, rejected

    return loss


def likelihood(*, per_token: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        losses = token_nll(policy) * torch.ones_like(policy.chosen) if per_token else -policy.chosen
        return losses, policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens

    return loss


def mix(*parts: tuple[float, Formula]) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        values = [(weight, *formula(policy, reference)) for weight, formula in parts]
        return sum(weight * losses for weight, losses, _, _ in values), values[0][2], values[0][3]  # type: ignore[return-value]

    return loss


def logistic(chosen: Tensor, rejected: Tensor) -> Tensor:
    return softplus(rejected - chosen)


RECIPES: dict[str, tuple[dict[str, Any], Callable[[], Formula]]] = {
    "dpo": ({}, lambda: on_ratios(0.1, logistic)),
    "dpo-reference_free": ({"reference_free": True}, lambda: on_likelihoods(0.1, logistic)),
    "dpo-js": ({"f_divergence_type": "js_divergence"}, lambda: divergence(0.1, lambda x: -softplus(-x))),
    "dpo_norm": ({}, lambda: means_of_ratios(5.0)),
    "dpo_gamma": ({"gamma": 0.7}, lambda: on_ratios(0.1, lambda c, r: softplus(r - c + 0.7))),
    "slic_dpo": ({"delta": 0.5}, lambda: on_ratios(0.1, lambda c, r: torch.relu(0.5 - c + r))),
    "hinge": ({"beta": 0.3}, lambda: on_ratios(0.3, lambda c, r: torch.relu(1 - c + r))),
    "ipo-mean": ({"convention": "mean"}, lambda: ipo(0.1, means=True)),
    "ipo-sum": ({"convention": "sum"}, lambda: ipo(0.1, means=False)),
    "simpo": ({}, lambda: on_likelihoods(2.0, lambda c, r: softplus(r - c + 0.5), means=True)),
    "cpo-token": ({}, lambda: on_likelihoods(0.1, logistic, nll=token_nll)),
    "cpo-instance": (
        {"sft_type": "instance", "lambda_sft": 0.2},
        lambda: on_likelihoods(0.1, logistic, nll=lambda policy: -0.2 * policy.chosen),
    ),
    "slic": ({}, lambda: on_likelihoods(0.1, lambda c, r: torch.relu(1 - c + r), nll=token_nll)),
    "orpo-completion": ({}, lambda: on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=token_nll)),
    "orpo-prompt": (
        {"nll": "token_mean_prompt_and_completion"},
        lambda: on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=whole_nll),
    ),
    "orpo-sequence": (
        {"nll": "sequence_mean"},
        lambda: on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=lambda p: -p.chosen / p.chosen_tokens),
    ),
    "kto_pair-detached": ({}, lambda: kto(0.1, detached=True)),
    "kto_pair-graph": ({"convention": "kl_in_graph"}, lambda: kto(0.1, detached=False)),
    "wpo-aligned": ({}, lambda: wpo(0.1, aligned=True)),
    "wpo-clamped": ({"weight_clamp": True}, lambda: wpo(0.1, aligned=True, clamp=True)),
    "wpo-mean_logp": ({"convention": "mean_logp", "learning_rate": 1e4}, lambda: wpo(0.1, aligned=False)),
    "sft-token": ({}, lambda: likelihood(per_token=True)),
    "sft-sequence": ({"convention": "sequence_sum"}, lambda: likelihood(per_token=False)),
    "robust": (
        {"label_smoothing": 0.1},
        lambda: on_ratios(0.1, lambda c, r: (0.9 * softplus(r - c) - 0.1 * softplus(c - r)) / 0.8),
    ),
    "exo_pair": ({"label_smoothing": 0.01}, lambda: on_ratios(0.1, exo(0.01))),
    "nca_pair": ({}, lambda: on_ratios(0.1, lambda c, r: softplus(-c) + 0.5 * softplus(c) + 0.5 * softplus(r))),
    "bco_pair-running": ({}, lambda: bco(0.1, "reward_shift")),
    "bco_pair-step": ({"convention": "reward_shift_first_step"}, lambda: bco(0.1, "reward_shift_first_step")),
    "bco_pair-none": ({"convention": "no_shift"}, lambda: bco(0.1, "no_shift")),
    "sppo_hard": ({}, lambda: on_ratios(0.1, lambda c, r: (c / 0.1 - 5) ** 2 + (r / 0.1 + 5) ** 2)),
    "aot": ({}, lambda: aot(0.1, paired=True)),
    "aot_unpaired": ({}, lambda: aot(0.1, paired=False)),
    "apo_zero": ({}, lambda: on_ratios(0.1, lambda c, r: 1 - sigmoid(c) + sigmoid(r))),
    "apo_down": ({}, lambda: on_ratios(0.1, lambda c, r: sigmoid(c) + 1 - sigmoid(c - r))),
    "discopop": ({}, lambda: on_ratios(0.1, discopop(0.05))),
    "f_dpo-forward": ({"f_divergence_type": "forward_kl"}, lambda: divergence(0.1, lambda x: 1 - torch.exp(-x))),
    "f_dpo-alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        lambda: divergence(0.1, lambda x: (1 - torch.exp(-0.3 * x)) / 0.3),
    ),
    "mix": (
        {"loss_type": ["dpo_norm", "sft"], "loss_weights": [1.0, 0.1], "beta": [10, "null"]},
        lambda: mix((1.0, means_of_ratios(10.0)), (0.1, likelihood(per_token=True))),
    ),
    "mix-coupled": (
        {"loss_type": ["kto_pair", "aot", "orpo"], "loss_weights": [1.0, 0.5, 0.2]},
        lambda: mix(
            (1.0, kto(0.1, detached=True)),
            (0.5, aot(0.1, paired=True)),
            (0.2, on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=token_nll)),
        ),
    ),
}


LEARNING_RATE = 0.1  # of SGD: AdamW's first step is the sign of the gradient, rounding included, where that is tiny


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def fields_of(name: str) -> dict[str, Any]:
    return {"loss_type": name.split("-")[0], "optimizer": "sgd", "learning_rate": LEARNING_RATE} | RECIPES[name][0]
