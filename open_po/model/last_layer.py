"""The last layer, computed only for the tokens that predict a scored one.

Of a prompt the layers above the last need nothing but what the last one's attention reads: its keys and values. So the
last layer runs for the prompt's end and the responses only, and computes the rest of the prompts as far as their keys
and values. No model's code is changed: a hook cuts what the layer is called with, and `packed_attention` hands out the
keys and values of a first, interrupted call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from open_po.model.attention import KeysTaken, Segments, TakeKeys
from open_po.packing import LastLayer, Segment


class SegmentsAndLast(Segments):
    """The segments of all layers but the last, and what to cut for that one."""

    def __init__(self, ranges: Sequence[Segment], last: LastLayer, device: torch.device) -> None:
        super().__init__(ranges, device)
        self.last = last

    def to(self, device: torch.device) -> Segments:
        moved = super().to(device)
        assert isinstance(moved, SegmentsAndLast)
        moved.last = self.last.to(device)
        return moved


def decoder_layer(model: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The layer of `model` that `attention` is part of: what is counted in its name (`layers.5` of `layers.5.attn`)."""
    name = next((name for name, module in model.named_modules() if module is attention), "")
    parts = name.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    return model.get_submodule(".".join(parts[: numbers[-1] + 1])) if numbers else None


def compute_scored_tokens_only(layer: nn.Module) -> RemovableHandle:
    """From now on `layer` gives hidden states for the scored tokens only, where it is called with `SegmentsAndLast`."""
    return layer.register_forward_pre_hook(_cut_inputs, with_kwargs=True)


def _cut_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    segments = kwargs.get("segments")
    if not isinstance(segments, SegmentsAndLast):
        return None
    last, tokens = segments.last, segments.ranges[-1].end
    context: tuple[Tensor, Tensor] | None = None
    if len(last.context_index):
        try:
            layer.forward(
                *_select(args, last.context_index, tokens),
                **(_select(kwargs, last.context_index, tokens) | {"segments": TakeKeys()}),
            )
        except KeysTaken as found:
            context = found.key, found.value
    own = Segments(last.segments, segments.device, last.query_lengths, context=context, key_order=last.key_order)
    return _select(args, last.scored_index, tokens), _select(kwargs, last.scored_index, tokens) | {"segments": own}


def _select(value: Any, index: Tensor, tokens: int) -> Any:
    """`value` with every tensor [1, T, ...] inside it cut to the tokens of `index`."""
    if isinstance(value, Tensor):
        per_token = value.dim() >= 2 and value.shape[:2] == (1, tokens)
        return value.index_select(1, index) if per_token else value
    if isinstance(value, tuple):
        return tuple(_select(item, index, tokens) for item in value)
    if isinstance(value, dict):
        return {name: _select(item, index, tokens) for name, item in value.items()}
    return value
