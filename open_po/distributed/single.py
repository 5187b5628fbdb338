"""A model on one device, trained by one process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from open_po.distributed.engine import Engine, OptimizerMaker, clip_and_step, trained
from open_po.distributed.runtime import Runtime

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"


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
        (value * self._runtime.world_size).backward()  # several ranks' gradients are averaged

    def update(self) -> float:
        return clip_and_step(self.optimizer, self._limit)

    def save(self, folder: Path) -> None:
        self._runtime.on_main(self._write, folder)

    def _write(self, folder: Path) -> None:
        weights = {name: parameter.detach().contiguous() for name, parameter in trained(self._model).items()}
        save_file(weights, folder / WEIGHTS)
        with open(folder / OPTIMIZER, "wb") as file:
            torch.save(self.optimizer.state_dict(), file)

    def load(self, folder: Path) -> None:
        parameters = trained(self._model)
        weights = load_file(folder / WEIGHTS)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state)
