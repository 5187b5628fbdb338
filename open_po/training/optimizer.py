"""The optimizer, learning-rate schedules and step arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from open_po.config import TrainConfig
from open_po.model.numerics import Numerics
from open_po.optimizers import OPTIMIZERS, Settings

# AdamW moves a weight by about the learning rate, Adafactor by that share of a weight's size. A step of less than half
# the distance to the next bfloat16 number is rounded to none: that is 2^-14 (6.1e-5) at weights of 0.016 to 0.031, as
# most of a language model are.
_TYPICAL_WEIGHT, _SMALLEST_STEP = 0.02, 2.0**-14


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = config.num_epochs * steps_per_epoch
    return steps if config.max_train_steps is None else min(steps, config.max_train_steps)


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig, *, layers: Sequence[nn.Module] = ()
) -> Optimizer:
    """The optimizer that the configuration names, of these parameters of a model with these layers."""
    settings = Settings(
        learning_rate=config.learning_rate, weight_decay=config.weight_decay, seed=config.seed, layers=layers
    )
    return OPTIMIZERS[config.optimizer].make(list(parameters), settings)


def lost_updates(config: TrainConfig, numerics: Numerics) -> str | None:
    """A line about updates that the weights are too coarse for, if the configuration has them lost."""
    spec = OPTIMIZERS[config.optimizer]
    if numerics.weights_dtype != torch.bfloat16 or spec.keeps_small_updates:
        return None
    if config.learning_rate * (_TYPICAL_WEIGHT if spec.relative else 1.0) >= _SMALLEST_STEP:
        return None
    keeping = " or ".join(name for name, other in OPTIMIZERS.items() if other.keeps_small_updates)
    relative = " of their size" if spec.relative else ""
    return (
        f"Warning: weights in bfloat16 lose most updates of {config.optimizer} at a learning rate of "
        f"{config.learning_rate:g}{relative}, since numbers near {_TYPICAL_WEIGHT:g} are {2 * _SMALLEST_STEP:.1g} "
        f"apart there; use optimizer {keeping}, or weights_dtype float32"
    )


def long_warmup(config: TrainConfig, steps: int) -> str | None:
    """A line about a warm-up that does not end in `steps` steps."""
    warmup = config.warmup(steps)
    if warmup <= steps or config.lr_scheduler_type == "constant":
        return None
    return (
        f"Warning: warmup_steps {warmup:,} is more than the run's {steps:,} steps; the learning rate rises to "
        f"{steps / warmup:.0%} of learning_rate and no further"
    )


def make_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """The learning rate over `steps` steps, warm-up included: transformers' own schedules, one step ahead.

    As they stand, their first step is taken at learning rate 0, so a run of one step would train nothing.
    """
    schedule: LRScheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup(steps),
        num_training_steps=steps + 1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of a schedule that steps before its optimizer has
        schedule.step()
    return schedule
