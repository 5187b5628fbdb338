"""From a configuration to the memory that its run takes, without weights, data or a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch

from open_po.config import RunConfig, TrainConfig
from open_po.distributed.parallelism import Parallelism
from open_po.errors import UserError, first_line
from open_po.memory_plan import EngineName, MemoryPlan, TrainingShape
from open_po.memory_plan.states import ZERO_HOST
from open_po.model.lora import no_adapters
from open_po.model.numerics import policy_numerics, reference_numerics
from open_po.model.rehearsal import Rehearsal
from open_po.model.token_budget import SMALLEST, usual
from open_po.model_files import adapter_base, policy_source, reference_source
from open_po.optimizers import OPTIMIZERS

DeviceType = Literal["cuda", "cpu"]
_MOST_SCORED = 2**16  # more were never faster, and are a loss when memory runs out
_SCORED = {"cuda": 4, "cpu": 1}  # by how much a pass that keeps no activations may have more tokens than one that does


def training_shape(config: RunConfig, device: DeviceType, parallelism: Parallelism | None = None) -> TrainingShape:
    """What a configuration says of the memory that training takes, on one device. Raises UserError.

    `parallelism` is what a run has come to, by its configuration and the program that launched it; None: the fields
    alone are known. A typical pair fills `max_seq_length` with as much prompt as response. Budgets that are `auto` are
    those of a few such pairs, until there is a card to fill.
    """
    model, train = config.model, config.train
    spread = parallelism or Parallelism.asked_for(config.distributed)
    # Liger's kernels need no GPU to be planned with.
    without = dataclasses.replace(config, model=dataclasses.replace(model, use_liger_kernel=False))
    numerics = policy_numerics(without, torch.device(device), spread)
    prompt = config.data.max_seq_length // 2
    if config.data.max_prompt_length is not None:
        prompt = min(prompt, config.data.max_prompt_length)
    shape = TrainingShape(
        device=device,
        weight=numerics.weights_dtype.itemsize,
        compute=numerics.compute_dtype.itemsize,
        four_bit=numerics.four_bit,
        offload_weights=spread.offload_param,
        gathered_stay=not spread.reshard_after_forward,
        checkpoint_every=model.gradient_checkpointing_every if model.gradient_checkpointing else 0,
        offload_activations=model.offload_activations,
        liger=device == "cuda" if model.use_liger_kernel is None else model.use_liger_kernel,
        layout="unshared" if model.prompt_sharing == "off" else "shared",
        prompt_tokens=prompt,
        response_tokens=config.data.max_seq_length - prompt,
        scored_prompt=0.5 if config.data.scored_turns == "all" else 0.0,
        pairs_of_rank=train.pairs_of_rank,
        separate_reference=reference_source(config) is not None,
        no_reference=not config.loss.mix().needs_reference,
        reference_weight=reference_numerics(without, torch.device(device), spread).weights_dtype.itemsize,
        reference_sharding=config.reference.reference_sharding,
        **_update_facts(train, spread, 4 if model.use_lora else numerics.weights_dtype.itemsize),
    )
    asked, scored = train.max_tokens_per_batch, config.reference.reference_max_tokens_per_batch
    tokens = usual(shape.pair_tokens) if asked == "auto" else asked
    return dataclasses.replace(
        shape, max_tokens=tokens, reference_tokens=_SCORED[device] * tokens if scored == "auto" else scored
    )


def _update_facts(train: TrainConfig, spread: Parallelism, trained: int) -> dict[str, Any]:
    """Bytes of gradients and states, of weights that take `trained` bytes, and when gradients leave."""
    spec = OPTIMIZERS[train.optimizer]
    states, wide = spec.state_bytes, train.grad_dtype != "bfloat16" or trained == 4
    facts = {
        "gradient": 4.0 if wide else 2.0,
        "gradient_alone": float(trained),
        "gradient_shrinks": train.grad_dtype == "auto" and trained == 2,
        "optimizer": float(states(trained)),
        "optimizer_of_layers": None if spec.matrix_bytes is None else float(spec.matrix_bytes(trained)),
        "gradients_leave": train.optimizer_in_backward != "off" and train.max_grad_norm == 0,
    }
    if not spread.offload_optimizer:
        return facts
    # Float32 weights and their states, and the gradient on its way; DeepSpeed has buffers of its own.
    host = 4 + states(4) + trained if spread.updates_on_host else ZERO_HOST
    return facts | {
        "optimizer": 0.0,
        "optimizer_of_layers": None,
        "optimizer_host": float(host),
        "gradients_leave": True,
    }


def filling(plan: MemoryPlan, config: RunConfig, room: float) -> MemoryPlan:
    """The plan with what `auto` budgets are on a card where `room` bytes are to be filled."""
    shape = plan.shape
    # One pack holds no more than a step, and what a reference pass computes is not told by a configuration.
    step = shape.pairs_of_rank * shape.pair_tokens
    if config.train.max_tokens_per_batch == "auto":
        # First as one pack, which may take less than several: its gradients need not add up.
        one = dataclasses.replace(plan, shape=dataclasses.replace(shape, max_tokens=step))
        tokens = step if one.total <= room else min(step, max(SMALLEST, plan.tokens_that_fill(room)))
        shape = dataclasses.replace(shape, max_tokens=tokens)
    if config.reference.reference_max_tokens_per_batch == "auto":
        shape = dataclasses.replace(shape, reference_tokens=filling_pass(plan, room))
    return dataclasses.replace(plan, shape=shape)


def filling_pass(plan: MemoryPlan, room: float) -> int:
    """What `reference_max_tokens_per_batch: auto` is where `room` bytes are to be filled."""
    return min(max(SMALLEST, plan.reference_tokens_that_fill(room)), _MOST_SCORED)


def plan_memory(
    config: RunConfig,
    device: DeviceType,
    *,
    engine: EngineName = "single",
    ranks: int = 1,
    card: float | None = None,
    shape: TrainingShape | None = None,
) -> MemoryPlan:
    """The plan of a run; its model's config.json is read, from a folder or the Hub, and nothing else.

    `card` is the memory of the device in bytes, if it is known. `shape` replaces what the configuration says, as where
    the lengths of the data are known. Raises UserError if the model cannot be made, or its passes not be rehearsed.
    """
    shape = shape or training_shape(config, device, Parallelism.asked_for(config.distributed, engine))
    shape = dataclasses.replace(shape, engine=engine, ranks=ranks)
    source = policy_source(config)
    folder, adapters = source.config_folder(), None
    if config.model.use_lora and config.model.lora_start == "continue":
        adapters = source.description()
        if adapter_base(adapters, source.trust_remote_code) is None:
            raise no_adapters(source)
    refused: list[str] = []
    for laid_out in _layouts(shape):
        rehearsal = Rehearsal(folder, config.model, laid_out, adapters)
        plan = MemoryPlan(laid_out, rehearsal.model, rehearsal, card)
        try:
            plan.rehearse()
        except Exception as error:  # whatever a model's own code makes of tensors without values
            refused.append(f"{laid_out.layout}: {first_line(error)}")
        else:
            return plan
    raise UserError(f"{config.model.model_name_or_path}: its memory cannot be planned ({'; '.join(refused)})")


def _layouts(shape: TrainingShape) -> Iterator[TrainingShape]:
    """The layouts in which a model is tried; a run finds the right one by comparing log-probs."""
    if shape.layout != "rows":
        yield shape
        yield dataclasses.replace(shape, short_last_layer=False)
    yield dataclasses.replace(shape, layout="rows")
