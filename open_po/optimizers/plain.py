"""PyTorch's own optimizers."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from open_po.optimizers.spec import Settings


def adamw(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """AdamW. Norms and biases are not decayed."""
    # Fused: one pass over a parameter's memory instead of about ten, on a CPU too.
    return torch.optim.AdamW(decay_groups(parameters, settings.weight_decay), lr=settings.learning_rate, fused=True)


def rmsprop(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """RMSprop with PyTorch's defaults."""
    return torch.optim.RMSprop(parameters, lr=settings.learning_rate)


def adafactor(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """Adafactor with PyTorch's defaults. Norms and biases are not decayed."""
    return torch.optim.Adafactor(decay_groups(parameters, settings.weight_decay), lr=settings.learning_rate)


def sgd(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """Gradient descent."""
    return torch.optim.SGD(parameters, lr=settings.learning_rate)


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """The parameters in groups: those that are decayed, and norms and biases, which are not."""
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if _dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the whole weight, of which this rank may hold a part; ZeRO-3's parts have a shape of their own."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
