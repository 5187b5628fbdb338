"""What describes an optimizer: its name, the memory of its states, and what it does to weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    Maker = Callable[[list[nn.Parameter], "Settings"], Optimizer]  # of the trained parameters

# All kinds of `open_po.distributed.parallelism`.
EVERYWHERE = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp", "layers", "tp")
# Those under which a parameter keeps its shape; DeepSpeed's lay all parameters into one row of numbers.
SHAPED = ("single", "ddp", "fsdp", "layers")
WHOLE = ("single", "ddp", "layers")  # and those under which a rank has all of it
# What an optimizer keeps of a bfloat16 weight besides the weight is in its state under this name.
COMPENSATION = "compensation"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an optimizer is made with, besides the parameters."""

    learning_rate: float
    weight_decay: float = 0.0
    seed: int = 0  # of what it draws
    layers: Sequence[nn.Module] = ()  # of the model, a stack; what is in none of them is embedding, head or last norm


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer that `optimizer` can name. The module says nothing to torch before one is made."""

    name: str
    summary: str  # one line, for the documentation
    maker: str  # MODULE:FUNCTION of its `Maker`
    state_bytes: Callable[[int], float]  # of its states, for each trained parameter, by the bytes of a weight
    matrix_bytes: Callable[[int], float] | None = None  # the same for the matrices of layers, where it differs
    decays: bool = False  # whether it applies weight_decay
    on_host: bool = False  # whether it can update float32 weights in the host's memory: offload_optimizer
    relative: bool = False  # whether learning_rate is a share of a weight's size
    keeps_small_updates: bool = False  # of bfloat16 weights, which a plain optimizer rounds away
    parallel: tuple[str, ...] = EVERYWHERE  # the engines that it goes with
    needs_cuda: bool = False
    package: str | None = None  # that it needs, besides PyTorch

    @property
    def is_installed(self) -> bool:
        """Whether what it needs is there; nothing is imported."""
        return self.package is None or find_spec(self.package) is not None

    @property
    def make(self) -> Maker:
        """The function that makes it; its module is imported now."""
        module, function = self.maker.split(":")
        return cast("Maker", getattr(import_module(module), function))
