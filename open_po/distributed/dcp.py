"""Checkpoints of engines whose weights are distributed tensors, by PyTorch's distributed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from open_po.distributed.engine import Engine, Saving


class DistributedTensorsEngine(Engine):
    """An engine whose ranks write, and read again on any number of ranks, each their own parts."""

    files_together = True
    _aside: torch.distributed.ProcessGroup | None = None

    def whole(self, weight: Tensor) -> Tensor:
        return gathered(weight)

    def save(self, folder: Path) -> None:
        with _first_failure():
            dcp.save(self._state(), checkpoint_id=folder)

    def begin_save(self, folder: Path) -> Saving:
        if self._aside is None:  # while training goes on its collectives are others, and the ranks speak over CPUs
            self._aside = torch.distributed.new_group(backend="gloo")
        with _first_failure():
            future = dcp.async_save(self._state(), checkpoint_id=folder, process_group=self._aside)
        return _Writing(cast(Any, future))

    def load(self, folder: Path) -> None:
        state = self._state()
        with _first_failure():
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )

    def _state(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.module, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}


def gathered(weight: Tensor) -> Tensor:
    """A weight as a whole, whether it is a distributed tensor or not; its ranks call this alike."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class _Writing(Saving):
    """A copy of this rank's part on its way to the disk."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        with _first_failure():
            self._future.result()


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise what failed on a rank: the exception that says so on all of them is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise reason from error
