"""What `python -m open_po plan` shows."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from open_po.commands.place import Place
from open_po.config import RunConfig
from open_po.config.checks import contradictions
from open_po.config.run_config import FIELDS
from open_po.distributed.parallelism import Parallelism
from open_po.errors import UserError
from open_po.memory_plan import EngineName, MemoryPlan, usable
from open_po.memory_plan.advice import Change, advice
from open_po.memory_plan.shape import ENGINES
from open_po.memory_plan.tables import advice_table, engines_table, plan_line
from open_po.model.memory import card_bytes
from open_po.model.planning import DeviceType, filling, plan_memory, training_shape
from open_po.optimizers import OPTIMIZERS
from open_po.output.console import make_console

_DEFAULT_CARD = 80e9
_NOTHING_FITS = 3


def show(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Print the plan; returns the exit code. Raises UserError if the model cannot be made."""
    card: float = arguments.gpu_memory or _DEFAULT_CARD
    ranks: int = arguments.gpus
    room = usable(card)
    found = _plans(config, arguments.device, ranks, card)
    plans: dict[str, MemoryPlan] = {engine: filling(plan, config, room) for engine, plan in found.items()}
    console = make_console()
    console.print(_model_line(config, next(iter(plans.values()))))
    console.print(f"{ranks} x {card / 1e9:,.0f} GB", soft_wrap=True)
    console.print(engines_table(plans, card, room))
    if any(plan.fits(room) for plan in plans.values()):
        return 0
    base = min(plans.values(), key=lambda plan: plan.peak)

    def replan(change: Change) -> MemoryPlan | None:
        return _after(change, config, arguments.device, base, card)

    console.print(advice_table(advice(base, config.flat(), replan, ranks, room), room))
    return _NOTHING_FITS


def planned_memory(config: RunConfig, place: Place) -> str:
    """A line for a dry run: what a rank takes under the engine that the run asks for.

    On a GPU with the budgets that fill it; of a machine that has none here, one of the usual size.
    """
    wanted, ranks = config.distributed.parallel, place.ranks
    usual: EngineName = "ddp" if ranks > 1 else "single"
    engine: EngineName = next((name for name in ENGINES if name == wanted), usual)
    card = _card_here() if place.devices else None
    try:
        plan = plan_memory(config, "cpu" if card is None else "cuda", engine=engine, ranks=ranks, card=card)
        if card is not None:
            plan = filling(plan, config, usable(card))
    except UserError as error:
        return f"Memory: not planned ({error})"
    line = f"{plan_line(plan)} on each rank"
    if card is not None:
        fits = "of" if plan.fits(usable(card)) else "which is too much for"
        line += f", {fits} {card / 1e9:,.0f} GB, with packs of {plan.shape.max_tokens:,} tokens"
    return f"{line}; parallel {engine}; python -m open_po plan says more"


def _card_here() -> float:
    return card_bytes(torch.device("cuda", 0)) if torch.cuda.is_available() else _DEFAULT_CARD


def _plans(config: RunConfig, device: DeviceType, ranks: int, card: float) -> dict[EngineName, MemoryPlan]:
    """Those of all engines that a run could have. One rehearsal does for all whose weights have one precision."""
    found: dict[EngineName, MemoryPlan] = {}
    for engine in _engines(config, ranks):
        shape = training_shape(config, device, Parallelism.asked_for(config.distributed, engine))
        alike = (plan for plan in found.values() if plan.shape.weight == shape.weight)
        if (like := next(alike, None)) is None:
            found[engine] = plan_memory(config, device, engine=engine, ranks=ranks, card=card, shape=shape)
            continue
        shape = dataclasses.replace(
            shape,
            engine=engine,
            ranks=ranks,
            layout=like.shape.layout,
            short_last_layer=like.shape.short_last_layer,
        )
        found[engine] = dataclasses.replace(like, shape=shape)
    return found


def _engines(config: RunConfig, ranks: int) -> tuple[EngineName, ...]:
    """Those that a run on so many GPUs could have, the one that it asks for first."""
    if ranks == 1:
        return ("single",)
    wanted = config.distributed.parallel
    return tuple(sorted((name for name in ENGINES if name != "single"), key=lambda name: name != wanted))


def _after(change: Change, config: RunConfig, device: DeviceType, base: MemoryPlan, card: float) -> MemoryPlan | None:
    """The plan with a change, of packs as large as those of `base`."""
    sections: dict[str, dict[str, object]] = {}
    for name, value in change.fields.items():
        sections.setdefault(FIELDS[name].section, {})[name] = value
    if "use_lora" in change.fields and config.flat()["lora_rank"] is None and config.model.lora_start == "new":
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
        shape = training_shape(changed, device, Parallelism.asked_for(changed.distributed, engine))
        shape = dataclasses.replace(shape, reference_tokens=base.shape.reference_tokens)
        if "max_tokens_per_batch" not in change.fields:
            shape = dataclasses.replace(shape, max_tokens=base.shape.max_tokens)
        return plan_memory(changed, device, engine=engine, ranks=base.shape.ranks, card=card, shape=shape)
    except UserError:
        return None


def _model_line(config: RunConfig, plan: MemoryPlan) -> str:
    whole = plan.model.whole
    trained = "all" if whole.trained == whole.parameters else f"{whole.trained / 1e9:,.2f}"
    return (
        f"{config.model.model_name_or_path}: {whole.parameters / 1e9:,.2f} billion weights, {trained} of them trained; "
        f"layout {plan.shape.layout}"
    )
