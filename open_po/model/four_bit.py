"""Frozen weights in 4 bits (QLoRA, arXiv 2305.14314): bitsandbytes' layers, as transformers puts them into a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from open_po.config import FOUR_BIT
from open_po.errors import UserError


def loading_settings(compute_dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told, so that it quantises each weight on `device` as it is read."""
    quantisation = BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_compute_dtype=compute_dtype)
    return {"quantization_config": quantisation, "device_map": {"": device}}


def make_ready(model: nn.Module, compute_dtype: torch.dtype, name: str) -> None:
    """Have 4-bit layers compute alike in training and evaluation. Raises UserError if the model has none."""
    layers = [layer for _, layer in four_bit_layers(model)]
    if not layers:
        raise UserError(f"use_qlora: {name} has no linear layers that bitsandbytes keeps in 4 bits; use use_lora alone")
    for layer in layers:
        layer.compute_dtype = compute_dtype  # files that were in 4 bits already may name another
        # On a CPU with AVX512-BF16 a layer's first pass in evaluation packs its weights for a product in bfloat16 that
        # has no backward pass: adapters below it would silently get no gradient from then on.
        layer.support_avx512bf16_for_cpu = False


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model whose weights are in 4 bits, by name."""
    for name, module in model.named_modules():
        if is_four_bit(module):
            yield name, module


def is_four_bit(module: nn.Module) -> bool:
    """Whether it is a layer, without an adapter around it, whose weight is in 4 bits."""
    return hasattr(getattr(module, "weight", None), "quant_state") and not hasattr(module, "base_layer")


def full_shape(layer: Any) -> torch.Size:
    """The shape of a layer's weight as files have it."""
    rows, columns = layer.weight.quant_state.shape
    return torch.Size((columns, rows) if _is_turned(layer) else (rows, columns))


def full_weight(layer: Any) -> Tensor:
    """What a layer's 4-bit weight stands for, [out, in], in the precision that it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def merged_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """As `full_weight`, of a layer with an adapter, this merged into it in `dtype`: never into 4 bits.

    As peft merges its layers of 4-bit weights, but for quantising what comes of it.
    """
    weight = full_weight(layer.get_base_layer()).to(dtype)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:
            weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
        else:
            weight = weight + layer.get_delta_weight(adapter)
    return weight.detach()


def as_in_files(weight: Tensor, layer: Any) -> Tensor:
    """A weight [out, in] as the files of the layer's model have it: GPT-2's are [in, out]."""
    return weight.T if _is_turned(layer) else weight


def _is_turned(layer: Any) -> bool:
    return issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)


def describe(model: nn.Module) -> str:
    """A line on how much of a model is in 4 bits, and what its weights take."""
    in_four = sum(layer.weight.quant_state.shape.numel() for _, layer in four_bit_layers(model))
    others = [weight for weight in model.parameters() if not hasattr(weight, "quant_state")]
    total = in_four + sum(weight.numel() for weight in others)
    size = weight_bytes(model)
    return (
        f"{in_four:,} of {total:,} weights in 4 bits (not embeddings, head, norms, nor the experts of a mixture), "
        f"{size / 1e9:,.2f} GB together"
    )


def weight_bytes(model: nn.Module) -> int:
    """What a model's weights take, with the scales of those in 4 bits."""
    scales = 0
    for _, layer in four_bit_layers(model):
        state = layer.weight.quant_state
        parts = [
            state.absmax,
            state.code,
            *([state.offset, state.state2.absmax, state.state2.code] if state.nested else []),
        ]
        scales += sum(part.nbytes for part in parts)
    return scales + sum(weight.nbytes for weight in model.parameters())
