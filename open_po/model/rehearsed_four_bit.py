"""What matrices in NF4 (QLoRA, arXiv 2305.14314) hold while they compute, for a model that has no weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Bytes of a weight: 4 bits, a scale of 8 bits for each 64 of them, and one of 32 bits for each 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class FourBitLinear(nn.Linear):
    """A frozen linear layer that makes its weight whole for each product and saves nothing for the backward pass."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.empty(round(self.numbers * NF4_BYTES), dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self.compute_dtype = compute_dtype

    @property
    def numbers(self) -> int:
        """Weights that it stands for."""
        return self.in_features * self.out_features

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input.to(self.compute_dtype), self.weight, shape
        )
        return found if self.bias is None else found + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(input, packed.new_empty(shape, dtype=input.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None


def keep_in_four_bits(layers: Iterable[nn.Module], compute_dtype: torch.dtype) -> None:
    """Put a FourBitLinear in the place of every linear module inside `layers`."""
    for layer in layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, FourBitLinear(child, compute_dtype))
