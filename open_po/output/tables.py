"""The tables that a person looks at when a run is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table


def packing_line(shares: dict[str, float]) -> str:
    """`PackingStats.summary` in words."""
    packs = f"{shares['packs']:,} pack{'' if shares['packs'] == 1 else 's'}"
    if shares["packs_over_budget"]:
        packs += f", {shares['packs_over_budget']:,} of them over the budget because a pair is not cut"
    return (
        f"{packs}, {shares['fill']:.0%} full; {shares['prompt_tokens_saved']:.0%} of prompt tokens "
        f"saved, {shares['padding_avoided']:.0%} padding avoided"
    )


def summary_table(summary: dict[str, Any], folder: Path) -> Table:
    """The run's summary as a table for the console."""
    table = Table(title=f"Run {summary['status']}", title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    reference, train = summary["reference"], summary["train"]
    if reference is not None:
        counts = f"{reference['pairs_computed']:,} pairs computed, {reference['pairs_reused']:,} from the cache"
        table.add_row("reference", f"{counts}, {reference['seconds']:.1f} s")
    rate = train["pairs"] / train["seconds"] if train["seconds"] else 0.0
    table.add_row("training", f"{train['steps']:,} steps, {train['pairs']:,} pairs, {train['seconds']:.1f} s of steps")
    table.add_row("throughput", f"{rate:,.1f} pairs/s, {train['tokens']:,} tokens, {train['response_tokens']:,} scored")
    table.add_row("packing", packing_line(train["packing"]))
    for name, label in (
        ("loss", "held-out loss"),
        ("rewards/accuracy", "held-out reward accuracy"),
        ("rewards/margin", "held-out reward margin"),
        ("logps/chosen", "held-out chosen log-prob"),
    ):
        if summary["eval"] is not None and name in summary["eval"]:
            before, after = summary["eval_before"], summary["eval"]
            start = f"{before[name]:.4f} -> " if before is not None else ""
            table.add_row(label, f"{start}{after[name]:.4f}")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 1e9:.2f} GB")
    table.add_row("output", str(folder))
    return table
