"""Attention and log-probs written the long way, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from open_po.model.logprobs import Head
from open_po.packing import Group, PackedBatch, pack_responses
from tests.scoring import LAYOUTS


def naive_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def make(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Any]:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden) / hidden**0.5 * 2).requires_grad_()
    offset = torch.randn(vocabulary, requires_grad=True) if bias else None
    return states, weight, offset


def gradients(
    function: Callable[..., Tensor], states: Tensor, head: Head, targets: Tensor
) -> tuple[Tensor, list[Tensor]]:
    leaves = [leaf for leaf in (states, head.weight, head.bias) if leaf is not None and leaf.requires_grad]
    values = function(states, head, targets)
    upstream = torch.linspace(-1, 2, len(targets), dtype=values.dtype)  # another gradient for every token
    return values.detach(), list(torch.autograd.grad((values * upstream).sum(), leaves))


CPU = torch.device("cpu")


def naive_attention(
    batch: PackedBatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """All tokens against all: a query sees what its segment and prefix hold, at positions from its window on."""
    sees = torch.zeros(len(batch.input_ids), len(batch.input_ids), dtype=torch.bool)
    for start, end, prefix_start, prefix_end in batch.segments:
        sees[start:end, prefix_start:prefix_end] = sees[start:end, start:end] = True
    behind = batch.position_ids[:, None] - batch.position_ids
    sees &= (behind >= 0) & (behind < (len(sees) if window is None else window))
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~sees, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return (weights / total @ value).transpose(1, 2)


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: None = None,
    block_table: None = None,
    num_splits: int | None = None,
) -> Tensor:
    """`varlen_attn` on a CPU, with what it asks of its arguments: [T, heads, D] from queries [T] and keys [K]."""
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert value.is_contiguous()
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert query.dtype == key.dtype == value.dtype
    assert key.shape[:2] == value.shape[:2]
    for ends, length, longest in ((cu_seq_q, len(query), max_q), (cu_seq_k, len(key), max_k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert ends[0] == 0
        assert ends[-1] == length
        assert (ends.diff() > 0).all()
        assert isinstance(longest, int)
        assert longest == ends.diff().max()
    assert len(cu_seq_q) == len(cu_seq_k)
    if not enable_gqa:
        assert query.shape[1] == key.shape[1]
    repeats = query.shape[1] // key.shape[1]
    left, right = window_size
    outputs = []
    for number in range(len(cu_seq_q) - 1):
        own = slice(*cu_seq_q[number : number + 2].tolist())
        seen = slice(*cu_seq_k[number : number + 2].tolist())
        q = query[own].transpose(0, 1)
        k, v = (x[seen].transpose(0, 1).repeat_interleave(repeats, 0) for x in (key, value))
        # The last query and the last key stand at the same place.
        place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        ahead = place - torch.arange(k.shape[1])
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        hidden |= (ahead < -right) if right >= 0 else hidden
        hidden |= (ahead > left) if left >= 0 else hidden
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


lengths = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4
)


heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])


windows = st.one_of(st.none(), st.integers(1, 14))


layouts = st.sampled_from(LAYOUTS[:2])


def batch_of(groups: list[tuple[int, list[int]]], layout: Any) -> PackedBatch:
    made = [Group([5] * prompt, [[7] * length for length in responses]) for prompt, responses in groups]
    return pack_responses(made, layout=layout, pad_token_id=2)


def inputs(batch: PackedBatch, heads: tuple[int, int], values: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(batch.input_ids))
    shapes = [(heads[0], 8), (heads[1], 8), (heads[1], values)]
    made = [torch.randn(1, n, len(batch.input_ids), width, generator=generator) for n, width in shapes]
    # As models hand them over: [1, T, heads, D], transposed.
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in made)
    return query, key, value


def assert_equal(mine: Tensor, theirs: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, leaves, upstream) for out in (mine, theirs)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
