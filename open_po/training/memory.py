"""The memory plan of a run that has begun, whose data and ranks are known."""

from __future__ import annotations

import dataclasses

import torch

from open_po.config import RunConfig
from open_po.data.run_data import Data
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.memory_plan import MemoryPlan
from open_po.memory_plan.shape import ENGINES
from open_po.memory_plan.tables import engines_table, plan_line
from open_po.model.planning import plan_memory, training_shape


def plan_of_run(config: RunConfig, runtime: Runtime, data: Data) -> MemoryPlan | None:
    """The plan of this run, its typical pair the mean one of the data; None where none can be made.

    On a GPU alone: on a CPU a small run would be over before its plan is made.
    """
    engine = next((name for name in ENGINES if name == runtime.parallelism.kind), None)
    if runtime.device.type != "cuda" or engine is None:
        return None
    pairs = data.train
    prompt = float(pairs.prompt_lengths.mean())
    response = float((pairs.chosen_lengths + pairs.rejected_lengths).mean()) / 2
    shape = dataclasses.replace(
        training_shape(config, "cuda"), prompt_tokens=max(1, round(prompt)), response_tokens=max(1, round(response))
    )
    ranks = torch.cuda.device_count() if engine == "layers" else runtime.world_size
    try:
        return plan_memory(config, "cuda", engine=engine, ranks=ranks, card=_card(runtime), shape=shape)
    except UserError:  # of a model whose code asks tensors for values; training goes on without a plan
        return None


def _card(runtime: Runtime) -> float:
    return float(torch.cuda.get_device_properties(runtime.device).total_memory)


def tell_plan(config: RunConfig, runtime: Runtime, data: Data) -> MemoryPlan | None:
    """Print the plan, as a table; rank 0 calls this."""
    plan = plan_of_run(config, runtime, data)
    if plan is not None:
        room = _card(runtime)
        engine = plan.shape.engine
        title = f"Memory plan, {plan.shape.max_tokens:,} tokens a pack"
        runtime.console.print(engines_table({engine: plan}, room, {engine: plan.tokens_that_fill(room)}, title))
        runtime.say(plan_line(plan))
    return plan
