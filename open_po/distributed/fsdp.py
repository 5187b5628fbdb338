"""A model whose weights, gradients and optimizer states are divided among ranks by PyTorch's `fully_shard` (FSDP2).

A layer's weights are gathered while it computes, and dropped again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from open_po.distributed.dcp import DistributedTensorsEngine, gathered
from open_po.distributed.engine import Fill, OptimizerMaker, Placement, trained
from open_po.distributed.gradient_sums import GradientSums, dtype_of_sums, step_gradients
from open_po.distributed.runtime import Runtime
from open_po.distributed.update import UpdateRules, clip_and_step
from open_po.memory_plan import whole_gradients_fit


class FsdpPlacement(Placement):
    """The weights of a model, divided among the ranks: each of `units` by itself, what is left together.

    Each is filled before it is divided, so that a rank holds its parts and one whole unit. Gradients are summed in
    `reduce_dtype`, over ranks and over packs that are not reduced; None: in the weights' own.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        fill: Fill,
        runtime: Runtime,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, runtime.device)
        self.team = runtime
        mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
        if runtime.group is not None:
            mesh = DeviceMesh.from_group(runtime.group, runtime.device.type)
        # On a CPU weights are in the host's memory anyway.
        offloaded = runtime.parallelism.offload_param and runtime.device.type == "cuda"
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
            "reshard_after_forward": runtime.parallelism.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy() if offloaded else OffloadPolicy(),
        }
        for unit in [*units, model]:
            fill(unit)
            fully_shard(unit, **options)
        if not runtime.parallelism.reshard_after_forward:
            model.register_forward_hook(_drop_unless_trained)

    def whole(self, weight: Tensor) -> Tensor:
        return gathered(weight)


class FsdpEngine(DistributedTensorsEngine):
    """Training of a model that `FsdpPlacement` has divided."""

    lockstep_packs = True

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        fill: Fill,
        make_optimizer: OptimizerMaker,
        runtime: Runtime,
        *,
        rules: UpdateRules,
    ) -> None:
        super().__init__(model, runtime.device)
        self.team = runtime
        dtype = dtype_of_sums(trained(model).values(), rules, runtime)
        FsdpPlacement(model, units, fill, runtime, dtype)
        self._world_size = runtime.world_size
        self._model = cast(FSDPModule, model)
        self._limit = rules.limit
        # Now: after a forward pass without gradients the root's weights stay whole, and are not what is trained.
        self._parameters = list(trained(model).values())
        self.optimizer = make_optimizer(self._parameters)
        # A bfloat16 sum of whole gradients would be PyTorch's, which loses what is small.
        once = dtype != torch.bfloat16 and _reduces_once(self._parameters, dtype, runtime.device)
        self._reduces_once = all(runtime.gather(once))
        self._sums = None if dtype is None or self._reduces_once else GradientSums(self._parameters, dtype)

    def step(self, *, packs: int) -> AbstractContextManager[object]:
        for parameter in self._parameters:
            parameter.grad = None
        return nullcontext() if self._sums is None else self._sums.step(adding=packs > 1)

    @contextmanager
    def pack(self, *, last: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(last or not self._reduces_once)
        yield

    def backward(self, value: Tensor) -> None:
        (value * self._world_size).backward()  # the ranks' gradients are averaged

    def update(self) -> float:
        return clip_and_step(self.optimizer, self._limit, step_gradients(self._parameters, self._sums))


def _drop_unless_trained(module: nn.Module, *_: object) -> None:
    """Drop gathered weights where no backward pass will: what stayed would be taken for what is trained."""
    if not torch.is_grad_enabled():
        cast(FSDPModule, module).reshard()


def _reduces_once(parameters: Sequence[nn.Parameter], dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether gradients of all packs may be added up on each rank, whole, before they are reduced; in `dtype`."""
    if device.type != "cuda":
        return True
    needed = sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in parameters)
    return whole_gradients_fit(needed, torch.cuda.get_device_properties(device).total_memory)
