"""How gradients become an update: what the configuration says of it, their norm, clipping, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_po.config import TrainConfig
from open_po.config.train import GradDtype, Switch
from open_po.optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class UpdateRules:
    """What the configuration says of gradients and updates."""

    max_grad_norm: float  # 0: they are not clipped
    grad_dtype: GradDtype = "auto"
    optimizer_in_backward: Switch = "auto"
    # Of the optimizer, for each trained parameter, by the bytes of a weight.
    state_bytes: Callable[[int], float] = OPTIMIZERS["adamw"].state_bytes

    @staticmethod
    def of(config: TrainConfig) -> UpdateRules:
        return UpdateRules(
            max_grad_norm=config.max_grad_norm,
            grad_dtype=config.grad_dtype,
            optimizer_in_backward=config.optimizer_in_backward,
            state_bytes=OPTIMIZERS[config.optimizer].state_bytes,
        )

    @property
    def limit(self) -> float:
        """The largest norm that gradients may have."""
        return self.max_grad_norm or math.inf


def norm_of(gradients: Sequence[Tensor]) -> float:
    """The norm of all of them together, in float32; of ranks' parts, which are `DTensor`s, that of the whole."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        norm = torch.nn.utils.get_total_norm(gradients)
    else:
        norm = joint_norm([tensor_norm(gradient) for gradient in gradients])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def tensor_norm(gradient: Tensor) -> Tensor:
    """The norm of one gradient, a scalar on its device, in float32 where the gradient itself has less."""
    return cast(Tensor, torch.linalg.vector_norm(gradient, dtype=torch.float32))


def joint_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of what has these norms, on the first one's device."""
    if not norms:
        return torch.zeros(())
    return cast(Tensor, torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of that norm are multiplied by, as `clip_grad_norm_` has it, in float32."""
    return min(float(limit / (torch.tensor(norm, dtype=torch.float32) + 1e-6)), 1.0)


def clip_and_step(optimizer: Optimizer, limit: float, gradients: dict[nn.Parameter, Tensor]) -> float:
    """Scale gradients down to the norm `limit` if they are larger, and step if all are finite; returns their norm.

    An optimizer gets them in the precision of its weights. They are gone afterwards, from `gradients` too.
    """
    norm = norm_of(list(gradients.values()))
    if math.isfinite(norm):
        factor = clip_factor(norm, limit)
        if factor < 1.0:
            for gradient in gradients.values():
                gradient.mul_(factor)
        hand_over(gradients)
        optimizer.step()
    gradients.clear()
    optimizer.zero_grad()
    return norm


def hand_over(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Have parameters hold their gradients, each in the parameter's precision; `gradients` is empty afterwards.

    One at a time, so that what is rounded is not there twice.
    """
    while gradients:
        parameter, gradient = gradients.popitem()
        parameter.grad = gradient.to(parameter.dtype)


@contextmanager
def only(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context in which `optimizer` has no other parameters: its steps walk over these alone."""
    chosen = {id(parameter) for parameter in parameters}
    whole = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in chosen]
        yield
    finally:
        for group, all_of_it in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = all_of_it
