"""From a configuration to the memory that its run takes, without weights, data or a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch

from open_po.config import RunConfig
from open_po.errors import UserError, first_line
from open_po.memory_plan import EngineName, MemoryPlan, TrainingShape
from open_po.memory_plan.states import ZERO_HOST
from open_po.model.numerics import policy_numerics
from open_po.model.rehearsal import Rehearsal
from open_po.model.token_budget import SMALLEST, usual
from open_po.model_files import policy_source, reference_source
from open_po.optimizers import OPTIMIZERS

DeviceType = Literal["cuda", "cpu"]
USABLE = 0.97  # of a card's memory; the rest is the driver's
_MOST_SCORED = 2**16  # more were never faster, and are a loss when memory runs out
_SCORED = {"cuda": 4, "cpu": 1}  # by how much a pass that keeps no activations may have more tokens than one that does


def training_shape(config: RunConfig, device: DeviceType) -> TrainingShape:
    """What a configuration says of the memory that training takes, on one device. Raises UserError.

    A typical pair fills `max_seq_length` with as much prompt as response. Budgets that are `auto` are those of a few
    such pairs, until there is a card to fill.
    """
    model, train = config.model, config.train
    # Liger's kernels need no GPU to be planned with.
    without = dataclasses.replace(config, model=dataclasses.replace(model, use_liger_kernel=False))
    numerics = policy_numerics(without, torch.device(device))
    prompt = config.data.max_seq_length // 2
    if config.data.max_prompt_length is not None:
        prompt = min(prompt, config.data.max_prompt_length)
    shape = TrainingShape(
        device=device,
        weight=numerics.weights_dtype.itemsize,
        compute=numerics.compute_dtype.itemsize,
        four_bit=numerics.four_bit,
        offload_weights=config.distributed.offload_param,
        checkpoint_every=model.gradient_checkpointing_every if model.gradient_checkpointing else 0,
        offload_activations=model.offload_activations,
        liger=device == "cuda" if model.use_liger_kernel is None else model.use_liger_kernel,
        layout="unshared" if model.prompt_sharing == "off" else "shared",
        prompt_tokens=prompt,
        response_tokens=config.data.max_seq_length - prompt,
        scored_prompt=0.5 if config.data.scored_turns == "all" else 0.0,
        pairs_of_rank=train.per_device_train_batch_size * train.gradient_accumulation_steps,
        separate_reference=reference_source(config) is not None,
        no_reference=not config.loss.mix().needs_reference,
        **_update_facts(config, 4 if model.use_lora else numerics.weights_dtype.itemsize),
    )
    asked, scored = train.max_tokens_per_batch, config.reference.reference_max_tokens_per_batch
    tokens = usual(shape.pair_tokens) if asked == "auto" else asked
    return dataclasses.replace(
        shape, max_tokens=tokens, reference_tokens=_SCORED[device] * tokens if scored == "auto" else scored
    )


def _update_facts(config: RunConfig, trained: int) -> dict[str, Any]:
    """Bytes of gradients and states, of weights that take `trained` bytes, and when gradients leave."""
    train, distributed = config.train, config.distributed
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
    if not distributed.offload_optimizer:
        return facts
    # Float32 weights and their states, and the gradient on its way; DeepSpeed has buffers of its own.
    host = ZERO_HOST if distributed.parallel.startswith("zero") else 4 + states(4) + trained
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
        tokens = max(SMALLEST, plan.reference_tokens_that_fill(room))
        shape = dataclasses.replace(shape, reference_tokens=min(tokens, _MOST_SCORED))
    return dataclasses.replace(plan, shape=shape)


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
    shape = dataclasses.replace(shape or training_shape(config, device), engine=engine, ranks=ranks)
    folder = policy_source(config).config_folder()
    refused: list[str] = []
    for laid_out in _layouts(shape):
        rehearsal = Rehearsal(folder, config.model, laid_out)
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
