"""The memory plan of a run that has begun, whose data and ranks are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from open_po.config import RunConfig
from open_po.data.run_data import Data
from open_po.distributed.engine import Engine
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.memory_plan import MemoryPlan
from open_po.memory_plan.shape import ENGINES
from open_po.model.memory import card_bytes, room_bytes
from open_po.model.planning import filling, filling_pass, plan_memory, training_shape
from open_po.model.scorer import Scorer

_known: dict[str, MemoryPlan | None] = {}  # that this process has made: a plan takes seconds


def plan_of_run(
    config: RunConfig, runtime: Runtime, data: Data, reference_weight: int | None = None
) -> MemoryPlan | None:
    """The plan of this run, its typical pair the mean one of the data; None where none can be made.

    Budgets that are `auto` are those that fill the card. On a GPU alone: on a CPU a small run would be over before its
    plan is made. `reference_weight`: bytes of a weight of the model that scores, if that is not the run's reference.
    """
    engine = next((name for name in ENGINES if name == runtime.parallelism.kind), None)
    if runtime.device.type != "cuda" or engine is None:
        return None
    pairs = data.train
    responses = len(pairs.chosen_lengths) + np.count_nonzero(pairs.rejected_lengths)
    shape = training_shape(config, "cuda", runtime.parallelism)
    shape = dataclasses.replace(
        shape,
        engine=engine,
        ranks=torch.cuda.device_count() if engine == "layers" else runtime.world_size,
        prompt_tokens=max(1, round(float(pairs.prompt_lengths.mean()))),
        response_tokens=max(1, round(float((pairs.chosen_lengths + pairs.rejected_lengths).sum()) / responses)),
        scored_prompt=round(float(pairs.scored[:, 0].sum() / pairs.prompt_lengths.sum()), 2),
        reference_weight=reference_weight or shape.reference_weight,
    )
    key = f"{config.to_yaml()} {shape}"
    if key not in _known:
        try:
            plan = plan_memory(
                config, "cuda", engine=engine, ranks=shape.ranks, card=card_bytes(runtime.device), shape=shape
            )
            _known[key] = filling(plan, config, room_bytes(runtime.device))
        except UserError:  # of a model whose code asks tensors for values; training goes on without a plan
            _known[key] = None
    return _known[key]


def planned_tokens(config: RunConfig, runtime: Runtime, data: Data) -> int | None:
    """Tokens of a pack in training that fill the card by the plan, rank 0's for all ranks; None where there is none.

    They are more than a step of mean length has, where there is room for a longer one.
    """

    def tokens() -> int | None:
        plan = plan_of_run(config, runtime, data)
        return None if plan is None else max(plan.shape.max_tokens, plan.tokens_that_fill(room_bytes(runtime.device)))

    return runtime.from_main(tokens)


def planned_pass_tokens(config: RunConfig, runtime: Runtime, data: Data, scorer: Scorer) -> int | None:
    """The same of a pass in which `scorer`, which is loaded, does nothing but score."""

    def tokens() -> int | None:
        plan = plan_of_run(config, runtime, data, scorer.numerics.weights_dtype.itemsize)
        if plan is None:
            return None
        team = scorer.placement.team
        shape = dataclasses.replace(
            plan.shape,
            separate_reference=not isinstance(scorer.placement, Engine),
            reference_ranks=1 if team is None else team.world_size,
        )
        return filling_pass(dataclasses.replace(plan, shape=shape), room_bytes(runtime.device))

    return runtime.from_main(tokens)
