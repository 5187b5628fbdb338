"""Attention over packs: tokens see their own response and its prompt, and nothing else.

`transformers` calls `packed_attention` in place of its own attention, with what a model's forward was given as
`segments`. Three kernels give the same values: FlashAttention over segments of different lengths (CUDA, half
precision), `scaled_dot_product_attention` for each segment, and plain matrix products for what both lack.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from open_po.packing import Segment

ATTENTION_NAME = "open_po_packed"
# Part of the reference cache's key: raise it when the same inputs give other values than before.
ATTENTION_VERSION = 1
_FLASH_HEAD_DIM = 256  # the largest that FlashAttention takes
_FLASH_MULTIPLE = 8
_FLASH_CAPABILITY = (8, 0)  # Ampere
_FLASH_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12

_QUERY_BLOCK = 1024  # queries whose scores plain matrix products hold at a time

_calls: list[nn.Module] | None = None  # see count_calls


class MissingSegments(RuntimeError):
    """The model did not hand `segments` down to its attention."""


class TakeKeys:
    """In the place of segments: stops a layer at its attention, which then hands out keys and values.

    The last layer needs, of tokens that predict nothing scored, their keys and values alone, and only the model's own
    code knows how they are made (norms, rotations, biases). It is called as it is; raising from its attention is the
    one way to leave it there that asks nothing of that code, and what it would go on to compute is never made.
    """


class KeysTaken(Exception):
    """What `TakeKeys` asked for: `key` and `value` [1, kv heads, T, D]."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("the keys and values of a layer that was stopped at its attention")
        self.key, self.value = key, value


class Segments:
    """A pack's segments and what the kernels need of them, made once for all layers.

    The segments lie end to end and cover the tokens. `query_lengths` says how many queries each has, which are its last
    tokens; without it all are. `context` are keys and values that were computed before, and go in front of those of a
    call; `key_order` [T] says where each token then finds its own.

    Letters in shapes: Q queries, T tokens, S segments, K keys, which are the segments' prefixes and own tokens, end to
    end.
    """

    def __init__(
        self,
        ranges: Sequence[Segment],
        device: torch.device,
        query_lengths: Sequence[int] | None = None,
        *,
        context: tuple[Tensor, Tensor] | None = None,
        key_order: Tensor | None = None,
    ) -> None:
        self.context, self.key_order = context, key_order
        self.ranges = ranges
        self.device = device
        self.query_lengths = query_lengths or [segment.end - segment.start for segment in ranges]
        # Keys are cut wherever a prefix or a segment begins or ends; a segment's keys are some of these pieces.
        cuts = sorted({end for segment in ranges for end in segment})
        self.piece_lengths = [end - start for start, end in pairwise(cuts)]
        at = {cut: number for number, cut in enumerate(cuts)}
        self.pieces_of = [
            [*range(at[segment.prefix_start], at[segment.prefix_end]), *range(at[segment.start], at[segment.end])]
            for segment in ranges
        ]
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._flash: FlashIndex | None = None
        self._elsewhere: dict[torch.device, Segments] = {}

    def to(self, device: torch.device) -> Segments:
        """The same on another device, made once for all layers there."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            moved = copy.copy(self)
            moved.device, moved._masks, moved._flash, moved._elsewhere = device, {}, None, {}
            if self.context is not None:
                moved.context = self.context[0].to(device), self.context[1].to(device)
            if self.key_order is not None:
                moved.key_order = self.key_order.to(device)
            self._elsewhere[device] = moved
        return self._elsewhere[device]

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """A segment's mask [queries, keys], true where a query sees a key; the last query is the last key's token."""
        window = keys if window is None else min(window, keys)
        key = (queries, keys, window)
        if key not in self._masks:
            ahead = torch.arange(keys - queries, keys, device=self.device)[:, None] - torch.arange(
                keys, device=self.device
            )
            self._masks[key] = (ahead >= 0) & (ahead < window)
        return self._masks[key]

    def with_context(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, in order."""
        if self.context is None or self.key_order is None:
            return key, value
        joined = [torch.cat(parts, 2) for parts in zip(self.context, (key, value), strict=True)]
        if joined[0].shape[2] != len(self.key_order):
            raise MissingSegments("a layer gives its attention keys of other tokens than its own")
        key, value = (tensor.index_select(2, self.key_order) for tensor in joined)
        return key, value

    def flash(self) -> FlashIndex:
        """What FlashAttention needs."""
        if self._flash is None:
            self._flash = FlashIndex.of(self.ranges, self.query_lengths, self.device)
        return self._flash


@dataclass(frozen=True)
class FlashIndex:
    """Keys of every segment laid end to end; FlashAttention aligns the causal diagonal to a segment's end."""

    key_index: Tensor | None  # [K] tokens that are keys; None if they are all tokens in order
    ends_q: Tensor  # [S + 1] int32, queries before each segment
    ends_k: Tensor  # [S + 1] int32, keys before each segment
    max_q: int
    max_k: int

    @staticmethod
    def of(ranges: Sequence[Segment], query_lengths: Sequence[int], device: torch.device) -> FlashIndex:
        """The index of segments that lie end to end."""
        queries = torch.tensor([0, *query_lengths])
        prefixes = torch.tensor([0, *(segment.prefix_end - segment.prefix_start for segment in ranges)])
        keys = torch.tensor([0, *(segment.end - segment.start for segment in ranges)]) + prefixes
        index = None
        if prefixes.any():
            parts = [
                torch.arange(start, end)
                for segment in ranges
                for start, end in ((segment.prefix_start, segment.prefix_end), (segment.start, segment.end))
            ]
            index = torch.cat(parts).to(device, non_blocking=True)
        ends_q, ends_k = (lengths.cumsum(0).to(device, torch.int32, non_blocking=True) for lengths in (queries, keys))
        return FlashIndex(index, ends_q, ends_k, int(queries.max()), int(keys.max()))


@contextmanager
def count_calls() -> Iterator[list[nn.Module]]:
    """Collect the modules that call `packed_attention` inside the block, in order."""
    global _calls
    _calls = []
    try:
        yield _calls
    finally:
        _calls = None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segments: Segments | TakeKeys | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` asks for it: `query` [1, heads, Q, D], `key` and `value` [1, kv heads, T, D].

    Returns [1, Q, heads, D]. A query sees keys at most `sliding_window` - 1 positions before it; scores are capped
    at `softcap`; `s_aux` [heads] are scores of a key without a value (gpt-oss). Raises MissingSegments, and KeysTaken.
    """
    if segments is None:
        raise MissingSegments(f"{type(module).__name__} gives its attention no segments")
    if isinstance(segments, TakeKeys):
        raise KeysTaken(key, value)
    if _calls is not None:
        _calls.append(module)
    key, value = segments.with_context(key, value)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):  # a rotation in float32 has undone the projections' autocast
        query, key, value = (x.to(torch.get_autocast_dtype(device_type)) for x in (query, key, value))
    if softcap is not None or s_aux is not None:
        out = _by_products(query, key, value, segments, scaling, sliding_window, softcap, s_aux)
    elif _flash_takes(query, value):
        out = _by_flash(query, key, value, segments, scaling, sliding_window)
    else:
        out = _by_sdpa(query, key, value, segments, scaling, sliding_window)
    return out, None


AttentionInterface.register(ATTENTION_NAME, packed_attention)


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1]
        and head_dim <= _FLASH_HEAD_DIM
        and head_dim % _FLASH_MULTIPLE == 0
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )


def _by_flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    index = segments.flash()
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if index.key_index is not None:
        key, value = key.index_select(0, index.key_index), value.index_select(0, index.key_index)
    gqa: dict[str, Any] = {}
    if _FLASH_HAS_GQA:
        gqa = {"enable_gqa": query.shape[1] != key.shape[1]}
    else:
        key, value = _with_heads(key, query.shape[1]), _with_heads(value, query.shape[1])
    out = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        index.ends_q,
        index.ends_k,
        index.max_q,
        index.max_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # keys before a query, and after it
        **gqa,
    )
    return cast(Tensor, out)[None]


def _by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    if query.device.type == "cuda":  # whose memory-efficient kernel takes as many key heads as heads only
        key, value = _with_heads(key, query.shape[1]), _with_heads(value, query.shape[1])
    parts = []
    for q, k, v in _by_segment(query, key, value, segments):
        plain = q.shape[2] == k.shape[2] and (window is None or window >= k.shape[2])
        mask = None if plain else segments.mask(q.shape[2], k.shape[2], window)
        part = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, 1)


def _by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Scores of a block of one segment's queries at a time, made again in the backward pass.

    So that never more than [heads, block, keys] of them exist.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    for q, k, v in _by_segment(query, key, value, segments):
        mask = segments.mask(q.shape[2], k.shape[2], window)
        for block, seen in zip(q.split(_QUERY_BLOCK, 2), mask.split(_QUERY_BLOCK), strict=True):
            part = checkpoint(
                _attend, block, k, v, seen, scaling, softcap, s_aux, use_reentrant=False, preserve_rng_state=False
            )
            parts.append(part.transpose(1, 2))
    return torch.cat(parts, 1)


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each segment's queries, and the keys and values of its prefix and itself.

    Everything is cut once, by `split`: its backward pass joins the gradients, while a slice's would fill a tensor of
    the pack's size for every segment.
    """
    queries = query.split(list(segments.query_lengths), 2)
    keys, values = key.split(segments.piece_lengths, 2), value.split(segments.piece_lengths, 2)
    for own, pieces in zip(queries, segments.pieces_of, strict=True):
        yield own, _join(keys, pieces), _join(values, pieces)


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    """`tensor`, whose dimension 1 are key heads, with each of them repeated for the heads that share it."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _join(parts: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    return parts[numbers[0]] if len(numbers) == 1 else torch.cat([parts[number] for number in numbers], 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """softmax(softcap(query @ key.T)) @ value of one segment, the softmax in float32."""
    key, value = _with_heads(key, query.shape[1]), _with_heads(value, query.shape[1])
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], -1)
    shares = scores.softmax(-1)[..., : key.shape[2]]
    return shares.to(value.dtype) @ value
