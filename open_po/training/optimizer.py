"""Optimizers, learning-rate schedules and step arithmetic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from open_po.config import TrainConfig


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = config.num_epochs * steps_per_epoch
    return steps if config.max_train_steps is None else min(steps, config.max_train_steps)


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW (arXiv 1711.05101), RMSprop as in the DPO paper's own code, or plain SGD.

    Norms and biases are not decayed.
    """
    parameters = list(parameters)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.learning_rate)
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    groups = [
        {"params": [p for p in parameters if _dimensions(p) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    # Fused: one pass over a parameter's memory instead of about ten, on a CPU too.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the whole weight, of which this rank may hold a part; ZeRO-3's parts have a shape of their own."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def make_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """The learning rate over `steps` steps, warm-up included: transformers' own schedules, one step ahead.

    As they stand, their first step is taken at learning rate 0, so a run of one step would train nothing.
    """
    schedule: LRScheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_ratio * steps),
        num_training_steps=steps + 1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of a schedule that steps before its optimizer has
        schedule.step()
    return schedule
