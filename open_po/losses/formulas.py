"""Preference losses: pure functions of log-probs, tensors in, tensors out.

Names in formulas: w, l the policy's summed log-probs of the chosen and the rejected response, n their token counts;
a, d the log-ratios to the reference (policy minus reference); s the logistic function; L(z) = -log s(z); e label
smoothing; C(z) = (1 - e) L(z) + e L(-z), the conservative form of E. Mitchell's 2023 note. Rewards are beta a and
beta d unless a docstring says otherwise; they carry no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_po.losses.types import Divisor, NllTerm, PairLogps, PairLosses


def _logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The logistic loss C(z), see the notation above."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(z)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _result(losses: Tensor | None, chosen_rewards: Tensor, rejected_rewards: Tensor, **rest: Any) -> PairLosses:
    return PairLosses(
        losses=losses, chosen_rewards=chosen_rewards.detach(), rejected_rewards=rejected_rewards.detach(), **rest
    )


def _ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """The log-ratios a and d of chosen and rejected, see the notation above."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def _means(policy: PairLogps) -> tuple[Tensor, Tensor]:
    """The log-probs per token, w/n and l/n, see the notation above."""
    return policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens


def divergence_score(logratio: Tensor, f_divergence_type: str, f_alpha_divergence_coef: float = 0.5) -> Tensor:
    """g(x) of f-DPO (arXiv 2309.16240), up to a constant: f'(u) at u = exp(x).

    `reverse_kl` x; `forward_kl` 1 - exp(-x); `js_divergence` log 2 - L(x); `alpha_divergence` (1 - exp(-alpha x)) /
    alpha, which runs from reverse KL (alpha to 0) to forward KL (alpha 1).
    """
    if f_divergence_type == "reverse_kl":
        return logratio
    if f_divergence_type == "forward_kl":
        return -torch.expm1(-logratio)
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)
    return -torch.expm1(-f_alpha_divergence_coef * logratio) / f_alpha_divergence_coef


def _margin(policy: PairLogps, reference: PairLogps, divergence: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """g(a) - g(d), a and d."""
    a, d = _ratios(policy, reference)
    return divergence_score(a, **divergence) - divergence_score(d, **divergence), a, d


# ------------------------------------------------------------------------------------------- margins of summed ratios


def dpo(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    label_smoothing: float,
    reference_free: bool,
    **divergence: Any,
) -> PairLosses:
    """C(beta (a - d)): DPO, with label smoothing cDPO (arXiv 2305.18290).

    `reference_free`: C(beta (w - l)), rewards beta w and beta l.
    """
    if reference_free or reference is None:
        chosen, rejected = beta * policy.chosen, beta * policy.rejected
        return _result(_logistic(chosen - rejected, label_smoothing), chosen, rejected)
    margin, a, d = _margin(policy, reference, divergence)
    return _result(_logistic(beta * margin, label_smoothing), beta * a, beta * d)


def f_dpo(policy: PairLogps, reference: PairLogps, *, beta: float, **divergence: Any) -> PairLosses:
    """L(beta (g(a) - g(d))), g by `f_divergence_type` (arXiv 2309.16240)."""
    margin, a, d = _margin(policy, reference, divergence)
    return _result(_logistic(beta * margin), beta * a, beta * d)


def dpo_gamma(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float,
    **divergence: Any,
) -> PairLosses:
    """C(beta (a - d) - gamma): a margin in reward units (M. Santos' thesis; cf. ODPO, arXiv 2402.10571)."""
    margin, a, d = _margin(policy, reference, divergence)
    return _result(_logistic(beta * margin - gamma, label_smoothing), beta * a, beta * d)


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float, delta: float, **divergence: Any) -> PairLosses:
    """max(0, delta - beta (a - d)): SLiC's hinge on the DPO margin (arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    margin, a, d = _margin(policy, reference, divergence)
    return _result(torch.relu(delta - beta * margin), beta * a, beta * d)


def robust(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float, **divergence: Any
) -> PairLosses:
    """((1 - e) L(beta D) - e L(-beta D)) / (1 - 2e), D = a - d (arXiv 2403.00409). Not cDPO; may be negative."""
    margin, a, d = _margin(policy, reference, divergence)
    z, e = beta * margin, label_smoothing
    losses = ((1 - e) * _logistic(z) - e * _logistic(-z)) / (1 - 2 * e)
    return _result(losses, beta * a, beta * d)


def exo_pair(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float, **divergence: Any
) -> PairLosses:
    """s(z) (log s(z) - log(1 - e)) + s(-z) (log s(-z) - log e), z = beta (a - d) (arXiv 2402.00856)."""
    margin, a, d = _margin(policy, reference, divergence)
    z, e = beta * margin, label_smoothing
    losses = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-e)) + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(e))
    return _result(losses, beta * a, beta * d)


def discopop(
    policy: PairLogps, reference: PairLogps, *, beta: float, discopop_tau: float, **divergence: Any
) -> PairLosses:
    """(1 - m) L(z) + m exp(-z), z = beta (a - d), m = s(z / tau) (arXiv 2406.08414)."""
    margin, a, d = _margin(policy, reference, divergence)
    z = beta * margin
    modulation = (z / discopop_tau).sigmoid()
    return _result((1 - modulation) * _logistic(z) + modulation * torch.exp(-z), beta * a, beta * d)


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float, convention: str) -> PairLosses:
    """(D - 1/(2 beta))^2 (arXiv 2310.12036), D = a - d (`sum`) or a/n - d/n (`mean`, the authors' later word)."""
    a, d = _ratios(policy, reference)
    margin = a - d if convention == "sum" else a / policy.chosen_tokens - d / policy.rejected_tokens
    return _result((margin - 1 / (2 * beta)) ** 2, beta * a, beta * d)


def wpo(policy: PairLogps, reference: PairLogps, *, beta: float, convention: str, weight_clamp: bool) -> PairLosses:
    """W L(beta (a - d)), W a constant for the gradient (arXiv 2406.11827).

    `mean_logp`: W = exp(w/n + l/n). `aligned`: W = exp((w - q)/n + (l - q)/n), q the sum of log sum_v p(v)^2.
    `weight_clamp` keeps W at most 1.
    """
    a, d = _ratios(policy, reference)
    chosen, rejected = policy.chosen, policy.rejected
    if convention == "aligned":
        if policy.chosen_log_sum_sq is None or policy.rejected_log_sum_sq is None:
            raise ValueError("wpo with convention aligned needs chosen_log_sum_sq and rejected_log_sum_sq")
        chosen, rejected = chosen - policy.chosen_log_sum_sq, rejected - policy.rejected_log_sum_sq
    weights = torch.exp(chosen / policy.chosen_tokens + rejected / policy.rejected_tokens).detach()
    if weight_clamp:
        weights = weights.clamp(max=1)
    return _result(weights * _logistic(beta * (a - d)), beta * a, beta * d, details={"weights": weights})


# ------------------------------------------------------------------------------------------------- length-normalised


def dpo_norm(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> PairLosses:
    """C(beta (a/n - d/n)): Tulu 3's length-normalised DPO (arXiv 2411.15124). Rewards beta a/n and beta d/n."""
    a, d = _ratios(policy, reference)
    chosen, rejected = beta * a / policy.chosen_tokens, beta * d / policy.rejected_tokens
    return _result(_logistic(chosen - rejected, label_smoothing), chosen, rejected)


def simpo(policy: PairLogps, *, beta: float, gamma: float, label_smoothing: float) -> PairLosses:
    """C(beta (w/n - l/n) - gamma) (arXiv 2405.14734). Rewards beta w/n and beta l/n. gamma is in reward units."""
    chosen, rejected = _means(policy)
    return _result(_logistic(beta * (chosen - rejected) - gamma, label_smoothing), beta * chosen, beta * rejected)


def orpo(policy: PairLogps, *, beta: float, nll: str) -> PairLosses:
    """beta L(log odds(w/n) - log odds(l/n)) + NLL, log odds(x) = x - log(1 - exp x) (arXiv 2403.07691).

    NLL of the chosen response per token (`token_mean_completion`), with its prompt (`token_mean_prompt_and_completion`)
    or per token and then per pair (`sequence_mean`). Rewards beta w/n and beta l/n.
    """
    chosen, rejected = _means(policy)
    log_odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    losses = beta * _logistic(log_odds)
    if nll == "sequence_mean":
        return _result(losses - chosen, beta * chosen, beta * rejected)
    sums, divisor = -policy.chosen, "chosen_tokens"
    if nll == "token_mean_prompt_and_completion":
        if policy.prompt is None:
            raise ValueError("orpo with nll token_mean_prompt_and_completion needs the prompt's log-probs")
        sums, divisor = sums - policy.prompt, "prompt_and_chosen_tokens"
    return _result(losses, beta * chosen, beta * rejected, nll=NllTerm(sums=sums, divisor=divisor))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- without reference


def _sft_divisor(sft_type: str) -> Divisor:
    return "chosen_tokens" if sft_type == "token" else "pairs"


def cpo(policy: PairLogps, *, beta: float, label_smoothing: float, lambda_sft: float, sft_type: str) -> PairLosses:
    """C(beta (w - l)) + lambda NLL (arXiv 2401.08417). Rewards beta w and beta l.

    NLL of the chosen responses: mean over tokens (`token`) or over pairs (`instance`).
    """
    chosen, rejected = beta * policy.chosen, beta * policy.rejected
    nll = NllTerm(sums=-policy.chosen, divisor=_sft_divisor(sft_type), weight=lambda_sft)
    return _result(_logistic(chosen - rejected, label_smoothing), chosen, rejected, nll=nll)


def slic(policy: PairLogps, *, beta: float, delta: float, lambda_sft: float, sft_type: str) -> PairLosses:
    """max(0, delta - beta (w - l)) + lambda NLL, as for `cpo` (arXiv 2305.10425, 2210.00045)."""
    chosen, rejected = beta * policy.chosen, beta * policy.rejected
    nll = NllTerm(sums=-policy.chosen, divisor=_sft_divisor(sft_type), weight=lambda_sft)
    return _result(torch.relu(delta - (chosen - rejected)), chosen, rejected, nll=nll)


def sft(policy: PairLogps, *, convention: str) -> PairLosses:
    """NLL of the chosen responses: over the step's chosen tokens (`token_mean`), or -w (`sequence_sum`).

    There is no implicit reward without a reference; mean log-probs per token are logged as rewards.
    """
    chosen = policy.chosen / policy.chosen_tokens.clamp(min=1)
    rejected = policy.rejected / policy.rejected_tokens.clamp(min=1)
    if convention == "sequence_sum":
        return _result(-policy.chosen, chosen, rejected)
    return _result(None, chosen, rejected, nll=NllTerm(sums=-policy.chosen, divisor="chosen_tokens"))


# -------------------------------------------------------------------------------------- each response by its own ratio


def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """L(beta a) + L(-beta a)/2 + L(-beta d)/2 (arXiv 2402.05369)."""
    a, d = _ratios(policy, reference)
    losses = _logistic(beta * a) + 0.5 * _logistic(-beta * a) + 0.5 * _logistic(-beta * d)
    return _result(losses, beta * a, beta * d)


def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """(a - 1/(2 beta))^2 + (d + 1/(2 beta))^2 (arXiv 2405.00675)."""
    a, d = _ratios(policy, reference)
    return _result((a - 0.5 / beta) ** 2 + (d + 0.5 / beta) ** 2, beta * a, beta * d)


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """1 - s(beta a) + s(beta d): chosen up, rejected down (arXiv 2408.06266)."""
    a, d = _ratios(policy, reference)
    return _result((-beta * a).sigmoid() + (beta * d).sigmoid(), beta * a, beta * d)


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLosses:
    """s(beta a) + 1 - s(beta (a - d)): both down, rejected more (arXiv 2408.06266)."""
    a, d = _ratios(policy, reference)
    return _result((beta * a).sigmoid() + (-beta * (a - d)).sigmoid(), beta * a, beta * d)


# ------------------------------------------------------------------------------------------------- over a whole batch


def kto_pair(policy: PairLogps, reference: PairLogps, *, beta: float, convention: str) -> PairLosses:
    """1 - s(beta (a - KLl)) and 1 - s(beta (KLw - d)), averaged over the 2P values (arXiv 2402.01306).

    KLw = max(0, mean a) and KLl = max(0, mean d) over the batch, constants (`kl_detached`) or not (`kl_in_graph`).
    """
    a, d = _ratios(policy, reference)
    chosen_kl, rejected_kl = a.mean().clamp(min=0), d.mean().clamp(min=0)
    if convention == "kl_detached":
        chosen_kl, rejected_kl = chosen_kl.detach(), rejected_kl.detach()
    losses = torch.cat([(-beta * (a - rejected_kl)).sigmoid(), (-beta * (chosen_kl - d)).sigmoid()])
    details = {"chosen_kl": chosen_kl.detach(), "rejected_kl": rejected_kl.detach()}
    return _result(losses, beta * a, beta * d, details=details)


def bco_pair(
    policy: PairLogps, reference: PairLogps, *, beta: float, convention: str, running_mean: Tensor | None = None
) -> PairLosses:
    """L(beta a - delta) + L(-(beta d - delta)) (arXiv 2404.04656).

    `no_shift`: delta = 0. `reward_shift_first_step`: delta is the mean of the batch's 2P rewards. `reward_shift`: it is
    `running_mean`, the mean of all rewards so far; without one, as in the first step. delta is a constant.
    """
    a, d = _ratios(policy, reference)
    delta = torch.zeros((), dtype=a.dtype, device=a.device)
    if convention != "no_shift":
        delta = torch.cat([beta * a, beta * d]).mean().detach()
    if convention == "reward_shift" and running_mean is not None:
        delta = running_mean.to(a)
    losses = _logistic(beta * a - delta) + _logistic(-(beta * d - delta))
    return _result(losses, beta * a, beta * d, details={"delta": delta})


def aot(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> PairLosses:
    """C(beta x difference of equal ranks) of w - l and of the reference's, each sorted over the batch (2406.05882)."""
    a, d = _ratios(policy, reference)
    own = (policy.chosen - policy.rejected).sort().values
    theirs = (reference.chosen - reference.rejected).sort().values
    return _result(_logistic(beta * (own - theirs), label_smoothing), beta * a, beta * d)


def aot_unpaired(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> PairLosses:
    """C(beta x difference of equal ranks) of a and of d, each sorted over the batch (arXiv 2406.05882)."""
    a, d = _ratios(policy, reference)
    return _result(_logistic(beta * (a.sort().values - d.sort().values), label_smoothing), beta * a, beta * d)
