"""What describes an optimizer: its name, the memory of its states, and what it does to weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    # The trained parameters, the learning rate and the weight decay.
    Maker = Callable[[list[nn.Parameter], float, float], Optimizer]


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer that `optimizer` can name. The module says nothing to torch before one is made."""

    name: str
    summary: str  # one line, for the documentation
    maker: str  # MODULE:FUNCTION of its `Maker`
    state_bytes: Callable[[int], float]  # of its states, for each trained parameter, by the bytes of a weight
    decays: bool = False  # whether it applies weight_decay
    on_host: bool = False  # whether it can update float32 weights in the host's memory: offload_optimizer

    @property
    def make(self) -> Maker:
        """The function that makes it; its module is imported now."""
        module, function = self.maker.split(":")
        return cast("Maker", getattr(import_module(module), function))
