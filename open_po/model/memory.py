"""The memory that models take, and giving it back."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress

import psutil
import torch

from open_po.memory_plan import CONTEXT_BYTES, usable


def peak_memory_bytes() -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory_bytes(device: torch.device, processes: int = 1) -> int:
    """Memory that tensors can still take: of a GPU what is free or kept by PyTorch for more, else a process's share.

    `processes` are those of this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available) // processes


def card_bytes(device: torch.device) -> float:
    """The memory of a GPU."""
    return float(torch.cuda.get_device_properties(device).total_memory)


def room_bytes(device: torch.device) -> float:
    """What this process may come to take of a GPU: what others have of it is not to be had."""
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device) + CONTEXT_BYTES["cuda"]
    return usable(total) - max(0.0, total - free - mine)


def release_memory() -> None:
    """Give the memory of models that are gone back to the GPU or the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
