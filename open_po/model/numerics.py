"""In which precision, and by which kernels, a model computes."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import cast

import torch

from open_po.config import ModelConfig, OutputConfig, RunConfig
from open_po.distributed.parallelism import Parallelism
from open_po.errors import UserError
from open_po.model.attention import ATTENTION_VERSION
from open_po.model.logprobs import LOGPROB_VERSION
from open_po.model_files import reference_source
from open_po.optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How a model computes, as far as it changes its log-probs."""

    compute_dtype: torch.dtype
    weights_dtype: torch.dtype
    use_liger: bool
    four_bit: bool = False  # linear layers but the head are quantised from `weights_dtype`
    adapters_apart: bool = False  # those that a folder holds are computed beside their base, not merged into it
    compiled: bool = False  # the layers, by torch.compile

    def describe(self) -> str:
        """In words, for the console."""
        key = self.key()
        weights = f"{key['weights_dtype']} and 4 bits" if self.four_bit else str(key["weights_dtype"])
        return f"in {key['compute_dtype']} with weights in {weights}"

    def key(self) -> dict[str, str | int]:
        """What, besides weights and tokens, decides a log-prob: part of the reference cache's key."""
        more: dict[str, str | int] = {"quantisation": "nf4, double"} if self.four_bit else {}
        more |= {"adapters": "apart"} if self.adapters_apart else {}
        return more | {
            "compute_dtype": _name(self.compute_dtype),
            "weights_dtype": _name(self.weights_dtype),
            # Liger's are the head's too
            "kernels": ("liger" if self.use_liger else "torch") + (" compiled" if self.compiled else ""),
            "attention_version": ATTENTION_VERSION,
            "logprob_version": LOGPROB_VERSION,
        }


def policy_numerics(config: RunConfig, device: torch.device, parallelism: Parallelism | None = None) -> Numerics:
    """How the policy computes on `device`; its own weights as the reference compute alike.

    Weights that train are float32, whatever they compute in, unless the optimizer keeps small updates of bfloat16
    ones, or float32 weights on the host do: an update at a learning rate of 1e-7 is lost in bfloat16. Under adapters
    the weights do not train. `parallelism` is the run's; None: as the fields say. Raises UserError as
    `frozen_numerics`, and for bfloat16 weights that are to compute in float32.
    """
    found = _policy_numerics(config, device, parallelism or Parallelism.asked_for(config.distributed))
    if config.train.grad_dtype == "bfloat16" and (config.model.use_lora or found.weights_dtype == torch.float32):
        raise UserError("grad_dtype: bfloat16 is for bfloat16 weights, those that train are float32; leave it out")
    return found


def _policy_numerics(config: RunConfig, device: torch.device, parallelism: Parallelism) -> Numerics:
    frozen = frozen_numerics(config.model, device)
    wanted = config.model.weights_dtype
    if config.model.use_lora:
        continues = config.model.lora_start == "continue"
        return dataclasses.replace(frozen, adapters_apart=frozen.adapters_apart or continues)
    if wanted == "bfloat16" and frozen.compute_dtype != torch.bfloat16:
        raise UserError(
            f"weights_dtype: bfloat16 needs dtype bfloat16, this run computes in {_name(frozen.compute_dtype)}; set it"
        )
    if wanted == "auto":
        kept = OPTIMIZERS[config.train.optimizer].keeps_small_updates or parallelism.updates_on_host
        wanted = "bfloat16" if kept else "float32"
    return frozen if wanted == "bfloat16" else dataclasses.replace(frozen, weights_dtype=torch.float32)


def frozen_numerics(config: ModelConfig, device: torch.device) -> Numerics:
    """How a model computes that does nothing but score: its weights are kept in what they compute in.

    With `use_qlora` in 4 bits, as those of the policy: log-ratios of one base then hold no quantisation error, and what
    the policy has room for the reference has. Adapters are not merged into 4 bits, which would round them away. Raises
    UserError if Liger's kernels are asked for where they cannot run.
    """
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    compute = auto if config.dtype == "auto" else cast(torch.dtype, getattr(torch, config.dtype))
    use_liger = device.type == "cuda" if config.use_liger_kernel is None else config.use_liger_kernel
    if use_liger and device.type != "cuda" and not _triton_interprets():
        raise UserError(f"use_liger_kernel: Liger's kernels need CUDA, this device is {device.type}; leave it out")
    four_bit = config.use_qlora
    return Numerics(
        compute_dtype=compute,
        weights_dtype=compute,
        use_liger=use_liger,
        four_bit=four_bit,
        adapters_apart=four_bit,
        compiled=config.torch_compile,
    )


def saved_dtype(output: OutputConfig, numerics: Numerics) -> torch.dtype:
    """The precision that a model is saved in."""
    wanted = output.save_dtype
    return numerics.compute_dtype if wanted == "auto" else cast(torch.dtype, getattr(torch, wanted))


def reference_numerics(config: RunConfig, device: torch.device, parallelism: Parallelism | None = None) -> Numerics:
    """How the reference computes: as the policy where it is the policy's start, else as a model that only scores."""
    is_policy = reference_source(config) is None
    return policy_numerics(config, device, parallelism) if is_policy else frozen_numerics(config.model, device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
