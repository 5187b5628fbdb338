"""How the gradients of a step's packs become one update of the weights, over all ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from open_po.distributed.runtime import Runtime


class Engine:
    """A single process, or PyTorch's DistributedDataParallel: whichever accelerate was launched with.

    For every pack of a step, `with engine.pack(last=...)` around its forward pass and `backward`; then
    `clip_gradients` and `update`, once. Forward passes go through `module`, which is what the ranks have wrapped.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, runtime: Runtime) -> None:
        self._accelerator = runtime.accelerator
        self._world_size = runtime.world_size
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.module, self._optimizer = self._accelerator.prepare(module, optimizer)

    def pack(self, *, last: bool) -> AbstractContextManager[None]:
        """The context of a pack's forward and backward pass; the ranks' gradients are summed in the `last` one's."""
        return nullcontext() if last else cast(AbstractContextManager[None], self._accelerator.no_sync(self.module))

    def backward(self, value: Tensor) -> None:
        """Add the gradient of `value`, this rank's part of a sum over all ranks."""
        (value * self._world_size).backward()  # the ranks' gradients are averaged

    def clip_gradients(self, limit: float) -> float:
        """Scale the step's gradients down to the norm `limit`, if they are larger; returns the norm they had."""
        return float(cast(Tensor, self._accelerator.clip_grad_norm_(self._parameters, limit)))

    def update(self) -> None:
        """One optimizer step; gradients are gone afterwards."""
        self._optimizer.step()
        self._optimizer.zero_grad()
