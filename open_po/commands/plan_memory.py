"""What `python -m open_po plan` shows."""

from __future__ import annotations

import argparse
import dataclasses

from open_po.commands.place import Place
from open_po.config import RunConfig
from open_po.config.checks import contradictions
from open_po.config.run_config import FIELDS
from open_po.errors import UserError
from open_po.memory_plan import EngineName, MemoryPlan
from open_po.memory_plan.advice import Change, advice
from open_po.memory_plan.shape import ENGINES
from open_po.memory_plan.tables import advice_table, engines_table, plan_line
from open_po.model.planning import USABLE, DeviceType, filling, plan_memory, training_shape
from open_po.optimizers import OPTIMIZERS
from open_po.output.console import make_console

_DEFAULT_ROOM = 80e9
_NOTHING_FITS = 3


def show(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Print the plan; returns the exit code. Raises UserError if the model cannot be made."""
    room: float = arguments.gpu_memory or _DEFAULT_ROOM
    ranks: int = arguments.gpus
    first = plan_memory(config, arguments.device, card=room)
    usable = USABLE * room
    plans: dict[str, MemoryPlan] = {
        engine: filling(first.under(engine, ranks), config, usable) for engine in _engines(config, ranks)
    }
    budgets = {name: plan.tokens_that_fill(usable) for name, plan in plans.items()}
    console = make_console()
    console.print(_model_line(config, first))
    console.print(f"{ranks} x {room / 1e9:,.0f} GB", soft_wrap=True)
    console.print(engines_table(plans, room, budgets))
    if any(plan.fits(room) for plan in plans.values()):
        return 0
    base = min(plans.values(), key=lambda plan: plan.peak)

    def replan(change: Change) -> MemoryPlan | None:
        return _after(change, config, arguments.device, base, room)

    found = advice(base, config.flat(), replan, ranks)
    console.print(advice_table(found, room))
    return _NOTHING_FITS


def planned_memory(config: RunConfig, place: Place) -> str:
    """A line for a dry run: what a rank takes under the engine that the run asks for."""
    wanted, ranks = config.distributed.parallel, place.ranks
    usual: EngineName = "ddp" if ranks > 1 else "single"
    engine: EngineName = next((name for name in ENGINES if name == wanted), usual)
    try:
        plan = plan_memory(config, "cuda" if place.devices else "cpu", engine=engine, ranks=ranks)
    except UserError as error:
        return f"Memory: not planned ({error})"
    return f"{plan_line(plan)} on each rank, parallel {engine}; python -m open_po plan says more"


def _engines(config: RunConfig, ranks: int) -> tuple[EngineName, ...]:
    """Those that a run on so many GPUs could have, the one that it asks for first."""
    if ranks == 1:
        return ("single",)
    wanted = config.distributed.parallel
    return tuple(sorted((name for name in ENGINES if name != "single"), key=lambda name: name != wanted))


def _after(change: Change, config: RunConfig, device: DeviceType, base: MemoryPlan, room: float) -> MemoryPlan | None:
    """The plan with a change, of packs as large as those of `base`."""
    sections: dict[str, dict[str, object]] = {}
    for name, value in change.fields.items():
        sections.setdefault(FIELDS[name].section, {})[name] = value
    if "use_lora" in change.fields and config.flat()["lora_rank"] is None:
        sections["model"] |= {"lora_rank": 64, "lora_alpha": 16.0, "lora_dropout": 0.0}
        sections["model"]["lora_target_modules"] = ["all-linear"]
    changed = dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )
    if any(contradictions(changed)) or (
        changed.distributed.offload_optimizer and not OPTIMIZERS[changed.train.optimizer].on_host
    ):
        return None
    engine = next((name for name in ENGINES if name == change.fields.get("parallel")), base.shape.engine)
    try:
        shape = dataclasses.replace(training_shape(changed, device), reference_tokens=base.shape.reference_tokens)
        if "max_tokens_per_batch" not in change.fields:
            shape = dataclasses.replace(shape, max_tokens=base.shape.max_tokens)
        return plan_memory(changed, device, engine=engine, ranks=base.shape.ranks, card=room, shape=shape)
    except UserError:
        return None


def _model_line(config: RunConfig, plan: MemoryPlan) -> str:
    whole = plan.model.whole
    trained = "all" if whole.trained == whole.parameters else f"{whole.trained / 1e9:,.2f}"
    return (
        f"{config.model.model_name_or_path}: {whole.parameters / 1e9:,.2f} billion weights, {trained} of them trained; "
        f"layout {plan.shape.layout}"
    )
