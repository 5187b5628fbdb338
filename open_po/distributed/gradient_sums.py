"""Gradients of bfloat16 weights over the packs of a step, added up without losing what is small.

PyTorch adds a pack's gradient to the sum in the precision of the weights: an addend below half of the sum's last digit
is lost, always, and near that it is rounded to one side. Here the sum is float32, or bfloat16 that is rounded up or
down by chance, so that it is right in the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_po.distributed.runtime import Runtime
from open_po.distributed.update import UpdateRules
from open_po.errors import UserError
from open_po.memory_plan import float32_sums_fit

_LOW_BITS = 16  # of a float32, which a bfloat16 has not


class GradientSums:
    """The sums over a step's packs, by parameter; of parameters that are not bfloat16 there is none.

    Each pack's gradient is taken from its parameter as soon as it is complete.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._adding = False
        self._seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}
        for parameter in parameters:
            if parameter.dtype == torch.bfloat16:
                parameter.register_post_accumulate_grad_hook(self._add)

    @staticmethod
    def of(parameters: Sequence[nn.Parameter], rules: UpdateRules, runtime: Runtime) -> GradientSums | None:
        """Those that a run needs, if it needs any. Raises UserError as `dtype_of_sums`."""
        dtype = dtype_of_sums(parameters, rules, runtime)
        return None if dtype is None else GradientSums(parameters, dtype)

    def clear(self) -> None:
        """Drop what has been added up so far."""
        self._sums.clear()

    @contextmanager
    def step(self, *, adding: bool) -> Iterator[None]:
        """A step whose packs are added up here, or, if it is one pack, are left where PyTorch puts them."""
        self._sums.clear()  # of a step that failed
        self._adding = adding
        if adding and self.dtype == torch.bfloat16:
            # One draw from the generator that checkpoints keep: a resumed run rounds alike, on any number of devices.
            self._seed = int(torch.randint(2**31, ()))
            self._generators.clear()
        try:
            yield
        finally:
            self._adding = False

    def dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """Of a parameter's gradient."""
        return self.dtype if parameter.dtype == torch.bfloat16 else parameter.dtype

    def pop(self, parameter: nn.Parameter) -> Tensor | None:
        """A parameter's sum, if it has one, which is the caller's from now on."""
        return self._sums.pop(parameter, None)

    def _add(self, parameter: Tensor) -> None:
        if not self._adding:
            return
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        new, parameter.grad = parameter.grad, None
        total = self._sums.get(parameter)
        if total is None:
            self._sums[parameter] = new.to(self.dtype)
        elif self.dtype == torch.float32:
            _local(total).add_(_local(new))
        else:
            mine = _local(total)
            mine.copy_(self._rounded(mine.float().add_(_local(new))))

    def _rounded(self, values: Tensor) -> Tensor:
        """Float32 values as bfloat16 with chances of up and down that make it right in the mean; `values` are lost."""
        device = values.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed + (device.index or 0))
        noise = torch.empty_like(values, dtype=torch.int32).random_(2**_LOW_BITS, generator=self._generators[device])
        bits = values.view(torch.int32)
        noise.masked_fill_(values.isnan(), 0)  # it could make a number of one that is none
        bits.add_(noise).bitwise_and_(-(2**_LOW_BITS))
        return bits.view(torch.float32)


def _local(value: Tensor) -> Tensor:
    """The part of a distributed tensor that this rank has, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def step_gradients(parameters: Iterable[nn.Parameter], sums: GradientSums | None) -> dict[nn.Parameter, Tensor]:
    """Those of a step whose packs are all done, from where they were added up; no parameter holds its own any more."""
    found: dict[nn.Parameter, Tensor] = {}
    for parameter in parameters:
        total = None if sums is None else sums.pop(parameter)
        gradient = parameter.grad if total is None else total
        if gradient is not None:
            found[parameter] = gradient
        parameter.grad = None
    return found


def dtype_of_sums(parameters: Iterable[nn.Parameter], rules: UpdateRules, runtime: Runtime) -> torch.dtype | None:
    """In which the gradients of `parameters`, whole ones, add up; None where all weights are float32.

    Gradients then are float32 too. Raises UserError if they are asked to be bfloat16.
    """
    coarse = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
    if not coarse:
        if rules.grad_dtype == "bfloat16":
            raise UserError("grad_dtype: bfloat16 is for bfloat16 weights, those that train are float32; leave it out")
        return None
    if rules.grad_dtype == "auto" and not _fits(coarse, rules, runtime):
        runtime.say("Gradients of several packs add up in bfloat16, rounded stochastically: float32 takes too much")
        return torch.bfloat16
    return torch.bfloat16 if rules.grad_dtype == "bfloat16" else torch.float32


def _fits(parameters: Sequence[nn.Parameter], rules: UpdateRules, runtime: Runtime) -> bool:
    """Whether float32 sums leave a GPU enough room; a CPU has it."""
    device, parallelism = runtime.device, runtime.parallelism
    if device.type != "cuda" or parallelism.kind == "tp":  # there ranks hold some weights alike, and must round alike
        return True
    states = 0.0 if parallelism.offload_optimizer else rules.state_bytes(2)
    cards = {"fsdp": runtime.world_size, "layers": torch.cuda.device_count()}.get(parallelism.kind, 1)
    room = cards * torch.cuda.get_device_properties(device).total_memory
    return float32_sums_fit(sum(parameter.numel() for parameter in parameters), states, room)
