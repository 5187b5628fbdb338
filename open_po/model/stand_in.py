"""A GPU's stand-in: code that runs on tensors without memory takes the paths that it takes on CUDA.

Fake tensors say that they are on a GPU when code asks, Liger's kernels are launched to no effect, and autocast is that
of a GPU. So what CUDA's path allocates can be counted where there is no GPU, and no CUDA build of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor

GPU = torch.device("cuda", 0)
_CAPABILITY = (9, 0)
_CARD = SimpleNamespace(multi_processor_count=132, total_memory=80 * 2**30, major=9, minor=0)
_OWN_DEVICE = cast(property, FakeTensor.device)
_stands_in = False


@contextmanager
def as_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """Inside, fake CPU tensors are taken for a GPU's, which computes in `dtype`."""
    import torch.cuda.amp.common as amp
    from triton.runtime.jit import KernelInterface

    def launches_nothing(kernel: object, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_capability", lambda *_: _CAPABILITY),
            (torch.cuda, "get_device_properties", lambda *_: _CARD),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "device", lambda *_: nullcontext()),
            (amp, "amp_definitely_not_available", lambda: False),  # or autocast turns itself off
            (KernelInterface, "__getitem__", launches_nothing),
            (FakeTensor, "device", property(_device, _OWN_DEVICE.fset)),
        ):
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False))
        stack.enter_context(_standing_in(True))
        yield


def as_it_is() -> Any:
    """Inside, fake tensors are where they are: for what computes their shapes."""
    return _standing_in(False) if _stands_in else nullcontext()


def _device(tensor: FakeTensor) -> torch.device:
    return GPU if _stands_in else cast(Callable[[FakeTensor], torch.device], _OWN_DEVICE.fget)(tensor)


@contextmanager
def _standing_in(value: bool) -> Iterator[None]:
    global _stands_in
    before, _stands_in = _stands_in, value
    try:
        yield
    finally:
        _stands_in = before


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = owner.__dict__.get(name) if isinstance(owner, type) else getattr(owner, name)
    inherited = isinstance(owner, type) and name not in owner.__dict__
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
