"""A model on one device, trained by one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from open_po.distributed.engine import Engine, OptimizerMaker, Saving, trained
from open_po.distributed.gradient_sums import GradientSums, step_gradients
from open_po.distributed.host_update import HostUpdate
from open_po.distributed.in_backward import UpdateInBackward
from open_po.distributed.parallelism import IN_BACKWARD
from open_po.distributed.runtime import Runtime
from open_po.distributed.update import UpdateRules, clip_and_step
from open_po.errors import UserError

WEIGHTS = "weights.safetensors"  # the trained ones, by their names in the module
_OPTIMIZER = "optimizer.pt"


class SingleEngine(Engine):
    """One process with the whole model."""

    can_discard = True
    can_retry = True

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerMaker, runtime: Runtime, *, rules: UpdateRules
    ) -> None:
        super().__init__(model, runtime.device)
        self._model, self._runtime, self._rules = model, runtime, rules
        parameters = self._parameters = list(trained(model).values())
        self._sums = GradientSums.of(parameters, rules, runtime)
        self._host: HostUpdate | None = None
        if runtime.parallelism.offload_optimizer:
            self._host = HostUpdate(parameters, make_optimizer, self._sums)
        self.optimizer = make_optimizer(parameters) if self._host is None else self._host.optimizer
        self._in_backward: UpdateInBackward | None = None
        if self._updates_in_backward():
            self._in_backward = UpdateInBackward(parameters, self.optimizer)
        self._packs = 0  # of the step under way
        self._told = False  # that a step could not be updated in its backward pass

    def _updates_in_backward(self) -> bool:
        """Whether steps of one pack are updated in the backward pass."""
        possible = self._runtime.parallelism.kind in IN_BACKWARD and self._host is None
        return possible and self._rules.max_grad_norm == 0 and self._rules.optimizer_in_backward != "off"

    @property
    def weights_changed(self) -> bool:
        return self._in_backward is not None and self._in_backward.weights_changed

    @property
    def spared_gradients(self) -> int:
        if self._packs != 1 or (self._in_backward is None and self._host is None):
            return 0
        sums = self._sums
        dtypes = [(p, p.dtype if sums is None else sums.dtype_of(p)) for p in self._parameters]
        return sum(parameter.numel() * dtype.itemsize for parameter, dtype in dtypes)

    @contextmanager
    def step(self, *, packs: int) -> Iterator[None]:
        self.discard()
        self._packs = packs
        if self._in_backward is not None:
            self._in_backward.begin(active=packs == 1)
            if packs > 1 and self._rules.optimizer_in_backward == "on" and not self._told:
                self._told = True
                self._runtime.say(
                    f"optimizer_in_backward: gradients of a step of {packs} packs add up first; with one pack, of a "
                    "larger max_tokens_per_batch or a smaller batch, they need not be held"
                )
        with nullcontext() if self._sums is None else self._sums.step(adding=self._adds(packs)):
            yield

    def _adds(self, packs: int) -> bool:
        """Whether sums are kept of a step of so many packs."""
        return packs > 1

    @contextmanager
    def pack(self, *, last: bool) -> Iterator[None]:
        if self._host is not None:
            self._host.eager = last
        try:
            yield
        finally:
            if self._host is not None:
                self._host.eager = False

    def backward(self, value: Tensor) -> None:
        if self._in_backward is not None and self._in_backward.active:
            self._in_backward.backward(value)
        else:
            value.backward()

    def discard(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        if self._sums is not None:
            self._sums.clear()
        if self._host is not None:
            self._host.begin()
        if self._in_backward is not None:
            self._in_backward.begin(active=False)

    def update(self) -> float:
        if self._in_backward is not None and self._in_backward.active:
            return self._in_backward.finish()
        gradients = self._gradients()
        if self._host is None:
            return clip_and_step(self.optimizer, self._rules.limit, gradients)
        while gradients:
            self._host.take(*gradients.popitem())
        return self._host.update(self._rules.limit)

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """Those of a step whose packs are all done."""
        return step_gradients(self._parameters, self._sums)

    def save(self, folder: Path) -> None:
        self._runtime.on_main(lambda: _write(folder, *self._state()))

    def begin_save(self, folder: Path) -> Saving:
        if not self._runtime.is_main:
            return Saving()
        return _Writing(folder, *tree_map(_on_host, self._state()))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = {name: weight.detach().contiguous() for name, weight in self._updated().items()}
        return weights, self.optimizer.state_dict()

    def _updated(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by the names of the model's weights."""
        masters = {} if self._host is None else self._host.masters
        return {name: masters.get(parameter, parameter) for name, parameter in trained(self._model).items()}

    def load(self, folder: Path) -> None:
        parameters = self._updated()
        weights = load_file(folder / WEIGHTS)
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        for name, value in weights.items():
            if value.dtype != parameters[name].dtype:
                raise UserError(
                    f"resume_from_checkpoint {folder}: its weights are {_word(value)}, those that this run updates "
                    f"{_word(parameters[name])}; set dtype, weights_dtype and offload_optimizer as in the run that "
                    "wrote it"
                )
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state)
        if self._host is not None:
            self._host.restore()


def _word(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


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
    save_file(weights, folder / WEIGHTS)
    with open(folder / _OPTIMIZER, "wb") as file:
        torch.save(optimizer, file)


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
