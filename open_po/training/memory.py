"""What a run says of its memory before it takes it."""

from __future__ import annotations

from open_po.config import RunConfig
from open_po.data.run_data import Data
from open_po.distributed.runtime import Runtime
from open_po.memory_plan import MemoryPlan
from open_po.memory_plan.tables import engines_table, plan_line
from open_po.model.memory import card_bytes, room_bytes
from open_po.model.run_plan import plan_of_run


def tell_plan(config: RunConfig, runtime: Runtime, data: Data) -> MemoryPlan | None:
    """Print the plan, as a table; rank 0 calls this."""
    plan = plan_of_run(config, runtime, data)
    if plan is not None:
        runtime.say(plan_line(plan))
        device = runtime.device
        runtime.console.print(engines_table({plan.shape.engine: plan}, card_bytes(device), room_bytes(device)))
    return plan
