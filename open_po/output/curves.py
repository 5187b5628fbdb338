"""The plots that a person looks at when a run, or a sweep, is over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_po.output.files import write_atomically
from open_po.output.metrics import (
    CHOSEN_LOGPS,
    LOSS,
    REJECTED_LOGPS,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    STEP,
    TRAIN_LOSS,
    Metrics,
    evaluations,
)

_PANELS = (
    ("Loss", (LOSS,)),
    ("Reward accuracy", (REWARD_ACCURACY,)),
    ("Reward margin", (REWARD_MARGIN,)),
    ("Log-prob per response (nats)", (CHOSEN_LOGPS, REJECTED_LOGPS)),
)


def plot_curves(records: Sequence[Metrics], path: Path, title: str) -> None:
    """Loss, reward accuracy, reward margin and log-probs over the steps, as far as the run measured them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [{**record, LOSS: record[TRAIN_LOSS]} for record in records if TRAIN_LOSS in record]
    held_out = evaluations(records)
    panels = [panel for panel in _PANELS if any(panel[1][0] in record for record in [*train, *held_out])]
    if not panels:  # resumed at its last step into a new folder
        return
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 0.4 + 3.3 * rows), layout="constrained")
    figure.suptitle(title)
    for axes, (label, names) in zip(figure.subplots(rows, 2).flat, panels, strict=True):
        for name, colour in zip(names, ("tab:blue", "tab:red"), strict=False):
            who = f" {name.removeprefix('logps/')}" if len(names) > 1 else ""
            _draw(axes, _series(train, name), colour, f"training{who}")
            if points := _series(held_out, name):
                axes.plot(*zip(*points, strict=True), "o--", color=colour, markersize=5, label=f"held out{who}")
        axes.set_title(label)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: canvas.print_figure(temporary, dpi=110, format="png"))


def plot_settings(results: Sequence[tuple[str, Mapping[str, Any]]], path: Path, title: str) -> None:
    """Held-out reward accuracy and margin of each setting of a sweep, in the grid's order from the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = [name.replace(",", ", ") for name, _ in results]
    figure = Figure(figsize=(11, 1.4 + 0.28 * len(names)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, (REWARD_ACCURACY, REWARD_MARGIN), strict=True):
        what = name.removeprefix("rewards/")
        values = [result[name] for _, result in results]
        best = max(range(len(values)), key=lambda number: values[number])
        axes.plot(values, range(len(names)), "o", color="tab:blue")
        highest = format(values[best], ".1%" if what == "accuracy" else ".4g")
        axes.plot(values[best], best, "o", color="tab:red", label=f"highest: {highest}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"held-out reward {what}")
        axes.grid(alpha=0.3)
        axes.legend(loc="best")
    panels[0].xaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: canvas.print_figure(temporary, dpi=110, format="png"))


def smoothing_window(points: int) -> int | None:
    """Over how many of its points a noisy curve is averaged; None if it is too short for that."""
    window = points // 20
    return window if window >= 3 else None


def _series(records: Sequence[Metrics], name: str) -> list[tuple[float, float]]:
    return [(record[STEP], record[name]) for record in records if name in record]


def _draw(axes: Any, points: Sequence[tuple[float, float]], colour: str, label: str) -> None:
    """A series: a mark if it is one point, and its running mean if it is long enough to be noisy."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    window = smoothing_window(len(values))
    if window is None:
        axes.plot(steps, values, "s" if len(values) == 1 else "-", color=colour, label=label)
        return
    means = [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, means, color=colour, label=f"{label}, mean of {window}")
