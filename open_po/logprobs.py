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
LOGPROB_VERSION = 2

# Size of the one [chunk x V] buffer that logits are computed in. Tokens that fit in one chunk are computed once, others
# again in the backward pass: on one core 128 MiB run at 63 GFLOP/s where 64 MiB run at 48 (512 tokens, vocabulary 64k).
_TILE_BYTES = 128 * 2**20


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


def response_sums(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sums over the tokens of each response, [R], of `values` [N]."""
    return values.new_zeros(batch.num_responses).index_add(0, batch.response_id.to(values.device), values)


def pair_logps(
    logprobs: Tensor, batch: PackedBatch, *, ld_alpha: float = 1.0, log_sum_sq: Tensor | None = None
) -> PairLogps:
    """Sum token log-probs [N] per response and look the responses up by pair.

    `ld_alpha` is the weight of the tokens of a pair's longer response beyond the length of its shorter one (LD-DPO,
    arXiv 2409.06411). `log_sum_sq` [N] is summed as it is, for the losses that read it.
    """
    logps, tokens = response_sums(logprobs, batch), batch.response_tokens.to(logprobs.dtype)
    squares = None if log_sum_sq is None else response_sums(log_sum_sq, batch)
    chosen, rejected = batch.pairs.unbind(1)
    sides = logps[batch.pairs]
    if ld_alpha != 1.0:
        head = _first_tokens(logprobs, batch)
        sides = head + ld_alpha * (sides - head)
    return PairLogps(
        chosen=sides[:, 0],
        rejected=sides[:, 1],
        chosen_tokens=tokens[chosen],
        rejected_tokens=tokens[rejected],
        chosen_log_sum_sq=None if squares is None else squares[chosen],
        rejected_log_sum_sq=None if squares is None else squares[rejected],
        prompt=None if batch.prompts is None else logps[batch.prompts],
        prompt_tokens=None if batch.prompts is None else tokens[batch.prompts],
    )


def _first_tokens(logprobs: Tensor, batch: PackedBatch) -> Tensor:
    """[P, 2] sums over as many tokens of both responses of a pair as its shorter one has."""
    # A response may be in several pairs and so be cut at several lengths: differences of running sums serve them all,
    # in float64, which keeps a sum of a pack's tokens exact to far less than float32 resolves.
    running = torch.cat([logprobs.new_zeros(1, dtype=torch.float64), logprobs.double().cumsum(0)])
    shorter = batch.response_tokens[batch.pairs].amin(1, keepdim=True)
    start = batch.response_start[batch.pairs]
    return (running[start + shorter] - running[start]).to(logprobs.dtype)


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
    """Logits are made a chunk of tokens at a time in one reused buffer, and made again in the backward pass.

    The last chunk's buffer is kept for the backward pass, which would make one of the same size anyway: what fits in
    one chunk is computed once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        logprobs = torch.empty(len(targets), dtype=_logit_dtype(hidden), device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        for rows, logits in _logit_chunks(hidden, weight, bias, softcap):
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0]
            # As torch.logsumexp, which would make two more tensors of this size.
            largest = logits.amax(-1, keepdim=True)
            totals = logits.sub_(largest).exp_().sum(-1)
            normalisers[rows] = totals.log() + largest[:, 0]
        logprobs -= normalisers
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.softcap = softcap
        # With a soft-cap the slope needs the logits themselves.
        ctx.kept = (rows, logits, totals) if softcap is None and any(ctx.needs_input_grad) else None
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _, targets, _ = ctx.saved_tensors
        grad = grads[0]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight: Tensor | None = None  # the first chunk's product: zeros would be one more pass over its memory
        grad_bias = weight.new_zeros(len(weight)) if wants_bias else None
        cast_weight = weight.to(hidden.dtype)
        for rows, exponentials, totals, slope in _softmax_chunks(ctx):
            # d logprob / d logits = onehot(target) - softmax, in the exponentials' own buffer.
            d_logits = exponentials.mul_(-(grad[rows] / totals)[:, None])
            d_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
            if slope is not None:
                d_logits *= slope
            if grad_bias is not None:
                grad_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(d_logits, cast_weight, out=grad_hidden[rows])
            if wants_weight and grad_weight is None:
                grad_weight = (d_logits.T @ hidden[rows]).to(weight.dtype)
            elif grad_weight is not None and grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(d_logits.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += d_logits.T @ hidden[rows]
            del exponentials, d_logits  # before the next chunk's buffer is made
        return grad_hidden, grad_weight, grad_bias, None, None


def _softmax_chunks(ctx: Any) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Row ranges, exponentials [chunk, V], what to divide them by for the softmax, and the soft-cap's slope.

    Whoever gets a chunk may overwrite it.
    """
    hidden, weight, bias, _, normalisers = ctx.saved_tensors
    todo = len(hidden)
    if ctx.kept is not None:
        rows, exponentials, totals = ctx.kept
        ctx.kept = None  # another backward pass makes it again
        yield rows, exponentials, totals, None
        todo = rows.start
        del exponentials  # before the next buffer is made
    if todo == 0:
        return
    for rows, logits in _logit_chunks(hidden[:todo], weight, bias, ctx.softcap):
        slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
        exponentials = logits.sub_(normalisers[rows, None]).exp_()
        yield rows, exponentials, torch.ones_like(normalisers[rows]), slope


def _logit_dtype(hidden: Tensor) -> torch.dtype:
    """At least float32: products may be made in bfloat16, softmaxes are not."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _logit_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges and their logits [chunk, V] in `_logit_dtype`; each chunk overwrites the one before."""
    vocabulary = weight.shape[0]
    most = max(16, _TILE_BYTES // (4 * vocabulary))
    chunk = -(-len(hidden) // -(-len(hidden) // most))  # all chunks about the same
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
