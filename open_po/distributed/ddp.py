"""A whole model on every rank, gradients averaged by PyTorch's DistributedDataParallel."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from open_po.distributed.engine import OptimizerMaker
from open_po.distributed.runtime import Runtime
from open_po.distributed.single import SingleEngine


class DdpEngine(SingleEngine):
    """As a single process on every rank; gradients are summed in the last pack of a step."""

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerMaker, runtime: Runtime, *, max_grad_norm: float
    ) -> None:
        super().__init__(model, make_optimizer, runtime, max_grad_norm=max_grad_norm)
        devices = [runtime.device] if runtime.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name that says it in torch 2.11 too
            self.module = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def backward(self, value: Tensor) -> None:
        (value * self._runtime.world_size).backward()  # the ranks' gradients are averaged

    def pack(self, *, last: bool) -> AbstractContextManager[object]:
        module = cast(DistributedDataParallel, self.module)
        return nullcontext() if last else cast(AbstractContextManager[object], module.no_sync())
