"""Memory plans as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import JustifyMethod
from rich.table import Table

from open_po.memory_plan.advice import Advice
from open_po.memory_plan.plan import MemoryPlan

_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered": "gathered, in flight",
    "activations": "activations",
    "head": "head",
    "layers": "layer at work",
    "workspace": "workspace",
    "fragmentation": "fragmentation",
    "context": "context",
}


def gigabytes(size: float) -> str:
    """Bytes as people read them; a dash for nothing."""
    return "-" if size < 5e6 else f"{size / 1e9:,.2f}" if size < 1e10 else f"{size / 1e9:,.1f}"


def engines_table(plans: dict[str, MemoryPlan], card: float, room: float) -> Table:
    """A column for each engine, a row for each part: GB on the GPU that holds most.

    Of a `card` of so many bytes a run may take `room`.
    """
    table = Table()
    table.add_column("GB, predicted", overflow="fold")
    for name in plans:
        table.add_column(name, justify="right", no_wrap=True)
    for part, label in _NAMES.items():
        sizes = [plan.parts[part] for plan in plans.values()]
        if any(size >= 5e6 for size in sizes):
            table.add_row(label, *map(gigabytes, sizes))
    table.add_section()
    table.add_row("training", *(gigabytes(plan.total) for plan in plans.values()), style="bold")
    table.add_row("reference pass", *(gigabytes(plan.reference_total) for plan in plans.values()))
    if any(plan.rank.host for plan in plans.values()):
        table.add_row("host memory", *(gigabytes(plan.rank.host) for plan in plans.values()))
    table.add_section()
    fit = ["[green]yes[/]" if plan.fits(room) else "[red]no[/]" for plan in plans.values()]
    table.add_row(f"fits {card / 1e9:,.0f} GB", *fit)
    table.add_row("tokens of a pack", *(f"{plan.shape.max_tokens:,}" for plan in plans.values()))
    budgets = [plan.tokens_that_fill(room) for plan in plans.values()]
    table.add_row("as many would fill it", *(f"{tokens:,}" if tokens else "-" for tokens in budgets))
    table.add_row("packs of a step", *(f"{plan.shape.packs:,}" for plan in plans.values()))
    return table


def advice_table(found: Sequence[Advice], room: float) -> Table:
    """Changes that save memory, the first one first."""
    table = Table(title="What to change first (GB)", title_justify="left")
    for name in ("field", "saves", "then", "fits", "slower", "because"):
        numbers = name in ("saves", "then", "slower")
        justify: JustifyMethod = "right" if numbers else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name != "because")
    for item in found:
        fits = "[green]yes[/]" if item.plan.fits(room) else "[red]no[/]"
        slower = f"~{item.change.slower:.0%}"
        table.add_row(item.words, gigabytes(item.saved), gigabytes(item.plan.peak), fits, slower, item.change.reason)
    return table


def plan_line(plan: MemoryPlan) -> str:
    """A plan in one line."""
    largest = sorted(plan.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{_NAMES[name]} {gigabytes(size)}" for name, size in largest if size >= 5e6)
    return f"Memory, predicted: {gigabytes(plan.peak)} GB ({parts})"
