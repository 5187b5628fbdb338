"""Tensor parallelism by transformers' own plan: all ranks compute the same packs, each with its part of every layer.

Experimental, and for CUDA.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from open_po.distributed.dcp import DistributedTensorsEngine
from open_po.distributed.engine import OptimizerMaker, trained
from open_po.distributed.gradient_sums import GradientSums, step_gradients
from open_po.distributed.runtime import Runtime
from open_po.distributed.update import UpdateRules, hand_over
from open_po.distributed.vocabulary import VocabularyShards
from open_po.errors import UserError


def tensor_parallel_mesh(runtime: Runtime) -> DeviceMesh:
    """The ranks that divide a model's layers."""
    return init_device_mesh(runtime.device.type, (runtime.world_size,))


def refuse_vocabulary(entries: int, ranks: int) -> None:
    """Raises UserError for a head whose vocabulary the ranks cannot divide evenly."""
    if entries % ranks:
        raise UserError(
            f"parallel: tp needs a vocabulary that {ranks} ranks divide, this one has {entries} entries; use fsdp"
        )


class TensorParallelEngine(DistributedTensorsEngine):
    """Training of a model that transformers has divided when it loaded it."""

    def __init__(
        self,
        model: nn.Module,
        head_weight: Tensor,
        make_optimizer: OptimizerMaker,
        runtime: Runtime,
        *,
        rules: UpdateRules,
    ) -> None:
        super().__init__(model, runtime.device)
        self.team, self.lockstep_packs = runtime, True
        if isinstance(head_weight, DTensor):
            refuse_vocabulary(head_weight.shape[0], runtime.world_size)
            self.vocabulary = VocabularyShards(head_weight.device_mesh.get_group())
        self._limit = rules.limit
        self._parameters = list(trained(model).values())
        self._sums = GradientSums.of(self._parameters, rules, runtime)
        self.optimizer = make_optimizer(self._parameters)
        for group in self.optimizer.param_groups:  # kernels over many tensors take no mixture of divided and whole ones
            group["foreach"] = group["fused"] = False

    def step(self, *, packs: int) -> AbstractContextManager[object]:
        for parameter in self._parameters:
            parameter.grad = None
        return nullcontext() if self._sums is None else self._sums.step(adding=packs > 1)

    def backward(self, value: Tensor) -> None:
        value.backward()  # every rank has the whole value

    def update(self) -> float:
        gradients = step_gradients(self._parameters, self._sums)
        squares = [gradient.float().square().sum() for gradient in gradients.values()]
        total = sum(float(part.full_tensor() if isinstance(part, DTensor) else part) for part in squares)
        norm = math.sqrt(total) if math.isfinite(total) else math.nan
        if math.isfinite(norm):
            factor = min(1.0, self._limit / (norm + 1e-6))
            for gradient in gradients.values():
                gradient.mul_(factor)
            hand_over(gradients)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm
