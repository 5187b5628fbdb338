"""The section of how a model is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_po.config.field import option

Parallel = Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp", "layers", "tp"]


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the model is spread over the ranks; none of it changes the value of a step."""

    parallel: Parallel = option(
        "auto",
        "ddp: a whole model on every rank; zero1, zero2, zero3: DeepSpeed divides optimizer states, gradients too, "
        "weights too; fsdp: PyTorch divides all three; layers: one process, its model over all GPUs it sees, layer by "
        "layer; tp (experimental, CUDA): each rank has a part of every layer. auto: what accelerate launch asks for; "
        "else ddp, or fsdp where that does not fit",
        shapes_result=False,
    )
    offload_optimizer: bool = option(
        False,
        "keep the optimizer's states, and float32 weights, in the host's memory and update there (one GPU, ddp, "
        "layers; zero1, zero2, zero3: DeepSpeed's way, each rank its part)",
        shapes_result=False,
    )
    offload_param: bool = option(
        False, "keep weights in the host's memory (zero3; fsdp, with the optimizer's states)", shapes_result=False
    )
    zero_hpz_partition_size: int = option(
        1,
        "zero3: keep a second copy of the weights, divided among so many ranks, those of a node, so that the backward "
        "pass gathers them from there; 1: none",
        above=0,
        shapes_result=False,
    )
