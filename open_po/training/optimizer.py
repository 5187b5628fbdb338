"""The optimizer, learning-rate schedules and step arithmetic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from open_po.config import TrainConfig
from open_po.optimizers import OPTIMIZERS


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = config.num_epochs * steps_per_epoch
    return steps if config.max_train_steps is None else min(steps, config.max_train_steps)


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """The optimizer that the configuration names, of these parameters."""
    return OPTIMIZERS[config.optimizer].make(list(parameters), config.learning_rate, config.weight_decay)


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
