"""From a configuration to the memory that its run takes, without weights, data or a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch

from open_po.config import RunConfig
from open_po.errors import UserError, first_line
from open_po.memory_plan import EngineName, MemoryPlan, TrainingShape
from open_po.model.numerics import policy_numerics
from open_po.model.rehearsal import Rehearsal
from open_po.model_files import policy_source, reference_source
from open_po.optimizers import OPTIMIZERS

DeviceType = Literal["cuda", "cpu"]


def training_shape(config: RunConfig, device: DeviceType) -> TrainingShape:
    """What a configuration says of the memory that training takes, on one device. Raises UserError.

    A typical pair fills `max_seq_length` with as much prompt as response.
    """
    model, train = config.model, config.train
    # Liger's kernels need no GPU to be planned with.
    numerics = policy_numerics(dataclasses.replace(model, use_liger_kernel=False), torch.device(device))
    trained = 4 if model.use_lora else numerics.weights_dtype.itemsize
    prompt = config.data.max_seq_length // 2
    if config.data.max_prompt_length is not None:
        prompt = min(prompt, config.data.max_prompt_length)
    return TrainingShape(
        device=device,
        weight=numerics.weights_dtype.itemsize,
        compute=numerics.compute_dtype.itemsize,
        gradient=trained,
        optimizer=OPTIMIZERS[train.optimizer].state_bytes(trained),
        offload_weights=config.distributed.offload_param,
        checkpoint_every=int(model.gradient_checkpointing),
        liger=device == "cuda" if model.use_liger_kernel is None else model.use_liger_kernel,
        layout="unshared" if model.prompt_sharing == "off" else "shared",
        prompt_tokens=prompt,
        response_tokens=config.data.max_seq_length - prompt,
        pairs_of_rank=train.per_device_train_batch_size * train.gradient_accumulation_steps,
        max_tokens=train.max_tokens_per_batch,
        reference_tokens=reference_tokens(config, device),
        separate_reference=reference_source(config) is not None,
        no_reference=not config.loss.mix().needs_reference,
    )


def reference_tokens(config: RunConfig, device: str) -> int:
    """Tokens of one forward pass of the reference, which keeps no activations: a GPU has room for more than in
    training."""
    usual = (4 if device == "cuda" else 1) * config.train.max_tokens_per_batch
    return config.reference.reference_max_tokens_per_batch or usual


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
