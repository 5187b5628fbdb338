"""A model that DeepSpeed's ZeRO trains (arXiv 1910.02054).

Stage 1 divides the optimizer's states among the ranks, stage 2 the gradients too, stage 3 the weights as well.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from open_po.distributed.engine import Engine, Fill, Held, OptimizerMaker, trained
from open_po.distributed.parallelism import Parallelism
from open_po.distributed.runtime import Runtime

_TAG = "zero"  # the folder in a checkpoint


class ZeroEngine(Engine):
    """Training under ZeRO."""

    portable = False
    files_together = True

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        fill: Fill,
        make_optimizer: OptimizerMaker,
        runtime: Runtime,
        *,
        max_grad_norm: float,
    ) -> None:
        import deepspeed

        super().__init__(model, runtime.device)
        deepspeed.utils.logger.setLevel(logging.ERROR)
        # What PyTorch's own gloo does too, and needs no compiler for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        stage = runtime.parallelism.zero_stage
        self.team, self.lockstep_packs = runtime if stage == 3 else None, stage >= 2
        self._stage, self._world_size = stage, runtime.world_size
        if stage == 3 and units:
            # A layer is gathered as a whole: the last one may stop halfway, which ZeRO's own trace does not expect.
            kinds = list({type(unit) for unit in units})
            deepspeed.utils.set_z3_leaf_modules(model, kinds)
        config = zero_config(runtime.parallelism, max_grad_norm)
        if stage == 3:
            _divide([*units, model], fill, config)
        self.optimizer = make_optimizer(trained(model).values())
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self.module = self._engine

    def whole(self, weight: Tensor) -> Tensor:
        if not hasattr(weight, "ds_id"):
            return weight.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return weight.detach().clone()

    def held(self) -> list[Held]:
        # Not those of the optimizer, which DeepSpeed has given copies that come and go.
        parameters: Iterable[Any] = trained(self.module).values()
        if self._stage < 3:
            return [Held(parameter.detach().view(-1), None, parameter.numel()) for parameter in parameters]
        found = []
        for parameter in parameters:
            part, whole = parameter.ds_tensor.detach().view(-1), int(parameter.ds_numel)
            real = min(
                len(part), max(0, whole - torch.distributed.get_rank() * len(part))
            )  # the last part is filled up
            found.append(Held(part[:real], None, whole))
        return found

    def step(self, *, packs: int) -> AbstractContextManager[object]:
        # Stage 2 reduces gradients in the order of the backward pass, which need not be the same on every rank.
        if self._stage == 2:
            return cast(AbstractContextManager[object], self._engine.coalesce_grad_reduction())
        return nullcontext()

    @contextmanager
    def pack(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, value: Tensor) -> None:
        self._engine.backward(value * self._world_size)  # the ranks' gradients are averaged

    def update(self) -> float:
        # DeepSpeed clips, and leaves a step out whose gradient is not finite, in one call.
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        found = math.nan if norm is None else float(norm)
        return found if self._engine.was_step_applied() or not math.isfinite(found) else math.nan

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        found, _ = self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if found is None:
            raise FileNotFoundError(f"{folder / _TAG}: DeepSpeed finds no checkpoint")


def _divide(units: Sequence[nn.Module], fill: Fill, config: dict[str, Any]) -> None:
    """Fill each unit with its weights and leave every rank its part of them."""
    import deepspeed

    converted: Any = None  # a weight that knows how, once there is one: ZeRO makes some of its groups only once
    for unit in units:
        fill(unit)
        whole = [parameter for parameter in unit.parameters() if not hasattr(parameter, "ds_id")]
        if converted is None:
            deepspeed.zero.Init(module=unit, config_dict_or_path=config)
            converted = next(iter(whole), None)
        elif whole:
            converted.convert_to_zero_parameters(param_list=whole)


def zero_config(parallelism: Parallelism, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration: what a file of the user's says, and over it what a step of this trainer needs."""
    config = copy.deepcopy(dict(parallelism.deepspeed))
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = parallelism.zero_stage
    if parallelism.zero_stage < 3:
        zero["overlap_comm"] = False  # gradients of several packs add up before they are reduced
    on_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if parallelism.offload_optimizer:
        zero.setdefault("offload_optimizer", on_cpu)
    if parallelism.offload_param:
        zero.setdefault("offload_param", on_cpu)
    if parallelism.zero_hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = parallelism.zero_hpz_partition_size
    return config | {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's own batches: of these it makes no use here
        "gradient_accumulation_steps": 1,  # packs are added up by the loss's own divisor
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW runs on CPUs too, and needs no compiler
        "steps_per_print": 2**62,
    }
