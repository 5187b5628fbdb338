"""The optimizer's step taken in the backward pass: a gradient is used and gone as soon as it is complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_po.distributed.update import joint_norm, only, tensor_norm

# Bytes of gradients that wait for one call of the optimizer, which takes 60 us besides its arithmetic.
_TOGETHER = 32 * 2**20


class UpdateInBackward:
    """Updates for steps of one pack whose gradients are not clipped."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._lock = Lock()  # each GPU has a backward thread of its own
        self._active = False
        self._refused = False
        self._waiting: list[nn.Parameter] = []
        self._norms: dict[nn.Parameter, Tensor] = {}
        self.weights_changed = False  # in the step that is under way
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._complete)

    @property
    def active(self) -> bool:
        """Whether the step under way is updated here."""
        return self._active

    def begin(self, *, active: bool) -> None:
        """A step begins, to be updated here if it is `active`."""
        self._active, self._refused, self.weights_changed = active, False, False
        self._waiting.clear()
        self._norms.clear()

    def backward(self, value: Tensor) -> None:
        """The backward pass of `value`, unless it is not finite: then no weight changes."""
        if bool(torch.isfinite(value)):
            value.backward()
        else:
            self._refused = True

    def finish(self) -> float:
        """Take what waits into the weights, if it is finite; returns the norm of all gradients of the step.

        It is not a number if the backward pass was refused. Of gradients that are not finite some may be in the
        weights: `weights_changed`.
        """
        self._active = False
        for parameter in self._waiting:
            self._note(parameter)
        norms = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
        norm = math.nan if self._refused else float(joint_norm(norms))
        if math.isfinite(norm):
            self._step()
        self._waiting.clear()
        self._optimizer.zero_grad()
        return norm

    def _complete(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if not self._active:
            return
        with self._lock:
            self._waiting.append(parameter)
            if sum(waiting.nbytes for waiting in self._waiting) >= _TOGETHER:
                for waiting in self._waiting:
                    self._note(waiting)
                self._step()

    def _note(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = tensor_norm(parameter.grad)

    def _step(self) -> None:
        if not self._waiting:
            return
        self.weights_changed = True
        with only(self._optimizer, self._waiting):
            self._optimizer.step()
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting.clear()
