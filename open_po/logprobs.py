"""Log-probs of target tokens from hidden states, the head fused with the log-softmax; no [tokens x vocabulary] tensor.

Letters in shapes: N scored tokens, H hidden, V vocabulary, R responses, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_po.losses import PairLogps
from open_po.packing import PackedBatch

# Part of the reference cache's key: raise it when the same inputs give other log-probs than before.
LOGPROB_VERSION = 1

# Size of the one [chunk x V] buffer that logits are computed in. On 2 cores tiles of 32 to 128 MiB multiply at the
# same rate, smaller ones up to 40% slower.
_TILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    scale: float = 1.0


def fused_logprobs(hidden: Tensor, head: Head, targets: Tensor, *, use_liger: bool) -> Tensor:
    """Log-prob, in nats, of each target token: [N], float32 for any `hidden` up to that precision.

    `hidden` is [N, H] in the compute dtype; the weight is cast to it. Gradients reach `hidden`, the weight and the
    bias. `use_liger` takes Liger's Triton kernel (CUDA, or CPU under the Triton interpreter), otherwise chunks of
    matrix products, with the same values.
    """
    if len(targets) == 0:  # kernels refuse it; the zero keeps the graph connected
        return hidden.sum(-1).to(_logit_dtype(hidden)) + 0.0 * head.weight.sum()
    head, hidden = _unscaled(hidden, head)
    function = _liger_logprobs if use_liger else _chunked_logprobs
    return function(hidden, head, targets)


def pair_logps(
    logprobs: Tensor, batch: PackedBatch, *, ld_alpha: float = 1.0, log_sum_sq: Tensor | None = None
) -> PairLogps:
    """Sum token log-probs [N] per response and look the responses up by pair.

    `ld_alpha` is the weight of the tokens of a pair's longer response beyond the length of its shorter one (LD-DPO,
    arXiv 2409.06411). `log_sum_sq` [N] is summed as it is, for the losses that read it.
    """

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(batch.num_responses).index_add(0, batch.response_id, values)

    weighted = logprobs if ld_alpha == 1.0 else torch.where(batch.in_tail, ld_alpha * logprobs, logprobs)
    logps, tokens = sums(weighted), sums(torch.ones_like(logprobs))
    squares = None if log_sum_sq is None else sums(log_sum_sq)
    chosen, rejected = batch.pairs.unbind(1)
    return PairLogps(
        chosen=logps[chosen],
        rejected=logps[rejected],
        chosen_tokens=tokens[chosen],
        rejected_tokens=tokens[rejected],
        chosen_log_sum_sq=None if squares is None else squares[chosen],
        rejected_log_sum_sq=None if squares is None else squares[rejected],
        prompt=None if batch.prompts is None else logps[batch.prompts],
        prompt_tokens=None if batch.prompts is None else tokens[batch.prompts],
    )


@torch.no_grad()
def log_sum_squares(hidden: Tensor, head: Head) -> Tensor:
    """log sum_v p(v)^2 under each token's distribution, in nats: [N], no gradient. Chunked like the log-probs."""
    head, hidden = _unscaled(hidden, head)
    result = torch.empty(len(hidden), dtype=_logit_dtype(hidden), device=hidden.device)
    for rows, logits in _logit_chunks(hidden, head.weight, head.bias, head.softcap):
        normaliser = torch.logsumexp(logits, -1)
        result[rows] = torch.logsumexp(logits.mul_(2), -1) - 2 * normaliser
    return result


def _unscaled(hidden: Tensor, head: Head) -> tuple[Head, Tensor]:
    """The same logits from a head whose scale is 1."""
    if head.scale == 1.0:
        return head, hidden
    bias = None if head.bias is None else head.bias * head.scale
    return Head(head.weight, bias, head.softcap), hidden * head.scale


def _liger_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    nll, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden,
        head.weight.to(hidden.dtype),
        targets,
        None if head.bias is None else head.bias.to(hidden.dtype),
        None,  # class weights
        -100,  # ignored target, never present
        0.0,  # squared log-sum-exp term
        0.0,  # label smoothing
        "none",
        head.softcap,
        False,  # return_z_loss
        torch.float32,  # accumulate the weight's gradient in
    )
    result: Tensor = -nll
    return result


def _chunked_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    result: Tensor = _ChunkedLogprobs.apply(hidden, head.weight, head.bias, targets, head.softcap)  # type: ignore[no-untyped-call]
    return result


class _ChunkedLogprobs(torch.autograd.Function):
    """Logits are made a chunk of tokens at a time in one reused buffer, and made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        logprobs = torch.empty(len(targets), dtype=_logit_dtype(hidden), device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        for rows, logits in _logit_chunks(hidden, weight, bias, softcap):
            normalisers[rows] = torch.logsumexp(logits, -1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalisers[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.softcap = softcap
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        grad, softcap = grads[0], ctx.softcap
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        cast_weight = weight.to(hidden.dtype)
        for rows, logits in _logit_chunks(hidden, weight, bias, softcap):
            # d logprob / d logits = onehot(target) - softmax, in the logits' own buffer.
            slope = None if softcap is None else 1 - (logits / softcap).square()
            d_logits = logits.sub_(normalisers[rows, None]).exp_().mul_(-grad[rows, None])
            d_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            if slope is not None:
                d_logits *= slope
            if grad_bias is not None:
                grad_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(d_logits, cast_weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if grad_weight.dtype == hidden.dtype:
                    grad_weight.addmm_(d_logits.T, hidden[rows])
                else:
                    grad_weight += d_logits.T @ hidden[rows]
        return grad_hidden, grad_weight, grad_bias, None, None


def _logit_dtype(hidden: Tensor) -> torch.dtype:
    """At least float32: products may be made in bfloat16, softmaxes are not."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _logit_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges and their logits [chunk, V] in `_logit_dtype`; each chunk overwrites the one before."""
    vocabulary = weight.shape[0]
    chunk = min(len(hidden), max(16, _TILE_BYTES // (4 * vocabulary)))
    product = torch.empty(chunk, vocabulary, dtype=hidden.dtype, device=hidden.device)
    logits = product if hidden.dtype == _logit_dtype(hidden) else torch.empty_like(product, dtype=torch.float32)
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        out = product[: rows.stop - start]
        if bias is None:
            torch.mm(hidden[rows], weight.T, out=out)
        else:
            torch.addmm(bias, hidden[rows], weight.T, out=out)
        view = logits[: rows.stop - start]
        if view.dtype != out.dtype:
            view.copy_(out)
        if softcap is not None:
            view.div_(softcap).tanh_().mul_(softcap)
        yield rows, view
