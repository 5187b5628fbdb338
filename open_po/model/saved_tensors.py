"""What a forward pass leaves for its backward pass: each cast once, and in host memory if asked for.

Under autocast every product casts its weight and its input, and autograd keeps each of these casts: a copy of all
weights, and three of a layer's input where queries, keys and values are made from it. The weights are there in the
backward pass too, to be cast again; and casts of the same tensor are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from open_po.model.offload import HostOffload

_CAST = "ToCopyBackward0"  # autograd's name for a cast


class Packed(Protocol):
    """What stands for a saved tensor until the backward pass asks for it."""

    def restore(self) -> Tensor: ...


@dataclass(frozen=True)
class WeightCast:
    """A weight that was cast, to be cast again; the rest says which view of the cast was saved."""

    weight: nn.Parameter
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        return self.weight.detach().to(self.dtype).as_strided(self.size, self.stride, self.offset)


class SavedTensors:
    """The contexts of forward passes whose saved tensors are kept with less memory; values do not change by a bit.

    `drop_casts`: casts of weights are made again, and of several casts of one tensor one is kept. `offload`: where
    large tensors wait.
    """

    def __init__(self, *, drop_casts: bool, offload: HostOffload | None) -> None:
        self._drops_casts, self._offload = drop_casts, offload
        # The first cast of a tensor, which is known by the node that made it; and how often it had been written to.
        self._casts: dict[tuple[Any, int, torch.dtype], tuple[Tensor, int]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context of a forward pass."""
        if self._offload is not None:
            self._offload.begin()
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._casts.clear()
            if self._offload is not None:
                self._offload.end()

    def _pack(self, tensor: Tensor) -> Tensor | Packed:
        if self._drops_casts:
            found = self._cast(tensor)
            if isinstance(found, WeightCast):
                return found
            tensor = found
        if self._offload is not None and self._offload.takes(tensor):
            return self._offload.pack(tensor)
        return tensor

    def _cast(self, tensor: Tensor) -> Tensor | WeightCast:
        """What to keep for `tensor`, which is often a view of a cast: itself, or the same of an earlier cast."""
        base: Tensor = tensor if tensor._base is None else tensor._base
        node: Any = base.grad_fn
        if node is None or node.name() != _CAST or type(base) is not Tensor:
            return tensor
        source, number = node.next_functions[0]
        weight = getattr(source, "variable", None)
        if isinstance(weight, nn.Parameter):
            same = type(weight) is nn.Parameter and weight.shape == base.shape and base.storage_offset() == 0
            view = tensor.size(), tensor.stride(), int(tensor.storage_offset())
            return WeightCast(weight, base.dtype, *view) if same else tensor
        first, version = self._casts.setdefault((source, number, base.dtype), (base, base._version))
        if first is base or first._version != version or base._version != version or first.stride() != base.stride():
            return tensor
        return first.detach().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _unpack(packed: Any) -> Tensor:
    restored: Tensor = packed if isinstance(packed, Tensor) else packed.restore()
    return restored
