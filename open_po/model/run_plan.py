"""The memory plan of a run that has begun, whose data and ranks are known."""

from __future__ import annotations

import dataclasses

import torch

from open_po.config import RunConfig
from open_po.data.run_data import Data
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.memory_plan import CONTEXT_BYTES, MemoryPlan
from open_po.memory_plan.shape import ENGINES
from open_po.model.planning import USABLE, filling, plan_memory, training_shape

_known: dict[str, MemoryPlan | None] = {}  # that this process has made: a plan takes seconds


def plan_of_run(config: RunConfig, runtime: Runtime, data: Data) -> MemoryPlan | None:
    """The plan of this run, its typical pair the mean one of the data; None where none can be made.

    Budgets that are `auto` are those that fill the card. On a GPU alone: on a CPU a small run would be over before its
    plan is made.
    """
    engine = next((name for name in ENGINES if name == runtime.parallelism.kind), None)
    if runtime.device.type != "cuda" or engine is None:
        return None
    pairs = data.train
    prompt = max(1, round(float(pairs.prompt_lengths.mean())))
    response = max(1, round(float((pairs.chosen_lengths + pairs.rejected_lengths).mean()) / 2))
    scored = round(float(pairs.scored[:, 0].sum() / pairs.prompt_lengths.sum()), 2)
    key = f"{config.to_yaml()} {engine} {runtime.world_size} {prompt} {response} {scored}"
    if key not in _known:
        shape = dataclasses.replace(
            training_shape(config, "cuda"), prompt_tokens=prompt, response_tokens=response, scored_prompt=scored
        )
        ranks = torch.cuda.device_count() if engine == "layers" else runtime.world_size
        try:
            plan = plan_memory(config, "cuda", engine=engine, ranks=ranks, card=card_bytes(runtime), shape=shape)
            _known[key] = filling(plan, config, _room(runtime))
        except UserError:  # of a model whose code asks tensors for values; training goes on without a plan
            _known[key] = None
    return _known[key]


def planned_tokens(config: RunConfig, runtime: Runtime, data: Data, *, trains: bool) -> int | None:
    """Tokens of a pass that fill the card by the plan, rank 0's for all ranks; None where there is none.

    In training they are more than a step of mean length has, where there is room for a longer one.
    """

    def tokens() -> int | None:
        plan = plan_of_run(config, runtime, data)
        if plan is None:
            return None
        shape = plan.shape
        return max(shape.max_tokens, plan.tokens_that_fill(_room(runtime))) if trains else shape.reference_tokens

    return runtime.from_main(tokens)


def card_bytes(runtime: Runtime) -> float:
    """The memory of this rank's GPU."""
    return float(torch.cuda.get_device_properties(runtime.device).total_memory)


def _room(runtime: Runtime) -> float:
    """What this process may come to take of the card: what others have of it is not to be had."""
    free, total = torch.cuda.mem_get_info(runtime.device)
    mine = torch.cuda.memory_reserved(runtime.device) + CONTEXT_BYTES["cuda"]
    return USABLE * total - max(0.0, total - free - mine)
