"""AdamW whose states the driver moves between a GPU's memory and the host's."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import PagedAdamW
from torch import nn
from torch.optim import Optimizer

from open_po.optimizers.plain import decay_groups
from open_po.optimizers.spec import Settings


def adamw_paged(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """bitsandbytes' paged AdamW. Norms and biases are not decayed."""
    return _Paged(decay_groups(parameters, settings.weight_decay), lr=settings.learning_rate)


class _Paged(PagedAdamW):  # type: ignore[misc]
    """As bitsandbytes has it, but that states from a checkpoint are in pages too."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        super().load_state_dict(state_dict, move_to_device=False)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    page = self.get_state_buffer(parameter, dtype=value.dtype)
                    page.copy_(value)
                    state[name] = page
