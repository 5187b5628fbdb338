"""The page itself: one file that needs nothing else, and that can load nothing."""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from open_po import __version__
from open_po.errors import UserError
from open_po.report.curves import curves_of, style_of
from open_po.report.grids import grid_figures
from open_po.report.runs import Reported
from open_po.report.samples import samples_of
from open_po.report.settings import NOT_SET, compare_settings
from open_po.report.table import COLUMNS, other_scales, row_of

_HERE = Path(__file__).parent


def render(reported: Reported) -> str:
    """The page about some runs, as HTML. Raises UserError if plotly is not installed."""
    runs = reported.runs
    curves = curves_of(runs)
    grids = [(sweep, grid_figures(sweep)) for sweep in reported.sweeps]
    in_sweeps = {run.folder for sweep in reported.sweeps for run in sweep.runs}  # whose label says the folder
    figures = [*curves.figures.values(), *(figure for _, made in grids for figure in made)]
    scripts = {"plotly": _plotly_js(), "page": (_HERE / "page.js").read_text()}
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=_title(reported),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        version=__version__,
        scripts=scripts,
        # The page runs these scripts and no other, whatever stands in a prompt or a name, and loads nothing.
        script_hashes=" ".join(f"'sha256-{_hash(script)}'" for script in scripts.values()),
        style=(_HERE / "page.css").read_text(),
        runs=[
            {
                "label": run.label,
                "folder": "" if run.folder in in_sweeps else str(run.folder),
                "style": style_of(number),
                "row": row_of(run),
            }
            for number, run in enumerate(runs)
        ],
        columns=COLUMNS,
        other_scales=other_scales(runs),
        unreadable=[run.label for run in runs if not run.config],
        not_started=[(sweep.label, sweep.not_started) for sweep in reported.sweeps if sweep.not_started],
        curves=curves,
        grids=grids,
        figures=_json(figures),
        settings=compare_settings(runs),
        not_set=NOT_SET,
        samples=asdict(samples_of(runs)),
    )


def _title(reported: Reported) -> str:
    if len(reported.runs) == 1:
        return f"Run {reported.runs[0].label}"
    if len(reported.sweeps) == 1 and len(reported.sweeps[0].runs) == len(reported.runs):
        return f"Sweep {reported.sweeps[0].label}: {len(reported.runs)} runs"
    return f"{len(reported.runs)} runs"


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("report: needs plotly, which is not installed; `pip install plotly`") from error
    return str(get_plotlyjs())


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> Any:
    """A value without numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json(item) for item in value]
    return value
