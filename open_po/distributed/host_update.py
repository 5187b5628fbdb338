"""An optimizer in the host's memory: its states, and the float32 weights that it updates, while those of the model stay
on their device, in their own precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_po.distributed.engine import OptimizerMaker
from open_po.distributed.gradient_sums import GradientSums, step_gradients
from open_po.distributed.transfers import make_transfers
from open_po.distributed.update import clip_factor, joint_norm, only, tensor_norm


class HostUpdate:
    """Gradients come to the host, are clipped and used there, and the new weights go back.

    Each weight goes as soon as it is ready, while the host works on the next one. While `eager` a gradient leaves its
    device as soon as a backward pass has completed it.
    """

    optimizer: Optimizer  # of the float32 weights

    def __init__(
        self, parameters: Sequence[nn.Parameter], make_optimizer: OptimizerMaker, sums: GradientSums | None
    ) -> None:
        self._sums = sums  # made before: it takes a gradient from its parameter first
        self._transfers = make_transfers(parameters)
        self.masters = {p: nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in parameters}
        self.optimizer = make_optimizer(self.masters.values())
        # In a weight's precision: its gradient on the way here, and its new value on the way back.
        self._buffers = {parameter: self._transfers.buffer(parameter) for parameter in parameters}
        self._norms: dict[nn.Parameter, Tensor] = {}  # of the step's gradients that have come
        self.eager = False
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._complete)

    def begin(self) -> None:
        """A step begins."""
        self._norms.clear()

    def take(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Send a gradient, all of the step's, to the host; the caller's may go."""
        self._norms[parameter] = tensor_norm(gradient)
        self._transfers.copy(gradient.to(parameter.dtype), self._buffers[parameter])

    def update(self, limit: float) -> float:
        """Clip and step as `clip_and_step`, with the gradients that were taken; returns their norm."""
        norm = float(joint_norm([self._norms[parameter] for parameter in self.masters if parameter in self._norms]))
        self._transfers.wait_on_host()
        if math.isfinite(norm):
            factor = clip_factor(norm, limit)
            for parameter, master in self.masters.items():
                if parameter in self._norms:
                    self._step(parameter, master, factor)
        self._transfers.wait_on_devices()
        self._norms.clear()
        return norm

    def restore(self) -> None:
        """Have the model's weights follow those on the host, which were loaded."""
        for parameter, master in self.masters.items():
            parameter.data.copy_(master)

    def _complete(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if self.eager:
            self.take(parameter, step_gradients([parameter], self._sums)[parameter])

    def _step(self, parameter: nn.Parameter, master: nn.Parameter, factor: float) -> None:
        buffer = self._buffers[parameter]
        master.grad = buffer.to(master.dtype)
        if factor < 1.0:
            master.grad.mul_(factor)
        with only(self.optimizer, [master]):
            self.optimizer.step()
        master.grad = None
        # Rounded here, so that no more bytes travel than the model's weights have.
        self._transfers.copy(buffer.copy_(master.detach()), parameter.data)
