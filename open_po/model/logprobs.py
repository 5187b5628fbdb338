"""Log-probs of target tokens from hidden states, the head fused with the log-softmax.

No [tokens x vocabulary] tensor is held, only as much of it as fits in 128 MiB.

Letters in shapes: N scored tokens, H hidden, V vocabulary, R responses, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_po.distributed.vocabulary import VocabularyShards
from open_po.losses import PairLogps
from open_po.packing import PackedBatch

# Part of the reference cache's key: raise it when the same inputs give other log-probs than before.
LOGPROB_VERSION = 3

# Logits are made for a block of the vocabulary at a time. A CPU's block stays in its caches, where the softmax's passes
# over it cost little; a GPU's is large enough to fill it.
_BLOCK_BYTES = {"cpu": 4 * 2**20}
_OTHER_BLOCK_BYTES = 128 * 2**20
_LEAST_COLUMNS = 512  # a narrower block is mostly traffic for the gradient of the hidden states
# Blocks of so many bytes together are kept for the backward pass, the others are made again there.
_KEPT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    scale: float = 1.0


def fused_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, *, use_liger: bool, shards: VocabularyShards | None = None
) -> Tensor:
    """Log-prob, in nats, of each target token: [N], float32 for any `hidden` up to that precision.

    `hidden` is [N, H] in the compute dtype; the weight is cast to it. Gradients reach `hidden`, the weight and the
    bias. `use_liger` takes Liger's Triton kernel (CUDA, or CPU under the Triton interpreter), otherwise blocks
    of matrix products, with the same values. `shards`: each rank has a part of the head's vocabulary.
    """
    if len(targets) == 0:  # kernels refuse it; the zero keeps the graph connected
        return hidden.sum(-1).to(_logit_dtype(hidden)) + 0.0 * head.weight.sum()
    head, hidden = _unscaled(hidden, head)
    if shards is not None:
        weight, bias = shards.local(head.weight), None if head.bias is None else shards.local(head.bias)
        local = Head(weight, bias, head.softcap)
        return shards.join(*_blocked(shards.enter(hidden), local, shards.local_targets(targets, len(weight))))
    if use_liger:
        return _liger_logprobs(hidden, head, targets)
    picked, normalisers = _blocked(hidden, head, targets)
    return picked - normalisers


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
    """Sums [P, 2] over as many tokens of both responses of a pair as its shorter one has."""
    # A response may be in several pairs and so be cut at several lengths: differences of running sums serve them all,
    # in float64, which keeps a sum of a pack's tokens exact to far less than float32 resolves.
    running = torch.cat([logprobs.new_zeros(1, dtype=torch.float64), logprobs.double().cumsum(0)])
    shorter = batch.response_tokens[batch.pairs].amin(1, keepdim=True)
    start = batch.response_start[batch.pairs]
    return (running[start + shorter] - running[start]).to(logprobs.dtype)


@torch.no_grad()
def log_sum_squares(hidden: Tensor, head: Head) -> Tensor:
    """log sum_v p(v)^2 under each token's distribution, in nats: [N], no gradient. In blocks, like the log-probs."""
    head, hidden = _unscaled(hidden, head)
    ones = twos = torch.full_like(hidden[:, 0], -torch.inf, dtype=_logit_dtype(hidden))
    for block in _vocabulary_blocks(hidden, head.weight):
        logits = _block_logits(hidden, head.weight, head.bias, head.softcap, block)
        ones = torch.logaddexp(ones, torch.logsumexp(logits, -1))
        twos = torch.logaddexp(twos, torch.logsumexp(logits.mul_(2), -1))
    return twos - 2 * ones


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


def _blocked(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' logits [N], 0 for those that are no column of the head, and log-sum-exps of all columns [N]."""
    picked, normalisers = _Blocked.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head.softcap, torch.is_grad_enabled()
    )
    return picked, normalisers


class _Blocked(torch.autograd.Function):
    """Logits of a block of the vocabulary at a time, their softmax joined as the blocks go by.

    The first blocks' exponentials are kept for the backward pass, which takes them first and so makes room for itself:
    what fits in `_KEPT_BYTES` is computed once, the rest twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        with_grad: bool,  # needs_input_grad says whether inputs ask for gradients, also where nobody will compute them
    ) -> tuple[Tensor, Tensor]:
        normalisers = torch.full_like(targets, -torch.inf, dtype=_logit_dtype(hidden))
        picked = torch.zeros_like(normalisers)
        kept: list[tuple[Tensor, Tensor]] = []  # of the first blocks: exponentials [N, block], logits subtracted [N]
        # With a soft-cap the slope needs the logits themselves.
        room = _KEPT_BYTES if softcap is None and with_grad and any(ctx.needs_input_grad) else 0
        for block in _vocabulary_blocks(hidden, weight):
            logits = _block_logits(hidden, weight, bias, softcap, block)
            columns, inside = _columns(targets, block)
            picked = torch.where(inside, logits.gather(1, columns[:, None])[:, 0], picked)
            # As torch.logsumexp, which would make two more tensors of this size.
            # Biases of -inf may fill a whole block: clamped, so that it adds 0 and not nan.
            largest = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
            exponentials = logits.sub_(largest[:, None]).exp_()
            normalisers = torch.logaddexp(normalisers, exponentials.sum(-1).log_().add_(largest))
            room -= exponentials.nbytes
            if room >= 0:
                kept.append((exponentials, largest))
            del logits, exponentials  # before the next block is made
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.softcap, ctx.kept = softcap, kept
        return picked, normalisers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, _ = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # Blocks add up in at least float32: a bfloat16 sum of many would lose most of its digits.
        grad_hidden = torch.zeros_like(hidden, dtype=_logit_dtype(hidden)) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias else None
        kept, ctx.kept = ctx.kept, []  # another backward pass makes them again
        for block in _vocabulary_blocks(hidden, weight):
            # d picked / d logits = onehot(target), d normalisers = softmax: in the exponentials' own buffer.
            exponentials, share, slope = _softmax(ctx, block, kept)
            d_logits = exponentials.mul_((grads[1] * share)[:, None])
            columns, inside = _columns(targets, block)
            d_logits.scatter_add_(1, columns[:, None], torch.where(inside, grads[0], 0.0)[:, None])
            if slope is not None:
                d_logits *= slope
            if grad_bias is not None:
                grad_bias[block] = d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if grad_hidden is not None:
                _add_product(grad_hidden, d_logits, weight[block].to(hidden.dtype))
            if grad_weight is not None and grad_weight.dtype == hidden.dtype:
                torch.mm(d_logits.T, hidden, out=grad_weight[block])
            elif grad_weight is not None:
                grad_weight[block] = d_logits.T @ hidden
            del exponentials, d_logits  # before the next block is made
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


def _softmax(ctx: Any, block: slice, kept: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exponentials [N, block], what to multiply them by for the softmax [N], and the soft-cap's slope [N, block].

    The caller may overwrite them. Blocks come in order, first those that were `kept`, which are used up.
    """
    hidden, weight, bias, _, normalisers = ctx.saved_tensors
    if kept:
        exponentials, largest = kept.pop(0)
        return exponentials, (largest - normalisers).exp(), None
    logits = _block_logits(hidden, weight, bias, ctx.softcap, block)
    slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
    return logits.sub_(normalisers[:, None]).exp_(), torch.ones_like(normalisers), slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _logit_dtype(hidden: Tensor) -> torch.dtype:
    """At least float32: products may be made in bfloat16, softmaxes are not."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _vocabulary_blocks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Ranges of the vocabulary, all about the same size."""
    vocabulary = len(weight)
    most = _BLOCK_BYTES.get(hidden.device.type, _OTHER_BLOCK_BYTES) // (4 * len(hidden))
    blocks = -(-vocabulary // max(_LEAST_COLUMNS, most))
    size = -(-vocabulary // blocks)
    return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))


def _block_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, block: slice) -> Tensor:
    """Logits [N, block] in `_logit_dtype`, in a tensor of their own."""
    part = weight[block].to(hidden.dtype)
    product = hidden @ part.T if bias is None else torch.addmm(bias[block].to(hidden.dtype), hidden, part.T)
    logits = product.to(_logit_dtype(hidden))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _columns(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """The targets' columns in a block, 0 for those outside, and whether they are inside; both [N]."""
    inside = (targets >= block.start) & (targets < block.stop)
    return torch.where(inside, targets - block.start, 0), inside
