"""What tensors hold while code runs, counted operation by operation: bytes now, and most so far."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from open_po.model.stand_in import as_it_is

_GRANULE = 512  # bytes, that CUDA's allocator rounds up to
_CPU = torch.device("cpu")


def _histogram(values: Tensor, bins: int = 100, *_: Any) -> Tensor:
    return values.new_empty(bins)


def _products(left: Tensor, right: Tensor, ends: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Of each expert's tokens; in the backward pass, of two matrices of tokens, a product for each expert."""
    if left.dim() == right.dim() == 2 and ends is not None:
        return left.new_empty(len(ends), left.shape[0], right.shape[1])
    return left.new_empty(*left.shape[:-1], right.shape[-1])


# Where torch's own rules ask for a device or precision that the stand-in does not have.
_SHAPES: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.histc.default: _histogram,
    torch.ops.aten._grouped_mm.default: _products,
}


class Ledger(TorchDispatchMode):
    """While it is entered, above a FakeTensorMode, it counts the memory of every tensor that an operation makes.

    A memory counts once, however many tensors see it, and until the last of them is gone. Those of `known` tensors are
    left out.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0  # bytes
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for by every other call
            return _CPU
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = _CPU
        with as_it_is():
            try:
                out = _SHAPES.get(func, func)(*args, **kwargs)
            except DataDependentOutputException:
                return True  # a number that hangs on values, of which there are none: Liger counts its targets
            for item in tree_iter(out):
                if isinstance(item, Tensor):
                    self._note(item)
        self.peak = max(self.peak, self.live)
        return out

    def peak_from_now(self) -> int:
        """Most so far, which is forgotten."""
        found, self.peak = self.peak, self.live
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._known:
            return
        size = -(-storage.nbytes() // _GRANULE) * _GRANULE

        def gone(_: object) -> None:
            self.live -= size
            del self._held[key]

        self.live += size
        self._held[key] = weakref.ref(storage, gone)
