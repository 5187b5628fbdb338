"""Copies between the host's memory and devices, beside what a device computes where it can do both."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Transfers:
    """Copies that are made at once, as between two places of a CPU's memory."""

    def buffer(self, like: Tensor) -> Tensor:
        """Room for values of that shape and precision in the host's memory, from and to which `copy` copies."""
        return torch.empty(like.shape, dtype=like.dtype)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy what is in `source` now into `target`; one of them is on the host. Neither may change until a wait."""
        target.copy_(source)

    def wait_on_host(self) -> None:
        """Return when all copies are made."""

    def wait_on_devices(self) -> None:
        """Have devices begin nothing more before their copies are made."""


class StreamTransfers(Transfers):
    """Copies in a stream of their own on each GPU, from and to memory that the system does not move."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = {device: torch.cuda.Stream(device) for device in devices}

    def buffer(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> None:
        device = source.device if source.is_cuda else target.device
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        if source.is_cuda:
            source.record_stream(stream)  # its memory is not another's before it is read

    def wait_on_host(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def wait_on_devices(self) -> None:
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)


def make_transfers(tensors: Iterable[Tensor]) -> Transfers:
    """Those between the host and the devices of `tensors`."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    return StreamTransfers(devices) if devices else Transfers()
