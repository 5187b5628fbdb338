"""The grid of a sweep as plotly figures: a line, a heat map or parallel coordinates, by how many fields were swept."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from open_po.output.metrics import REWARD_ACCURACY, REWARD_MARGIN
from open_po.report.runs import ReportedRun, ReportedSweep
from open_po.report.series import is_number
from open_po.report.settings import shown

Figure = dict[str, Any]

_FIGURES = ((REWARD_ACCURACY, "accuracy", ".1%"), (REWARD_MARGIN, "margin", ".4~g"))
_SCALE = "Cividis"  # the same order of brightness for every kind of eye


def grid_figures(sweep: ReportedSweep) -> list[Figure]:
    """The last held-out accuracy and margin of each setting; none if no run has them, or nothing differs."""
    runs = [run for run in sweep.runs if is_number(run.final_held_out.get(REWARD_ACCURACY))]
    if not runs or not sweep.fields:
        return []
    draw = {1: _line, 2: _heat_map}.get(len(sweep.fields), _parallel)
    return [draw(runs, sweep.fields, *figure) for figure in _FIGURES]


def _line(runs: Sequence[ReportedRun], fields: Sequence[str], metric: str, what: str, form: str) -> Figure:
    (field,) = fields
    values = _values(runs, field)
    found = {repr(run.config.get(field)): run.final_held_out.get(metric) for run in runs}
    numeric = all(is_number(value) for value in values)
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if numeric else "markers",
        "x": _texts(values),
        "y": [found[repr(value)] for value in values],
        "marker": {"size": 10},
        "hovertemplate": f"{html.escape(field)}=%{{x}}<br>held-out {what} %{{y:{form}}}<extra></extra>",
        "meta": {"run": 0, "kind": "grid"},
    }
    axis = {"title": {"text": f"held-out reward {what}", "standoff": 10}, "automargin": True, "tickformat": form}
    return _figure(what, [trace], {"xaxis": _category(field), "yaxis": axis})


def _heat_map(runs: Sequence[ReportedRun], fields: Sequence[str], metric: str, what: str, form: str) -> Figure:
    down, across = sorted(fields, key=lambda field: len(_values(runs, field)))
    rows, columns = _values(runs, down), _values(runs, across)
    found = {tuple(repr(run.config.get(field)) for field in (down, across)): run.final_held_out for run in runs}
    cells = [[found.get((repr(row), repr(column)), {}).get(metric) for column in columns] for row in rows]
    trace = {
        "type": "heatmap",
        "x": _texts(columns),
        "y": _texts(rows),
        "z": cells,
        "texttemplate": f"%{{z:{form}}}",
        "hoverongaps": False,
        "hovertemplate": f"{html.escape(down)}=%{{y}}<br>{html.escape(across)}=%{{x}}<br>held-out {what} "
        f"%{{z:{form}}}<extra></extra>",
        "colorscale": _SCALE,
        "showscale": False,  # the cells say it
        "xgap": 2,
        "ygap": 2,
    }
    return _figure(what, [trace], {"xaxis": _category(across), "yaxis": _category(down)})


def _parallel(runs: Sequence[ReportedRun], fields: Sequence[str], metric: str, what: str, form: str) -> Figure:
    """A line for each run through its settings to its figure; plotly's own kind needs WebGL, which paper has not."""
    held_out = [run for run in runs if is_number(run.final_held_out.get(metric))]
    results = [run.final_held_out[metric] for run in held_out]
    low, high = min(results), max(results)
    last = f"held-out {what}"
    marks = {field: _values(held_out, field) for field in fields}
    traces = []
    for run, result in sorted(zip(held_out, results, strict=True), key=lambda pair: pair[1]):  # the best on top
        places = [
            _share([repr(value) for value in marks[field]].index(repr(run.config.get(field))), marks[field])
            for field in fields
        ]
        goodness = 1.0 if high == low else (result - low) / (high - low)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(run.label),
                "x": [html.escape(name) for name in (*fields, last)],
                "y": [*places, goodness],
                "opacity": round(0.12 + 0.88 * goodness**2, 3),
                "line": {"width": 1 + 2 * goodness},
                "marker": {"size": 5},
                "customdata": [result] * (len(fields) + 1),
                "hovertemplate": f"<b>%{{fullData.name}}</b><br>{last} %{{customdata:{form}}}<extra></extra>",
                "meta": {"run": 0, "kind": "grid"},
            }
        )
    labels = [
        (field, _share(at, marks[field]), shown(value)) for field in fields for at, value in enumerate(marks[field])
    ]
    digits = ".1%" if form.endswith("%") else ".4g"
    labels += [(last, place, format(value, digits)) for place, value in ((0.0, low), (1.0, high))]
    layout = {
        "xaxis": {"type": "category", "automargin": True, "range": [-0.2, len(fields) + 0.5]},
        "yaxis": {"visible": False, "range": [-0.1, 1.1]},
        "annotations": [
            {
                "x": html.escape(name),
                "y": place,
                "text": html.escape(text),
                "showarrow": False,
                "xanchor": "left",
                "xshift": 6,
            }
            for name, place, text in labels
        ],
    }
    return _figure(what, traces, layout)


def _share(at: int, values: Sequence[Any]) -> float:
    """The height of a value on its axis, 0 to 1."""
    return at / (len(values) - 1) if len(values) > 1 else 0.5


def _figure(what: str, traces: list[dict[str, Any]], layout: dict[str, Any]) -> Figure:
    base = {"showlegend": False, "margin": {"l": 20, "r": 12, "t": 26, "b": 44}, "hovermode": "closest"}
    return {"title": f"Held-out reward {what}", "data": traces, "layout": base | layout}


def _category(field: str) -> dict[str, Any]:
    return {"title": {"text": html.escape(field), "standoff": 10}, "type": "category", "automargin": True}


def _values(runs: Sequence[ReportedRun], field: str) -> list[Any]:
    """A field's distinct values, numbers by size and before what is none."""
    distinct = {repr(run.config.get(field)): run.config.get(field) for run in runs}.values()
    numbers = sorted(value for value in distinct if is_number(value))
    return [*numbers, *sorted((value for value in distinct if not is_number(value)), key=shown)]


def _texts(values: Sequence[Any]) -> list[str]:
    return [html.escape(shown(value)) for value in values]
