"""A whole model on every rank, gradients averaged by PyTorch's DistributedDataParallel.

It reduces in the precision of the weights. Those of bfloat16 weights are summed here, as their sums over packs are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from open_po.distributed.engine import OptimizerMaker, trained
from open_po.distributed.gradient_sums import GradientSums
from open_po.distributed.runtime import Runtime
from open_po.distributed.single import SingleEngine
from open_po.distributed.skeleton import broadcast
from open_po.distributed.update import UpdateRules


class DdpEngine(SingleEngine):
    """As a single process on every rank; gradients are summed in the last pack of a step, or after it."""

    can_retry = False  # in its last pack other ranks may have this one's gradients already, or wait for them

    def __init__(
        self, model: nn.Module, make_optimizer: OptimizerMaker, runtime: Runtime, *, rules: UpdateRules
    ) -> None:
        if any(weight.dtype == torch.bfloat16 for weight in trained(model).values()):
            for weight in model.parameters():
                broadcast(weight.detach(), runtime)
        super().__init__(model, make_optimizer, runtime, rules=rules)
        self._buckets: dict[nn.Parameter, Tensor] = {}  # each gradient's place in those of DDP
        if self._sums is not None:
            return
        devices = [runtime.device] if runtime.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name that says it in torch 2.11 too
            self.module = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._buckets = self._settle_buckets()

    def _settle_buckets(self) -> dict[nn.Parameter, Tensor]:
        """The gradients, which are zero, as DDP keeps them: views of its buckets.

        With these from the first pack on, packs add up in the buckets; without, beside them, in a second copy of all
        gradients. DDP hands them out in its first backward pass, and arranges its buckets anew before the second.
        """

        def zero(nothing: Tensor) -> Tensor:
            """In a backward pass the last weight's gradient comes first, about as in one through the model."""
            return nothing + sum(weight.sum() * 0 for weight in self._parameters)

        vars(self._model)["forward"] = zero
        for _ in range(2):
            self.discard()
            self.module(torch.zeros((), device=self.device)).backward()
        del vars(self._model)["forward"]
        return {parameter: cast(Tensor, parameter.grad) for parameter in self._parameters}

    def discard(self) -> None:
        super().discard()
        for parameter, bucket in self._buckets.items():
            parameter.grad = bucket.zero_()

    @property
    def spared_gradients(self) -> int:
        return 0  # all are there when they are reduced

    def _adds(self, packs: int) -> bool:
        return True  # the ranks' packs add up too

    @contextmanager
    def pack(self, *, last: bool) -> Iterator[None]:
        if self._sums is not None or last:
            yield
        else:
            with cast(DistributedDataParallel, self.module).no_sync():
                yield

    def backward(self, value: Tensor) -> None:
        if self._sums is None:
            value = value * self._runtime.world_size  # the ranks' gradients are averaged
        value.backward()

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        gradients = super()._gradients()
        return gradients if self._sums is None else self._reduced(gradients)

    def _reduced(self, mine: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The ranks' gradients, summed; what no rank has a gradient of, an expert without tokens, gets none."""
        there = torch.tensor([parameter in mine for parameter in self._parameters], dtype=torch.int32)
        there = there.to(self._runtime.device)
        torch.distributed.all_reduce(there, op=torch.distributed.ReduceOp.MAX)
        gradients: dict[nn.Parameter, Tensor] = {}
        for parameter, found in zip(self._parameters, there.tolist(), strict=True):
            if found:
                gradient = mine.get(parameter)
                if gradient is None:
                    dtype = cast(GradientSums, self._sums).dtype_of(parameter)
                    gradient = torch.zeros_like(parameter, dtype=dtype)
                gradients[parameter] = gradient.contiguous()
                torch.distributed.all_reduce(gradients[parameter])
        return gradients
