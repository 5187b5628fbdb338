"""Tensors that wait for the backward pass in host memory, and come back shortly before it needs them.

On CUDA they travel on a stream of their own beside the computation, to and from pinned memory. Only so many bytes are
on their way in either direction: what leaves is freed when it has arrived, and what comes back comes in the order in
which the backward pass will ask.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_LEAST_BYTES = 2**20  # of a storage; a smaller one takes longer to send than it is worth
_IN_FLIGHT_BYTES = 256 * 2**20


class Traffic(Protocol):
    """How bytes travel between a device and host memory; an arrival is whatever `wait` takes, None if it is over."""

    def send(self, source: Tensor) -> tuple[Tensor, Any]:
        """A copy of `source` on the host, and its arrival, until which `source` must stay as it is."""

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """A copy of `host` on the device, and its arrival, until which it must not be read."""

    def wait(self, arrival: Any) -> None:
        """Let what the device computes from now on come after `arrival`."""


class HostTraffic:
    """For a device whose memory is the host's: a copy, at once."""

    def send(self, source: Tensor) -> tuple[Tensor, Any]:
        return source.clone(), None

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        return host, None

    def wait(self, arrival: Any) -> None:
        pass


class CudaTraffic:
    """By a CUDA stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, source: Tensor) -> tuple[Tensor, Any]:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return host, self._copy(host, source)

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        # Memory of the stream that computes: freed there, it is not used again before what was computed with it.
        target = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        return target, self._copy(target, host)

    def wait(self, arrival: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(arrival)

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        # What is sent must have been computed, and the memory of what comes back must be free.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


class _Copy:
    """Bytes of a storage on the host, and on the device while they travel or are in use."""

    def __init__(self, source: Tensor, traffic: Traffic, index: int) -> None:
        self.host, self.arrival = traffic.send(source)
        self.device: Tensor | None = source
        self.traffic, self.index = traffic, index
        self.nbytes = source.nbytes
        self.in_use = False

    def wait(self) -> None:
        """What is computed from now on finds the bytes where they were sent."""
        if self.arrival is not None:
            self.traffic.wait(self.arrival)
            self.arrival = None

    def __del__(self) -> None:
        self.wait()  # or memory that was never asked for would be used again while bytes still go through it

    def fetch(self) -> None:
        """Let the bytes set out for the device, if they are not there."""
        if self.device is None:
            self.device, self.arrival = self.traffic.fetch(self.host)


@dataclass(frozen=True)
class OffloadedView:
    """A saved tensor: a view of bytes that are on the host."""

    offload: HostOffload
    copy: _Copy
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements from the first of the bytes

    def restore(self) -> Tensor:
        held = self.offload.bring(self.copy)
        view = torch.empty(0, dtype=self.dtype, device=held.device)
        # What has not left yet may be a part of its storage.
        first = int(held.storage_offset()) // view.element_size()
        return view.set_(held.untyped_storage(), first + self.offset, self.size, self.stride)


def _traffic_of(device: torch.device) -> Traffic:
    return CudaTraffic(device) if device.type == "cuda" else HostTraffic()


class HostOffload:
    """Saved tensors in host memory, the bytes of each storage once, however many views of it are saved."""

    def __init__(self, make_traffic: Callable[[torch.device], Traffic] = _traffic_of) -> None:
        self.sent_bytes = 0  # so far
        self._make_traffic = make_traffic
        self._traffic: dict[torch.device, Traffic] = {}
        self._leaving: deque[_Copy] = deque()
        self._order: list[weakref.ref[_Copy]] = []  # as they were saved; the backward pass asks from the end
        self._ahead: list[weakref.ref[_Copy]] = []  # that were fetched before they were asked for
        # A storage that a weak reference knows leaves its identity to no other.
        self._known: dict[tuple[StorageWeakRef, int, int, int], weakref.ref[_Copy]] = {}

    def begin(self) -> None:
        """A forward pass begins."""
        while self._order and self._order[-1]() is None:
            self._order.pop()

    def end(self) -> None:
        """It has ended."""
        self._known.clear()

    def takes(self, tensor: Tensor) -> bool:
        """Whether `tensor` is worth sending: large, and neither a weight nor a view of one."""
        return (
            type(tensor) is Tensor
            and not isinstance(tensor._base, nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.numel() > 0
            and tensor.untyped_storage().nbytes() >= _LEAST_BYTES
        )

    def pack(self, tensor: Tensor) -> OffloadedView:
        """`tensor`, from now on in host memory."""
        storage = tensor.untyped_storage()
        size, start = tensor.element_size(), int(tensor.storage_offset())
        first = start * size
        extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        last = first + extent * size
        if 2 * (last - first) >= storage.nbytes() or last - first < _LEAST_BYTES:
            first, last = 0, storage.nbytes()
        key = StorageWeakRef(storage), tensor._version, first, last
        known = self._known.get(key)
        copy = None if known is None else known()
        if copy is None:
            copy = self._send(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)[first:last])
            self._known[key] = weakref.ref(copy)
        return OffloadedView(self, copy, tensor.dtype, tensor.size(), tensor.stride(), start - first // size)

    def bring(self, copy: _Copy) -> Tensor:
        """The bytes of `copy` on the device; those that will be asked for next set out."""
        while self._leaving:  # the backward pass has begun: the last ones saved are there still, and needed first
            self._leaving.popleft().wait()
        copy.fetch()
        copy.wait()
        copy.in_use = True
        self._fetch_ahead(copy.index)
        assert copy.device is not None
        return copy.device

    def _send(self, source: Tensor) -> _Copy:
        if source.device not in self._traffic:
            self._traffic[source.device] = self._make_traffic(source.device)
        copy = _Copy(source, self._traffic[source.device], len(self._order))
        self._order.append(weakref.ref(copy))
        self.sent_bytes += copy.nbytes
        if copy.arrival is None:
            copy.device = None
            return copy
        self._leaving.append(copy)
        while len(self._leaving) > 1 and sum(leaving.nbytes for leaving in self._leaving) > _IN_FLIGHT_BYTES:
            oldest = self._leaving.popleft()
            oldest.wait()
            oldest.device = None
        return copy

    def _fetch_ahead(self, index: int) -> None:
        ahead = [copy for copy in (known() for known in self._ahead) if copy is not None and not copy.in_use]
        room = _IN_FLIGHT_BYTES - sum(copy.nbytes for copy in ahead)
        for earlier in range(index - 1, -1, -1):
            if room <= 0:
                break
            copy = self._order[earlier]()
            if copy is not None and copy.device is None:
                copy.fetch()
                ahead.append(copy)
                room -= copy.nbytes
        self._ahead = [weakref.ref(copy) for copy in ahead]
