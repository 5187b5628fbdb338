"""The tables, Markdown file and plot of `benchmarks/against_trl`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import machine
from workloads import Ids, Shape, repeated_flops, useful_flops

BUSY = 0.05  # a share of the CPUs' time taken by others from which on a measurement is disturbed

_DEFAULTS = (
    " open_po has no setting but batch and length and nothing in its environment; stock TRL has its fastest settings, "
    "by search, and an allocator set to keep freed memory where that is faster. What open_po measures of the machine "
    "it measures in each process anew, within the time of the reference pass."
)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the project wants to reach on a workload."""

    stock: float  # times as fast as stock TRL, in training and in the reference pass
    patched: float | None  # the same over patched TRL
    memory: float | None  # times stock TRL's peak
    share: float  # of the matmul rate, in training


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side on one workload; lists are by round."""

    side: str
    settings: str
    training: list[float]  # pairs/s
    reference: list[float]
    peak_bytes: list[int]
    share: float  # of the matmul rate, training
    computed_share: float | None  # the same without what open_po's last layer leaves out
    reference_share: float
    logp_difference: float
    loss_difference: float
    others: float  # the greatest share of the CPUs' time that other work took in a round
    invalid: str | None
    losses: list[float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One workload."""

    workload: str
    about: str
    shape: str
    counts: dict[str, float]
    pairs: int
    rates: list[float]  # FLOP/s, one reading before and one after every round
    rate_tokens: int
    rows: list[Row]
    work: str  # of rows, in units of the useful work
    targets: Targets | None = None
    searches: dict[str, list[str]] = field(default_factory=dict)  # Markdown rows by side

    def row(self, side: str) -> Row | None:
        return next((row for row in self.rows if row.side == side), None)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range."""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def token_line(found: dict[str, float]) -> str:
    return (
        f"means of prompt {found['prompt']:.0f}, chosen {found['chosen']:.0f}, rejected {found['rejected']:.0f}; "
        f"longest {found['longest']:.0f}; distinct tokens are {found['distinct_share']:.2f} of those with the prompt "
        f"repeated, scored ones {found['scored_share']:.2f} of the distinct"
    )


def work_line(shape: Shape, ids: Sequence[Ids]) -> str:
    useful = useful_flops(shape, ids)
    scored, everything = (repeated_flops(shape, ids, score_prompts=whole) / useful for whole in (False, True))
    return (
        f"rows with their prompts, without padding, need {scored:.2f} times the useful FLOPs, {everything:.2f} times "
        "with every position in the head"
    )


def result_rows(comparison: Comparison) -> list[str]:
    """The Markdown table of a workload's sides."""
    lines = [
        "| side | training, pairs/s | reference, pairs/s | peak memory, GB | share of matmul rate: training, reference "
        "| greatest difference: log-probs, losses |",
        "|---|---|---|---|---|---|",
    ]
    for row in comparison.rows:
        agreement = f"{row.logp_difference:.1e}, {row.loss_difference:.1e}"
        if row.invalid:
            lines.append(f"| {row.side} | {row.invalid} | | | | {agreement} |")
            continue
        memory = spread([peak / 1e9 for peak in row.peak_bytes])
        lines.append(
            f"| {row.side} | {spread(row.training)} | {spread(row.reference)} | {memory} "
            f"| {row.share:.0%}, {row.reference_share:.0%} | {agreement} |"
        )
    return lines


def _ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round."""
    return [x / y for x, y in zip(mine, theirs, strict=True)]


def _judged(ratios: Sequence[float], target: float | None, *, at_most: bool = False) -> str:
    text = spread(ratios)
    if target is None:
        return text
    middle = statistics.median(ratios)
    met = middle <= target if at_most else middle >= target
    return f"{text}, {'meets' if met else 'misses'} {target:g}"


def ratio_rows(comparison: Comparison) -> list[str]:
    """open_po's figures over those of each TRL side, with the targets they have; none over an invalid row."""
    ours, targets = comparison.row("open_po"), comparison.targets
    lines = []
    for side in ("trl", "trl-patched"):
        theirs = comparison.row(side)
        if ours is None or theirs is None or ours.invalid or theirs.invalid:
            continue
        speed = memory_target = None
        if targets is not None:
            speed, memory_target = (targets.stock, targets.memory) if side == "trl" else (targets.patched, None)
        training = _judged(_ratios(ours.training, theirs.training), speed)
        reference = _judged(_ratios(ours.reference, theirs.reference), speed)
        memory = _judged(_ratios(ours.peak_bytes, theirs.peak_bytes), memory_target, at_most=True)
        if (others := max(ours.others, theirs.others)) > BUSY:
            training, reference = (f"{text}; disturbed, other work took {others:.0%}" for text in (training, reference))
        lines.append(f"| {comparison.workload} | {side} | {training} | {reference} | {memory} |")
    return lines


RATIO_HEAD = [
    "| workload | open_po over | training, times as fast | reference, times as fast | peak memory, times as much |",
    "|---|---|---|---|---|",
]


def search_rows(tables: dict[str, list[Any]]) -> dict[str, list[str]]:
    """Markdown rows of the trials of a search, by side."""
    found: dict[str, list[str]] = {}
    for side, trials in tables.items():
        found[side] = []
        for trial in trials:
            if trial.failure:
                found[side].append(f"| {side} | {trial.settings} | {trial.failure} | | |")
            else:
                rates = f"{trial.training:.2f} | {trial.reference:.2f} | {trial.peak_bytes / 1e9:.2f}"
                found[side].append(f"| {side} | {trial.settings} | {rates} |")
    return found


def _share(comparison: Comparison) -> str | None:
    row, targets = comparison.row("open_po"), comparison.targets
    if row is None or row.invalid:
        return None
    computed = "" if row.computed_share is None else f", {row.computed_share:.0%} without the skipped part"
    if targets is None:
        return f"{comparison.workload} {row.share:.0%}{computed}"
    verb = "meets" if row.share >= targets.share else "misses"
    return f"{comparison.workload} {row.share:.0%} ({verb} {targets.share:.0%}{computed})"


def console(comparison: Comparison) -> str:
    lines = [*result_rows(comparison), *RATIO_HEAD, *ratio_rows(comparison)]
    return "\n".join(["", *lines, f"matmul rate {_rate_line(comparison)}", ""])


def _rate_line(comparison: Comparison) -> str:
    rates = spread([rate / 1e9 for rate in comparison.rates], ".0f")
    return f"{rates} GFLOP/s at packs of {comparison.rate_tokens:,} tokens"


@dataclass(kw_only=True)
class Report:
    """All workloads of a run."""

    device: str
    threads: int
    global_batch: int
    about: str  # what the preset is
    defaults: bool = False  # whether open_po ran as it comes
    comparisons: list[Comparison] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """The Markdown file, and the plot beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        plot(self.comparisons, path.with_suffix(".png"))
        path.write_text("\n".join(self.lines(path.with_suffix(".png").name)) + "\n")

    def lines(self, picture: str) -> list[str]:
        cpu, mode = self.device == "cpu", " --defaults" if self.defaults else ""
        lines = [
            f"Made by `python benchmarks/against_trl{mode}`. {machine(self.device, self.threads, 'trl')}. {self.about}",
            "",
            f"Global batch {self.global_batch} pairs, {'float32' if cpu else 'bfloat16 over float32 weights'}, AdamW; "
            "every figure is a median over rounds (with its range), of fresh processes that take turns. Differences "
            "are |x - y| / max(1, |y|) to the first round of stock TRL, over the reference log-probs of all pairs and "
            "the losses of all steps. The share is that of useful FLOP/s (a prompt counted once, response tokens only "
            "in the head, nothing recomputed) in the rate at which this machine multiplies matrices of the model's "
            "shapes." + (_DEFAULTS if self.defaults else ""),
            "",
            f"![pairs/s relative to TRL]({picture})",
            "",
            *RATIO_HEAD,
            *(line for c in self.comparisons for line in ratio_rows(c)),
            "",
            "open_po's share of the matmul rate in training (a part of the useful FLOPs it skips: its last layer "
            "computes only what something is predicted from): "
            f"{', '.join(share for c in self.comparisons if (share := _share(c)))}.",
        ]
        for comparison in self.comparisons:
            lines += self._workload(comparison)
        return lines

    def _workload(self, comparison: Comparison) -> list[str]:
        lines = [
            "",
            f"## {comparison.workload}",
            "",
            f"{comparison.about[0].upper()}{comparison.about[1:]}. {comparison.pairs} pairs, "
            f"{token_line(comparison.counts)}; {comparison.work}. Model: {comparison.shape}. "
            f"Matmul rate {_rate_line(comparison)}. Other "
            f"work took up to {max(row.others for row in comparison.rows):.0%} of the CPUs' time in a round.",
            "",
            *result_rows(comparison),
            "",
            "Settings" + ("" if comparison.searches else ", of an earlier search with the same command") + ":",
            "",
            *(f"- {row.side}: {row.settings}" for row in comparison.rows),
            "",
            "Losses of stock TRL's steps: " + ", ".join(f"{loss:.4f}" for loss in comparison.rows[0].losses) + ".",
        ]
        if comparison.searches:
            lines += [
                "",
                "<details><summary>Search</summary>",
                "",
                "| side | settings | training, pairs/s | reference, pairs/s | peak memory, GB |",
                "|---|---|---|---|---|",
                *(row for rows in comparison.searches.values() for row in rows),
                "",
                "</details>",
            ]
        return lines


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Bars of pairs/s relative to stock TRL, by workload, with the range over rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    colours = {"trl": "tab:gray", "trl-patched": "tab:orange", "open_po": "tab:blue"}
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("training", "Training"), ("reference", "Reference pass")), strict=True
    ):
        for place, comparison in enumerate(comparisons):
            stock = comparison.row("trl")
            valid = [row for row in comparison.rows if not row.invalid]
            for number, row in enumerate(valid if stock is not None else []):
                ratios = _ratios(getattr(row, name), getattr(stock, name))
                middle = statistics.median(ratios)
                left = place + (number - (len(valid) - 1) / 2) * 0.27
                errors = [[middle - min(ratios)], [max(ratios) - middle]]
                label = row.side if place == 0 else None
                axes.bar(left, middle, 0.25, yerr=errors, capsize=3, color=colours[row.side], label=label)
                axes.annotate(f"{middle:.2f}", (left, max(ratios)), ha="center", va="bottom", fontsize=8)
        axes.set_title(f"{title}: pairs/s, TRL = 1")
        axes.set_xticks(range(len(comparisons)), [comparison.workload for comparison in comparisons])
        axes.axhline(1.0, color="black", linewidth=0.6)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(y=0.12)
    figure.axes[0].legend(loc="upper left")
    FigureCanvasAgg(figure).print_figure(path, dpi=110, format="png")
