"""The curves of runs as plotly figures, a figure for each metric and a colour and dash for each run.

Figures are plain dictionaries, as plotly.js takes them; what depends on the page's theme (colours) is set there.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_po.output.curves import smoothing_window
from open_po.output.metrics import (
    CHOSEN_LENGTH,
    CHOSEN_LOGPS,
    CHOSEN_REWARDS,
    EPOCH,
    GENERATED_LENGTH,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    PAIRS_PER_SECOND,
    PEAK_MEMORY_GB,
    REJECTED_LENGTH,
    REJECTED_LOGPS,
    REJECTED_REWARDS,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    STEP,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    UPDATE_FRACTION,
)
from open_po.report.runs import ReportedRun
from open_po.report.series import Series, all_series

Trace = dict[str, Any]

COLOURS = 8  # that page.css has, --run-0 and so on
# Of a run's lines, by how many runs have had its colour before: in pixels, as SVG and plotly.js both take them.
DASHES = ("solid", "8px,3px", "2px,3px", "8px,3px,2px,3px", "16px,4px", "16px,3px,2px,3px", "4px,8px")
# Of a page, spread over its traces: about 15 characters each, so that it stays below 10 MB with plotly.js's 5.
_POINTS = 180_000
_MOST, _FEWEST = 1500, 60  # points of a trace


@dataclass(frozen=True)
class Panel:
    """A metric and how it is shown."""

    metric: str
    title: str
    axis: str  # the unit, or what is counted
    form: str = ".4~g"  # of d3, for the hover
    ticks: str = ""  # of d3, for the axis; empty: plotly's choice
    noisy: bool = True  # else the curve of training is shown as it is


PANELS = (
    Panel(LOSS, "Loss", "loss"),
    Panel(REWARD_ACCURACY, "Reward accuracy", "share of pairs", ".1%", ".0%"),
    Panel(REWARD_MARGIN, "Reward margin", "chosen minus rejected reward"),
    Panel(CHOSEN_LOGPS, "Log-prob of chosen responses", "nats per response"),
    Panel(REJECTED_LOGPS, "Log-prob of rejected responses", "nats per response"),
    Panel(CHOSEN_REWARDS, "Reward of chosen responses", "reward"),
    Panel(REJECTED_REWARDS, "Reward of rejected responses", "reward"),
    Panel(GENERATED_LENGTH, "Length of generated answers", "tokens"),
    Panel(GRAD_NORM, "Gradient norm", "norm before clipping"),
    Panel(UPDATE_FRACTION, "Weights changed", "share of trained weights, in a step", ".2%", ".3~%"),
    Panel(LEARNING_RATE, "Learning rate", "learning rate", ticks=".3~e", noisy=False),
    Panel(PAIRS_PER_SECOND, "Throughput in pairs", "pairs per second"),
    Panel(TOKENS_PER_SECOND, "Throughput in tokens", "tokens per second"),
    Panel(PEAK_MEMORY_GB, "Peak memory", "GB", noisy=False),
)


def style_of(number: int) -> tuple[int, str]:
    """The colour and the dash of a run, by its number in the report."""
    return number % COLOURS, DASHES[number // COLOURS % len(DASHES)]


@dataclass(frozen=True)
class Curves:
    """The figures, and what was left out of them."""

    figures: dict[str, dict[str, Any]]  # by metric
    most: int  # points of a trace
    thinned: list[tuple[str, int]]  # runs with longer curves, and how many values theirs have
    not_finite: int  # values that are no number


def curves_of(runs: Sequence[ReportedRun]) -> Curves:
    """A figure for each metric that any run has."""
    measured = [_Measured(run) for run in runs]
    # Lengths of the data's own responses are the same at every evaluation.
    no_curves = {STEP, EPOCH, CHOSEN_LENGTH, REJECTED_LENGTH}
    names = {name for run in measured for name in (*run.train, *run.held_out)} - no_curves
    panels = [panel for panel in PANELS if panel.metric in names]
    panels += [Panel(name, name, name) for name in sorted(names - {panel.metric for panel in PANELS})]
    most = max(_FEWEST, min(_MOST, _POINTS // max(1, 3 * len(panels) * len(runs))))
    figures = {}
    for panel in panels:
        drawing = _Drawing(panel=panel, most=most, crowded=len(runs) > COLOURS)
        traces = [trace for number, run in enumerate(measured) for trace in drawing.traces(number, run)]
        figures[panel.metric] = {"title": panel.title, "data": traces, "layout": _layout(panel)}
    longest = [(run.label, max(len(run.train), len(run.held_out))) for run in runs]
    return Curves(
        figures=figures,
        most=most,
        thinned=[(label, length) for label, length in longest if length > most],
        not_finite=sum(run.not_finite for run in measured),
    )


class _Measured:
    """A run's metrics in training and held out, a mix's parts and what else there is among them."""

    def __init__(self, run: ReportedRun) -> None:
        self.label = run.label
        written = all_series(run.train), all_series(run.held_out)
        self.train, self.held_out = (
            {name: finite for name, series in one.items() if (finite := series.finite()).steps} for one in written
        )
        self.not_finite = sum(_length(one) for one in written) - _length(self.train) - _length(self.held_out)
        if TRAIN_LOSS in self.train:
            self.train[LOSS] = self.train.pop(TRAIN_LOSS)


@dataclass(frozen=True)
class _Drawing:
    """How the traces of a figure are made."""

    panel: Panel
    most: int  # points of a trace
    crowded: bool  # many runs: lines are thin

    def traces(self, number: int, run: _Measured) -> Iterator[Trace]:
        """A run's traces: of training its mean and behind it what was logged, if it is long enough, and held out."""
        train, held_out = run.train.get(self.panel.metric), run.held_out.get(self.panel.metric)
        if train is not None:
            window = smoothing_window(len(train.steps)) if self.panel.noisy else None
            logged = train.thinned(self.most)
            if window is None:
                yield self._trace(number, run, "line", logged, "training")
            else:
                mean = train.mean(window, self.most)
                yield self._trace(number, run, "raw", logged, "training, logged value")
                yield self._trace(number, run, "mean", mean, f"training, mean of {window:,} logged values")
        if held_out is not None:
            yield self._trace(number, run, "held_out", held_out.thinned(self.most), "held out")

    def _trace(self, number: int, run: _Measured, kind: str, series: Series, what: str) -> Trace:
        alone = len(series.steps) == 1  # a line needs two
        width = {"raw": 0.8, "held_out": 1.2}.get(kind, 1.3 if self.crowded else 2)
        size = 4 if self.crowded or len(series.steps) > 30 else 8
        return {
            "type": "scatter",
            "mode": "lines+markers" if kind == "held_out" or alone else "lines",
            "name": html.escape(run.label),  # plotly reads some HTML in it
            "x": series.steps,
            "y": [float(f"{value:.6g}") for value in series.values],
            "line": {"width": width, "dash": "solid" if kind == "raw" else style_of(number)[1]},
            "marker": {"size": size, "symbol": "circle-open", "line": {"width": 2}} if kind == "held_out" else {},
            "opacity": 0.3 if kind == "raw" else 1,
            "hovertemplate": f"<b>%{{fullData.name}}</b><br>{what}<br>step %{{x:,}}: %{{y:{self.panel.form}}}"
            "<extra></extra>",
            "meta": {"run": number, "kind": kind},
        }


def _layout(panel: Panel) -> dict[str, Any]:
    ticks = {"tickformat": panel.ticks} if panel.ticks else {}
    return {
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {"title": {"text": html.escape(panel.axis), "standoff": 10}, "automargin": True, **ticks},
        "showlegend": False,  # the page has one for all figures
        "hovermode": "closest",
        "margin": {"l": 20, "r": 12, "t": 26, "b": 44},
    }


def _length(metrics: Mapping[str, Series]) -> int:
    return sum(len(series.values) for series in metrics.values())
