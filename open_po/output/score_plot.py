"""The plot of an evaluation: scores of models side by side, or over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_po.output.estimate import Estimate
from open_po.output.evaluation import SIDES, Evaluation, ModelScores
from open_po.output.files import write_atomically

_LENGTH = "mean length in tokens"
_SIDES = {"generated": "tab:blue", "chosen": "tab:green", "rejected": "tab:red"}
_COLOURS = ("tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")  # of runs
_LINES = ("--", ":", "-.")


def plot_scores(evaluation: Evaluation, path: Path) -> None:
    """A panel for each metric with 95% intervals, and one of lengths.

    Several models of one run are a curve over its steps, and others are lines across it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = evaluation.models
    metrics = list(next(iter(models.values())).metrics)
    has_curves = bool(_curves(models))
    rows = math.ceil((len(metrics) + 1) / 2)
    height = 3.3 if has_curves else 1.2 + 0.3 * len(models)
    figure = Figure(figsize=(11, 0.5 + height * rows), layout="constrained")
    figure.suptitle(f"{evaluation.task}: {evaluation.examples:,} examples, 95% intervals")
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    names = [*metrics, _LENGTH]
    draw = _over_steps if has_curves else _side_by_side
    for axes, name in zip(panels, names, strict=False):
        draw(axes, models, name)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: canvas.print_figure(temporary, dpi=110, format="png"))


def _curves(models: dict[str, ModelScores]) -> dict[str, list[ModelScores]]:
    """Of runs with several models these, by step."""
    runs: dict[str, list[ModelScores]] = {}
    for scores in models.values():
        if scores.run is not None and scores.step is not None:
            runs.setdefault(scores.run, []).append(scores)
    return {run: sorted(found, key=lambda one: one.step or 0) for run, found in runs.items() if len(found) > 1}


def _over_steps(axes: Any, models: dict[str, ModelScores], name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    runs = _curves(models)
    in_runs = [scores for found in runs.values() for scores in found]
    others = {label: scores for label, scores in models.items() if scores not in in_runs}
    for (run, found), colour in zip(runs.items(), _COLOURS * len(runs), strict=False):
        steps, label = [scores.step for scores in found], Path(run).name
        if name == _LENGTH:
            axes.plot(steps, [scores.lengths["generated"] for scores in found], "o-", color=colour, label=label)
            continue
        values = [scores.metrics[name] for scores in found]
        axes.plot(steps, [value.value for value in values], "o-", color=colour, label=label)
        axes.fill_between(
            steps, [value.low for value in values], [value.high for value in values], color=colour, alpha=0.15
        )
    for (label, scores), line in zip(others.items(), _LINES * len(others), strict=False):
        value = scores.lengths["generated"] if name == _LENGTH else scores.metrics[name].value
        axes.axhline(value, color="tab:gray", linestyle=line, label=label)
    if name == _LENGTH:
        for side in _sides(in_runs):
            if side != "generated":
                axes.axhline(in_runs[0].lengths[side], color=_SIDES[side], linewidth=0.8, label=side)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend()


def _side_by_side(axes: Any, models: dict[str, ModelScores], name: str) -> None:
    places = range(len(models))
    if name == _LENGTH:
        for side in _sides(list(models.values())):
            values = [scores.lengths[side] for scores in models.values()]
            axes.plot(values, places, "o" if side == "generated" else "|", color=_SIDES[side], label=side, markersize=9)
        axes.legend()
    else:
        estimates: list[Estimate] = [scores.metrics[name] for scores in models.values()]
        values = [estimate.value for estimate in estimates]
        spans = [
            [estimate.value - estimate.low for estimate in estimates],
            [estimate.high - estimate.value for estimate in estimates],
        ]
        # A corpus metric's own value may lie outside the interval of its resamples.
        spans = [[max(0.0, span) for span in side] for side in spans]
        axes.errorbar(values, places, xerr=spans, fmt="o", color="tab:blue", capsize=4)
    axes.set_yticks(places, list(models))
    axes.set_ylim(len(models) - 0.5, -0.5)


def _sides(models: Sequence[ModelScores]) -> list[str]:
    return [side for side in reversed(SIDES) if all(side in scores.lengths for scores in models)]
