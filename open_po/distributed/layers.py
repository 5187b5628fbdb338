"""One model over the GPUs of one process, layer by layer: the simplest way to fit, with one GPU at work at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_po.distributed.engine import OptimizerMaker, Placement
from open_po.distributed.runtime import Runtime
from open_po.distributed.single import SingleEngine
from open_po.distributed.update import UpdateRules
from open_po.memory_plan import share_out


class LayersPlacement(Placement):
    """The layers of a model dealt out to devices in order; all that is no layer stays on the first.

    What a layer is called with follows it to its device, and what the last one returns comes back to the first.
    """

    def __init__(self, model: nn.Module, units: Sequence[nn.Module], devices: Sequence[torch.device]) -> None:
        super().__init__(model, devices[0])
        inside = {id(weight) for unit in units for weight in unit.parameters()}
        around = sum(weight.nbytes for weight in model.parameters() if id(weight) not in inside)
        sizes = [sum(weight.nbytes for weight in unit.parameters()) for unit in units]
        numbers = share_out(sizes, around, len(devices))
        for unit, number in zip(units, numbers, strict=True):
            unit.to(devices[number])
            if number:
                unit.register_forward_pre_hook(_Follow(devices[number]).inputs, with_kwargs=True)
        rest_on(model, units, devices[0])
        if units and numbers[-1]:
            units[-1].register_forward_hook(_Follow(devices[0]).output)


class LayersEngine(SingleEngine):
    """Training of a model that `LayersPlacement` has dealt out."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        make_optimizer: OptimizerMaker,
        runtime: Runtime,
        *,
        rules: UpdateRules,
    ) -> None:
        LayersPlacement(model, units, visible_gpus())
        super().__init__(model, make_optimizer, runtime, rules=rules)


def visible_gpus() -> list[torch.device]:
    """The devices that layers are dealt out to."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def rest_on(model: nn.Module, units: Sequence[nn.Module], device: torch.device) -> None:
    """Move what is in none of the `units`."""
    inside = {id(module) for unit in units for module in unit.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)


class _Follow:
    """Hooks that move tensors, and what else can be moved, to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self._moved(args), self._moved(kwargs)

    def output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._moved(output)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device, non_blocking=True)
        if isinstance(value, tuple):
            return tuple(map(self._moved, value))
        if isinstance(value, dict):
            return {name: self._moved(item) for name, item in value.items()}
        return value.to(self._device) if hasattr(value, "to") else value
