"""Which engine a run has: what its configuration says, and what the program that launched it says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from open_po.config import DistributedConfig, RunConfig, TrainConfig
from open_po.distributed.deepspeed_file import read_deepspeed_file
from open_po.errors import ConfigError, UserError
from open_po.optimizers import OPTIMIZERS

Kind = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "layers", "tp"]
IN_BACKWARD: tuple[Kind, ...] = ("single", "layers")  # engines that can update a weight in the backward pass


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

    @staticmethod
    def asked_for(config: DistributedConfig, kind: Kind | None = None) -> Parallelism:
        """What the fields say by themselves, before a run is launched; `kind` in place of what they say of that."""
        return Parallelism(
            kind=kind or ("ddp" if config.parallel == "auto" else config.parallel),
            offload_optimizer=config.offload_optimizer,
            offload_param=config.offload_param,
        )

    @property
    def updates_on_host(self) -> bool:
        """Whether float32 weights in the host's memory are what is updated, and a model has copies (`HostUpdate`)."""
        return self.offload_optimizer and not self.zero_stage

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

        Out of it, since accelerate would start the engine by itself, as it is not wanted here. Raises ConfigError.
        """
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", "bf16"):
            raise ConfigError([f"accelerate launch: mixed precision {precision} is not supported; use bf16 or no"])
        if _is_set("ACCELERATE_USE_MEGATRON_LM"):
            raise ConfigError(["accelerate launch: Megatron-LM is not supported; use DeepSpeed, FSDP or none"])
        lonely = "MASTER_ADDR" in os.environ and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & {*os.environ}
        if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" and lonely:
            raise ConfigError(
                [
                    "accelerate launch --cpu: starts several processes through MPI alone (--mpirun_hostfile), and has "
                    "started one; use torchrun --nproc_per_node N, or PROCESSES_PER_NODE=N bash scripts/train/launch.sh"
                ]
            )
        if _is_set("ACCELERATE_USE_DEEPSPEED"):
            return _deepspeed_wish()
        if _is_set("ACCELERATE_USE_FSDP"):
            return _fsdp_wish()
        return LauncherWish()


def _is_set(name: str) -> bool:
    return os.environ.pop(name, "false").lower() in ("1", "true", "yes")


def _deepspeed_wish() -> LauncherWish:
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clipping not in ("auto", "none"):
        raise ConfigError(
            [f"accelerate launch: gradient_clipping {clipping} is for max_grad_norm to say; leave it out"]
        )
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config = {} if path == "none" else read_deepspeed_file(path)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if stage not in (1, 2, 3):
        raise ConfigError([f"accelerate launch: DeepSpeed's zero stage {stage} is not supported; use 1, 2 or 3"])

    def offloads(what: str) -> bool:
        device = (zero.get(f"offload_{what}") or {}).get("device")
        return (device or os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")) != "none"

    return LauncherWish(
        kind=cast(Kind, f"zero{stage}"),
        offload_optimizer=offloads("optimizer"),
        offload_param=offloads("param"),
        deepspeed=config,
    )


def _fsdp_wish() -> LauncherWish:
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
        raise ConfigError(
            ["accelerate launch: fsdp_activation_checkpointing is for gradient_checkpointing to say; set it"]
        )
    strategy = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    words = {"FULL_SHARD": True, "1": True, "SHARD_GRAD_OP": False, "2": False}
    if os.environ.get("FSDP_VERSION", "1") == "2":
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    elif strategy in words:
        reshard = words[strategy]
    else:
        raise ConfigError(
            [f"accelerate launch: fsdp_sharding_strategy {strategy} is not supported; use FULL_SHARD or SHARD_GRAD_OP"]
        )
    offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true"
    return LauncherWish(kind="fsdp", offload_param=offload, reshard_after_forward=reshard)


def choose_parallelism(config: RunConfig, wish: LauncherWish, world_size: int) -> Parallelism:
    """The engine of a run on so many ranks.

    Raises ConfigError where fields contradict one another, the program that launches it, or what there is.
    """
    kind: Kind = wish.kind or "ddp"
    if config.distributed.parallel != "auto":
        if wish.kind is not None and config.distributed.parallel != wish.kind:
            raise ConfigError(
                [
                    f"parallel: {config.distributed.parallel} contradicts accelerate launch, which asks for "
                    f"{wish.kind}; leave one of them out"
                ]
            )
        kind = config.distributed.parallel
    if kind == "ddp" and world_size == 1:
        kind = "single"
    found = Parallelism(
        kind=kind,
        is_free=config.distributed.parallel == "auto"
        and wish.kind is None
        and kind == "ddp"
        and not config.distributed.offload_optimizer,
        offload_optimizer=config.distributed.offload_optimizer or wish.offload_optimizer,
        offload_param=config.distributed.offload_param or wish.offload_param,
        zero_hpz_partition_size=config.distributed.zero_hpz_partition_size,
        reshard_after_forward=wish.reshard_after_forward,
        deepspeed=wish.deepspeed,
    )
    if problems := [*_impossible(found, world_size), *_not_for(found, config)]:
        raise ConfigError(problems)
    return found


def _impossible(found: Parallelism, ranks: int) -> Iterator[str]:
    """What an engine cannot do on so many ranks, or on this machine."""
    kind, hpz = found.kind, found.zero_hpz_partition_size
    if kind == "layers" and ranks > 1:
        yield f"parallel: layers is one process over several GPUs, this run has {ranks}; start one"
    elif kind == "layers" and torch.cuda.device_count() < 2:
        gpus = torch.cuda.device_count()
        yield f"parallel: layers deals a model out to the GPUs that a process sees, this one sees {gpus}"
    if kind == "tp" and not _has_cuda():
        yield "parallel: tp is experimental and for CUDA, which is not here; use fsdp"
    elif kind == "tp" and ranks == 1:
        yield "parallel: tp divides layers among several ranks, this run has one; start more"
    if found.offload_optimizer and kind == "fsdp":
        yield "offload_optimizer: fsdp offloads weights and optimizer together; set offload_param"
    elif found.offload_optimizer and kind == "tp":
        yield "offload_optimizer: is for one GPU, ddp, layers, zero1, zero2 and zero3, this run is tp"
    if found.offload_param and kind not in ("zero3", "fsdp"):
        yield f"offload_param: is for parallel zero3 and fsdp, this run is {kind}"
    if hpz > 1 and (kind != "zero3" or ranks % hpz):
        yield (
            f"zero_hpz_partition_size: {hpz} is for parallel zero3 and a number of ranks that it divides, this run is "
            f"{kind} on {ranks}"
        )


def _not_for(found: Parallelism, config: RunConfig) -> Iterator[str]:
    """Fields of other sections that an engine does not go with."""
    if config.output.async_checkpointing and found.zero_stage:
        yield f"async_checkpointing: DeepSpeed waits for its checkpoints (parallel {found.kind}); leave it out"
    yield from _not_for_update(found, config.train)
    if found.kind == "tp":
        yield from _not_for_tensor_parallelism(config)
    if config.model.use_qlora and found.kind not in ("single", "ddp"):
        yield f"use_qlora: weights in 4 bits are whole on every rank, this run is {found.kind}; use parallel ddp"
    spec = OPTIMIZERS[config.train.optimizer]
    if found.kind not in spec.parallel:
        others = ", ".join(spec.parallel)
        yield f"optimizer: {spec.name} does not go with parallel {found.kind}; use adamw, or parallel {others}"
    if spec.needs_cuda and not _has_cuda():
        yield f"optimizer: {spec.name} needs CUDA, which is not here; use adamw"
    if config.model.weights_dtype == "bfloat16" and found.zero_stage:
        yield (
            f"weights_dtype: bfloat16 does not go with parallel {found.kind}, whose optimizer keeps float32 weights; "
            "use fsdp, or leave it out"
        )
    separate = config.reference.reference_model_name_or_path is not None
    if config.reference.reference_sharding == "on" and not (separate or found.divides_weights or found.is_free):
        yield (
            f"reference_sharding: the policy is its own reference, and whole on every rank (parallel {found.kind}); "
            "leave it out, or use fsdp"
        )


def _not_for_tensor_parallelism(config: RunConfig) -> Iterator[str]:
    """What a model that is divided within its layers cannot do yet."""
    if config.model.use_lora:
        yield "use_lora: parallel tp trains no adapters; use fsdp"
    for name in ("mlp_tile_tokens", "torch_compile", "offload_activations"):
        if getattr(config.model, name):
            yield f"{name}: has not been tried with parallel tp; leave it out, or use fsdp"
    if "log_sum_sq" in config.loss.mix().extras:
        names = ", ".join(config.loss.names)
        yield f"loss_type: {names} needs a token's whole distribution, which parallel tp divides; use fsdp"


def _not_for_update(found: Parallelism, train: TrainConfig) -> Iterator[str]:
    """Fields of gradients and updates that an engine does not go with."""
    kind = found.kind
    if train.grad_dtype != "auto" and found.zero_stage:
        yield f"grad_dtype: DeepSpeed adds gradients up in its own way (parallel {kind}); leave it out"
    if train.grad_dtype == "bfloat16" and kind == "tp":
        yield "grad_dtype: ranks of parallel tp would round the same weights differently; use float32"
    if train.optimizer_in_backward == "on" and kind not in IN_BACKWARD:
        yield f"optimizer_in_backward: on is for one GPU and parallel layers, this run is {kind}; use auto"
    if found.updates_on_host and train.optimizer_in_backward == "on":
        yield "optimizer_in_backward: offload_optimizer has gradients leave for the host there; use auto"
    if found.updates_on_host and not OPTIMIZERS[train.optimizer].on_host:
        able = ", ".join(name for name, spec in OPTIMIZERS.items() if spec.on_host)
        yield f"offload_optimizer: updates float32 weights on the host by {able}, not by {train.optimizer}; use adamw"


def refuse_contradictions(found: Parallelism, config: RunConfig) -> None:
    """Raises UserError for fields that an engine, which memory has chosen, does not go with."""
    if problems := list(_not_for(found, config)):
        raise UserError(f"{'; '.join(problems)} (the model is too large for parallel ddp)")


def _has_cuda() -> bool:
    return torch.cuda.is_available()
