"""Models that are made without their weights, to be given them piece by piece."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch
from accelerate import init_empty_weights
from torch import Tensor

from open_po.distributed.runtime import Runtime


def without_weights() -> AbstractContextManager[None]:
    """A context in which modules get parameters without memory (on the meta device), and real buffers."""
    return cast(AbstractContextManager[None], init_empty_weights(include_buffers=False))


def broadcast(value: Tensor, runtime: Runtime) -> None:
    """Give every rank, in place, what rank 0 has in `value`."""
    if runtime.world_size > 1:
        torch.distributed.broadcast(value, src=0)
