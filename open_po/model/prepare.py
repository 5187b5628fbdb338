"""Models made ready for a run's data: checked, spread over the ranks, in the layout that suits them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from open_po.config import ReferenceConfig, RunConfig, Sharing
from open_po.data.run_data import Data
from open_po.distributed.engine import Engine, Fill
from open_po.distributed.make_engine import deal_out, make_engine
from open_po.distributed.runtime import Runtime
from open_po.distributed.tensor_parallel import refuse_vocabulary, tensor_parallel_mesh
from open_po.distributed.update import UpdateRules
from open_po.errors import UserError
from open_po.model import four_bit
from open_po.model.activations import checkpoint_gradients, keep_activations
from open_po.model.compiled import compile_layers, refuse_rows
from open_po.model.divided import HollowModel
from open_po.model.layout_check import choose_layout
from open_po.model.load import load_scorer
from open_po.model.lora import attach_lora, refuse_wrong_start
from open_po.model.mlp_tiles import tile_mlps
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource, adapter_base, policy_source
from open_po.packing import Layout


class Policy(NamedTuple):
    """The model that is trained, and what trains it."""

    scorer: Scorer
    engine: Engine


def set_layout(scorer: Scorer, data: Data, sharing: Sharing, name: str, runtime: Runtime) -> None:
    """Set the scorer to the best layout that it takes, and say which.

    Raises UserError if the model scores these pairs differently from its own forward.
    """
    longest = max(part.longest_row for part in data.parts)
    samples = [data.train[index] for index in range(min(2, len(data.train)))]
    samples += [part[index] for part in data.parts for index in [part.longest_pair] if part.longest_row == longest]
    choice = choose_layout(scorer, samples, sharing, longest=longest, pad=data.pad)
    runtime.say(f"{name}: {choice.describe()}")


def check_fits(scorer: Scorer, data: Data) -> None:
    """Raises UserError if the model has no embedding, or no position, for a token of the data."""
    scorer.check_ids(data.highest_id)
    scorer.check_length(max(part.longest_row for part in data.parts))


def agree_on_layout(scorer: Scorer, runtime: Runtime) -> None:
    """The same layout on all ranks, since each plans for all."""
    layouts = runtime.gather(scorer.layout)
    scorer.use_layout(max(layouts, key=get_args(Layout).index))
    if len(set(layouts)) > 1:
        runtime.say(f"The ranks found different layouts ({', '.join(layouts)}); all take {scorer.layout}")


def load_reference(
    source: ModelSource, numerics: Numerics, config: RunConfig, runtime: Runtime, data: Data, *, label: str
) -> Scorer:
    """A model that only scores, as a whole on each rank or divided among them; all ranks call this."""

    divided = is_divided(source, numerics, config.reference, runtime)

    def load() -> Scorer:
        if divided:
            scorer = HollowModel(source, numerics, runtime).divided()
        else:
            scorer = load_scorer(source, numerics, _loading_device(runtime))
            if runtime.parallelism.kind == "layers":
                scorer.place(deal_out(scorer, scorer.decoder_layers()))
        if numerics.compiled:
            compile_layers(scorer)
        check_fits(scorer, data)
        set_layout(scorer, data, config.model.prompt_sharing, label, runtime)
        return scorer

    scorer = runtime.on_every_rank(load)
    agree_on_layout(scorer, runtime)
    return scorer


def is_divided(source: ModelSource, numerics: Numerics, config: ReferenceConfig, runtime: Runtime) -> bool:
    """Whether the ranks divide a model that only scores; all ranks call this.

    Raises UserError if there are none to divide it among.
    """
    if numerics.four_bit and config.reference_sharding == "on":
        raise UserError(
            "reference_sharding: on divides no weights in 4 bits (use_qlora), of which each rank has a copy"
        )
    if config.reference_sharding == "on" and runtime.world_size == 1:
        raise UserError("reference_sharding: on needs several ranks, this run has one; use off, or more processes")
    if config.reference_sharding != "auto" or runtime.world_size == 1 or numerics.four_bit:
        return config.reference_sharding == "on"
    return not runtime.on_every_rank(HollowModel, source, numerics, runtime).fits_whole()


def _loading_device(runtime: Runtime) -> torch.device:
    """Where a whole model is loaded: one that is dealt out to devices afterwards need fit on none of them."""
    return torch.device("cpu") if runtime.parallelism.kind == "layers" else runtime.device


def _is_filled(unit: nn.Module) -> None:
    """For a model that has its weights."""


def _dress(scorer: Scorer, config: RunConfig, runtime: Runtime) -> None:
    """Give a model what the run trains and how it keeps activations, before an engine spreads it."""
    model = config.model
    if config.loss.load_balancing_loss:
        scorer.balance_experts()
    if model.gradient_checkpointing:
        checkpoint_gradients(scorer, model.gradient_checkpointing_every)
    if model.use_lora:
        if model.lora_start == "new":
            attach_lora(scorer, model)
        if runtime.parallelism.zero_stage == 3:  # its layers run their backward pass only if their input has one
            scorer.base.enable_input_require_grads()
    keep_activations(scorer, model)


def refuse_what_cannot_train(config: RunConfig, numerics: Numerics, runtime: Runtime) -> None:
    """Raises UserError, before anything takes long, for what the policy's architecture or adapters cannot do."""
    model, source = config.model, policy_source(config)
    refuse_wrong_start(config, runtime.parallelism)
    divides_layers = runtime.parallelism.kind == "tp"
    if divides_layers and adapter_base(source.folder(), source.trust_remote_code) is not None:
        raise UserError(f"{source.name}: is a folder of adapters, which parallel tp cannot merge; use fsdp")
    names_targets = model.use_lora and model.lora_start == "new" and model.lora_target_modules != ["all-linear"]
    changes_layers = model.mlp_tile_tokens is not None or model.gradient_checkpointing_every != 1
    if not (divides_layers or changes_layers or names_targets):
        return
    scorer = HollowModel(source, numerics, runtime).scorer  # which nobody keeps
    if divides_layers and any(name.endswith("lm_head") for name in scorer.base.tp_plan or ()):
        refuse_vocabulary(scorer.head().weight.shape[0], runtime.world_size)
    if model.gradient_checkpointing:
        checkpoint_gradients(scorer, model.gradient_checkpointing_every)
    if model.mlp_tile_tokens is not None:
        tile_mlps(scorer, model.mlp_tile_tokens)
    if names_targets:
        with torch.random.fork_rng(devices=[]):  # nothing is drawn that a run draws
            attach_lora(scorer, dataclasses.replace(model, use_dora=False))  # whose norms take long, and for nothing


def load_policy(
    config: RunConfig, numerics: Numerics, runtime: Runtime, data: Data, make_optimizer: Callable[..., Optimizer]
) -> Policy:
    """The policy at its starting weights, spread over the ranks, with adapters if the run trains them.

    `make_optimizer` gets the trained parameters and, as `layers`, the model's layers. The policy is checked against its
    own forward. All ranks call this, and an error is raised on all of them.
    """

    def load() -> Policy:
        source = policy_source(config)
        fill: Fill = _is_filled
        kind = runtime.parallelism.kind
        if kind == "tp":
            scorer = load_scorer(source, numerics, runtime.device, tensor_parallel_mesh(runtime))
        elif runtime.parallelism.divides_weights:
            hollow = HollowModel(source, numerics, runtime)
            scorer, fill = hollow.scorer, hollow.fill
        else:
            scorer = load_scorer(source, numerics, _loading_device(runtime))
        if numerics.four_bit:
            runtime.say(f"Policy: {four_bit.describe(scorer)}")
        check_fits(scorer, data)
        _dress(scorer, config, runtime)
        engine = make_engine(
            scorer,
            scorer.decoder_layers(),
            fill,
            partial(make_optimizer, layers=scorer.decoder_layers()),
            runtime,
            rules=UpdateRules.of(config.train),
            head_weight=scorer.head().weight,
        )
        scorer.place(engine)
        set_layout(scorer, data, config.model.prompt_sharing, "Policy", runtime)
        refuse_rows(scorer)
        return Policy(scorer, engine)

    policy = runtime.on_every_rank(load)
    agree_on_layout(policy.scorer, runtime)
    return policy
