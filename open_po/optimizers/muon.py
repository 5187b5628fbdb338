"""Muon for the matrices of a model's layers, AdamW for what else there is, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from open_po.errors import UserError
from open_po.optimizers.plain import adamw
from open_po.optimizers.spec import Settings


def muon(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """Muon (torch.optim.Muon) with updates as large as AdamW's (arXiv 2502.16982), so that learning rates are alike.

    Raises UserError if the model's layers cannot be told, or have no matrices.
    """
    inside = {id(parameter) for layer in settings.layers for parameter in layer.parameters()}
    matrices = [parameter for parameter in parameters if id(parameter) in inside and parameter.ndim == 2]
    if not matrices:
        raise UserError("optimizer: muon trains the matrices of a model's layers, and finds none; use adamw")
    taken = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in taken]
    first = torch.optim.Muon(
        matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Joint([first, adamw(rest, settings)] if rest else [first])


class Joint(Optimizer):
    """Several optimizers that a schedule and a checkpoint see as one."""

    def __init__(self, parts: list[Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, defaults={})
        self._parts = [(part, len(part.param_groups)) for part in parts]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Have each of them step."""
        first = 0
        for part, count in self._parts:
            # Now: what loads a checkpoint makes groups and states anew.
            part.param_groups, part.state = self.param_groups[first : first + count], self.state
            part.step()
            first += count
