"""A model on one device, trained by one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from open_po.distributed.engine import Engine, OptimizerMaker, Saving, clip_and_step, trained
from open_po.distributed.runtime import Runtime

_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.pt"


class SingleEngine(Engine):
    """One process with the whole model."""

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerMaker, runtime: Runtime, *, max_grad_norm: float
    ) -> None:
        super().__init__(model, runtime.device)
        self._model, self._runtime = model, runtime
        self._limit = max_grad_norm or float("inf")
        self.optimizer = make_optimizer(trained(model).values())

    def backward(self, value: Tensor) -> None:
        value.backward()

    def update(self) -> float:
        return clip_and_step(self.optimizer, self._limit)

    def save(self, folder: Path) -> None:
        self._runtime.on_main(lambda: _write(folder, *self._state()))

    def begin_save(self, folder: Path) -> Saving:
        if not self._runtime.is_main:
            return Saving()
        return _Writing(folder, *tree_map(_on_host, self._state()))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = {name: parameter.detach().contiguous() for name, parameter in trained(self._model).items()}
        return weights, self.optimizer.state_dict()

    def load(self, folder: Path) -> None:
        parameters = trained(self._model)
        weights = load_file(folder / _WEIGHTS)
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state)


class _Writing(Saving):
    """A copy of the state on its way to the disk."""

    def __init__(self, folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        writer = ThreadPoolExecutor(1)
        self._future = writer.submit(_write, folder, weights, optimizer)
        writer.shutdown(wait=False)

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._future.result()


def _write(folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
    save_file(weights, folder / _WEIGHTS)
    with open(folder / _OPTIMIZER, "wb") as file:
        torch.save(optimizer, file)


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
