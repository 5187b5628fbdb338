"""Which engine a run has: what its configuration says, and what the program that launched it says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from open_po.config import DistributedConfig
from open_po.distributed.deepspeed_file import read_deepspeed_file
from open_po.errors import UserError

Kind = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "layers", "tp"]


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How a model is spread over the ranks."""

    kind: Kind
    is_free: bool = False  # nobody has asked for an engine: what fits decides
    offload_optimizer: bool = False
    offload_param: bool = False
    zero_hpz_partition_size: int = 1
    reshard_after_forward: bool = True  # under fsdp: drop a layer's gathered weights until its backward pass
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # what a DeepSpeed file of the user's says

    @property
    def zero_stage(self) -> int:
        """0 where the engine is not DeepSpeed's."""
        return int(self.kind[4:]) if self.kind.startswith("zero") else 0

    @property
    def divides_weights(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.kind in ("zero3", "fsdp", "tp")


@dataclass(frozen=True, kw_only=True)
class LauncherWish:
    """What `accelerate launch` has been told of the engine, as far as it is told at all."""

    kind: Kind | None = None
    offload_optimizer: bool = False
    offload_param: bool = False
    reshard_after_forward: bool = True
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_environment() -> LauncherWish:
        """Read, and take out of the environment, what `accelerate launch` leaves there.

        Out of it, since accelerate would start the engine by itself, as it is not wanted here. Raises UserError.
        """
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", "bf16"):
            raise UserError(f"accelerate launch: mixed precision {precision} is not supported; use bf16 or no")
        if _is_set("ACCELERATE_USE_MEGATRON_LM"):
            raise UserError("accelerate launch: Megatron-LM is not supported; use DeepSpeed, FSDP or none")
        lonely = "MASTER_ADDR" in os.environ and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & {*os.environ}
        if _is_set("ACCELERATE_USE_CPU") and lonely:
            raise UserError(
                "accelerate launch --cpu: starts several processes through MPI alone (--mpirun_hostfile), and has "
                "started one; use torchrun --nproc_per_node N, or PROCESSES_PER_NODE=N bash scripts/train/launch.sh"
            )
        if _is_set("ACCELERATE_USE_DEEPSPEED"):
            return _deepspeed_wish()
        if _is_set("ACCELERATE_USE_FSDP"):
            return _fsdp_wish()
        return LauncherWish()


def _is_set(name: str) -> bool:
    return os.environ.pop(name, "false").lower() in ("1", "true", "yes")


def _deepspeed_wish() -> LauncherWish:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = {} if path == "none" else read_deepspeed_file(path)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if stage not in (1, 2, 3):
        raise UserError(f"accelerate launch: DeepSpeed's zero stage {stage} is not supported; use 1, 2 or 3")

    def offloads(what: str) -> bool:
        device = zero.get(f"offload_{what}", {}).get("device")
        return (device or os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")) != "none"

    return LauncherWish(
        kind=cast(Kind, f"zero{stage}"),
        offload_optimizer=offloads("optimizer"),
        offload_param=offloads("param"),
        deepspeed=config,
    )


def _fsdp_wish() -> LauncherWish:
    strategy = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    words = {"FULL_SHARD": True, "1": True, "SHARD_GRAD_OP": False, "2": False}
    if os.environ.get("FSDP_VERSION", "1") == "2":
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    elif strategy in words:
        reshard = words[strategy]
    else:
        raise UserError(
            f"accelerate launch: fsdp_sharding_strategy {strategy} is not supported; use FULL_SHARD or SHARD_GRAD_OP"
        )
    offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true"
    return LauncherWish(kind="fsdp", offload_param=offload, reshard_after_forward=reshard)


def refuse_tensor_parallelism(device: str, world_size: int) -> None:
    """Raises UserError where it cannot be."""
    if device != "cuda":
        raise UserError(f"parallel: tp is experimental and for CUDA, this device is {device}; use fsdp")
    if world_size == 1:
        raise UserError("parallel: tp divides layers among several ranks, this run has one; start more")


def choose_parallelism(config: DistributedConfig, wish: LauncherWish, world_size: int) -> Parallelism:
    """The engine of a run. Raises UserError where configuration and launcher contradict each other."""
    kind: Kind = wish.kind or "ddp"
    if config.parallel != "auto":
        if wish.kind is not None and config.parallel != wish.kind:
            raise UserError(
                f"parallel: {config.parallel} contradicts accelerate launch, which asks for {wish.kind}; leave one of "
                "them out"
            )
        kind = config.parallel
    if kind == "ddp" and world_size == 1:
        kind = "single"
    if kind == "layers" and world_size > 1:
        raise UserError(f"parallel: layers is one process over several GPUs, this run has {world_size}; start one")
    offload_optimizer = config.offload_optimizer or wish.offload_optimizer
    offload_param = config.offload_param or wish.offload_param
    hpz = config.zero_hpz_partition_size
    if offload_optimizer and kind == "fsdp":
        raise UserError("offload_optimizer: fsdp offloads weights and optimizer together; set offload_param")
    if offload_optimizer and not kind.startswith("zero"):
        raise UserError(f"offload_optimizer: is for parallel zero1, zero2 and zero3, this run is {kind}")
    if offload_param and kind not in ("zero3", "fsdp"):
        raise UserError(f"offload_param: is for parallel zero3 and fsdp, this run is {kind}")
    if hpz > 1 and (kind != "zero3" or world_size % hpz):
        raise UserError(
            f"zero_hpz_partition_size: {hpz} is for parallel zero3 and a number of ranks that it divides, this run is "
            f"{kind} on {world_size}"
        )
    return Parallelism(
        kind=kind,
        is_free=config.parallel == "auto" and wish.kind is None and kind == "ddp",
        offload_optimizer=offload_optimizer,
        offload_param=offload_param,
        zero_hpz_partition_size=hpz,
        reshard_after_forward=wish.reshard_after_forward,
        deepspeed=wish.deepspeed,
    )
