"""What the rest of the code knows of how a model is spread over ranks and trained on them.

Behind it stand a single process (`single.py`), PyTorch's DistributedDataParallel (`ddp.py`), its `fully_shard`
(`fsdp.py`), DeepSpeed's ZeRO (`zero.py`), a model over several GPUs of one process (`layers.py`) and transformers'
tensor parallelism (`tensor_parallel.py`); `make_engine.py` makes the one that a run asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_po.distributed.runtime import Runtime
from open_po.distributed.vocabulary import VocabularyShards
from open_po.optimizers import COMPENSATION

OptimizerMaker = Callable[[Iterable[nn.Parameter]], Optimizer]
Fill = Callable[[nn.Module], None]  # gives the weights of a module their values, on all ranks


class Placement:
    """Where a model's weights lie, and the module that its forward passes go through; here whole, on each rank."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device  # that it computes on
        self.team: Runtime | None = None  # the ranks that must run the same number of forward passes, if any
        self.vocabulary: VocabularyShards | None = None  # if the head's is divided in the forward pass too

    def whole(self, weight: Tensor) -> Tensor:
        """A weight, of which a rank may hold a part, as a whole on every rank; all of them call this alike."""
        return weight.detach()


class Held(NamedTuple):
    """A rank's part of a trained weight, its own memory."""

    values: Tensor  # flat
    compensation: Tensor | None  # what the optimizer keeps besides of each number, if it does
    whole: int  # how many numbers all ranks' parts are


class Saving:
    """A state that is being written; by itself one that has been."""

    def done(self) -> bool:
        """Whether this rank's part is written, or has failed."""
        return True

    def wait(self) -> None:
        """Return when it is; all ranks call this. Raises what went wrong."""


class Engine(Placement, ABC):
    """A model that is trained: how the gradients of a step's packs become one update of the weights, over all ranks.

    Every step: `with engine.step(packs=n)` around `with engine.pack(last=...)` for each pack, and in that its forward
    pass and `backward`; then `update`. All ranks take the same steps, and with `lockstep_packs` as many packs in each.
    """

    lockstep_packs = False
    portable = True  # whether another number of ranks can load what `save` writes
    files_together = False  # whether ranks talk to one another in `save` and `load`
    can_discard = False  # whether `discard` leaves nothing of the packs of a step that has not been updated
    can_retry = False  # whether a step may begin anew after `discard`, on this rank alone
    optimizer: Optimizer  # whose groups a schedule gives their learning rates

    @property
    def weights_changed(self) -> bool:
        """Whether the step under way has changed weights before `update` was called, or before it gave up."""
        return False

    @property
    def spared_gradients(self) -> int:
        """Bytes of gradients that the step under way would hold if it had several packs, and does not with its one."""
        return 0

    def step(self, *, packs: int) -> AbstractContextManager[object]:
        """The context of all packs of a step, so many; what a step that failed has left is gone.

        0: packs that are tried, which no update follows.
        """
        return nullcontext()

    def pack(self, *, last: bool) -> AbstractContextManager[object]:
        """The context of a pack's forward and backward pass, the `last` of its step or not."""
        return nullcontext()

    @abstractmethod
    def backward(self, value: Tensor) -> None:
        """Add the gradient of `value`, this rank's part of a sum over all ranks."""

    def discard(self) -> None:
        """Drop the gradients that the packs of a step have added so far; only with `can_discard`."""
        raise NotImplementedError(type(self).__name__)

    @abstractmethod
    def update(self) -> float:
        """Clip the gradients and take one optimizer step; they are gone afterwards.

        Returns the norm that they had. If it is not finite no weight has changed, unless `weights_changed` says so.
        """

    def held(self) -> list[Held]:
        """This rank's part of the trained weights."""
        found = []
        for parameter in chain.from_iterable(group["params"] for group in self.optimizer.param_groups):
            besides = self.optimizer.state.get(parameter, {}).get(COMPENSATION)
            flat = None if besides is None else part_of(besides).view(-1)
            found.append(Held(part_of(parameter.detach()).view(-1), flat, parameter.numel()))
        return found

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write trained weights and the optimizer's state; all ranks call this. Raises OSError."""

    def begin_save(self, folder: Path) -> Saving:
        """As `save`, of the state that there is now, but written while training goes on, if the engine can."""
        self.save(folder)
        return Saving()

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take over what `save` wrote; all ranks call this. Raises whatever a reader makes of a damaged file."""


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that ranks may divide."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer updates, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
