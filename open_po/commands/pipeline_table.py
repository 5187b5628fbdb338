"""What a pipeline has come to: its models side by side, on the console and in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from open_po.commands.pipeline_stages import Pipeline
from open_po.errors import UserError
from open_po.output import markdown
from open_po.output.estimate import Estimate
from open_po.output.files import write_atomically
from open_po.output.metrics import REWARD_ACCURACY
from open_po.output.run_folder import CURVES, RunFolder

_TITLES = {"exact_match": "exact match %", "chrf": "chrF", "chrf++": "chrF++", "bleu": "BLEU"}
_BOUNDS = ("value", "low", "high")
_ACCURACY = ("reward_accuracy_before", "reward_accuracy", "reward_accuracy_low", "reward_accuracy_high")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The held-out reward accuracy of a preference stage."""

    before: float  # before the first step
    after: float  # after the last
    interval: Estimate | None  # of the latter; None in runs of versions that told none

    @staticmethod
    def of(folder: RunFolder) -> Accuracy | None:
        """What a run has come to; None if it looked at no held-out pairs."""
        summary = folder.read_summary()
        result = None if summary is None else summary.result
        if result is None or not result.eval or not result.eval_before:
            return None
        before, after = result.eval_before[REWARD_ACCURACY], result.eval[REWARD_ACCURACY]
        interval = None if result.held_out is None else result.held_out.all.figures.get(REWARD_ACCURACY)
        return Accuracy(before=before, after=after, interval=interval)

    def text(self) -> str:
        """`50.0% -> 98.6% (97.4% to 99.6%)`."""
        interval = "" if self.interval is None else f" ({self.interval.interval('.1%')})"
        return f"{self.before:.1%} -> {self.after:.1%}{interval}"

    def content(self) -> dict[str, float | None]:
        """Its columns of pipeline.csv."""
        low, high = (None, None) if self.interval is None else (self.interval.low, self.interval.high)
        return dict(zip(_ACCURACY, (self.before, self.after, low, high), strict=True))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model's figures."""

    name: str
    folder: str
    metrics: dict[str, tuple[float, float, float]]  # value and the ends of its interval, by metric
    lengths: dict[str, float]  # mean tokens of chosen, rejected and generated answers
    accuracy: Accuracy | None

    def content(self, metrics: Sequence[str]) -> dict[str, Any]:
        """The row of pipeline.csv."""
        found: dict[str, Any] = {"model": self.name, "folder": self.folder}
        for name in metrics:
            for bound, value in zip(_BOUNDS, self.metrics.get(name, (None,) * 3), strict=True):
                found[name if bound == "value" else f"{name}_{bound}"] = value
        accuracy = dict.fromkeys(_ACCURACY) if self.accuracy is None else self.accuracy.content()
        return {**found, **accuracy, "mean_answer_tokens": self.lengths.get("generated")}

    def cells(self, metrics: Sequence[str]) -> list[str]:
        """The row as a person reads it, under `heads`."""
        shown = [_interval(*self.metrics[name]) if name in self.metrics else "" for name in metrics]
        accuracy = "" if self.accuracy is None else self.accuracy.text()
        length = f"{self.lengths['generated']:.1f}" if "generated" in self.lengths else ""
        return [self.name, *shown, accuracy, length]


def tell_results(pipeline: Pipeline, evaluation: Path, console: Console) -> None:
    """Write pipeline.md and pipeline.csv, and print the table with the paths of what to look at next."""
    rows = read_rows(pipeline, evaluation)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    heads = ["model", *(_TITLES.get(name, name) for name in metrics), "held-out reward accuracy", "answer tokens"]
    cells = [row.cells(metrics) for row in rows]
    wanted = [i for i in range(len(heads)) if i == 0 or any(line[i] for line in cells)]
    heads, cells = [heads[i] for i in wanted], [[line[i] for i in wanted] for line in cells]
    title = f"Pipeline {pipeline.name}" + (", with 95% bootstrap intervals" if metrics else "")
    console.print(_table(title, heads, cells))
    path = pipeline.folder / "pipeline.md"
    text = f"{markdown.plain(title)}\n\n{markdown.table(heads, cells, right=len(heads) - 1)}\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    _write_csv(path.with_suffix(".csv"), [row.content(metrics) for row in rows])
    told = {"table": f"{path}, {path.with_suffix('.csv')}"}
    plot = evaluation.with_suffix(".png")
    if metrics and plot.is_file():
        told["plot"] = str(plot)
    told["curves"] = ", ".join(str(stage.folder.path / CURVES) for stage in pipeline.losses)
    for label, what in told.items():
        console.print(f"{label}: {what}", soft_wrap=True, markup=False)


def read_rows(pipeline: Pipeline, evaluation: Path) -> list[Row]:
    """A row for the model that preferences start from and for each loss. Raises UserError, OSError."""
    start, *trained = pipeline.models
    models: list[Mapping[str, Any]] = [{}] * (1 + len(trained))
    if pipeline.evaluate is not None:
        content = _read(evaluation)
        models = list(content.get("models", {}).values())  # in the order in which they were named
        if len(models) != 1 + len(trained):
            raise UserError(f"{evaluation}: has {len(models)} models of {1 + len(trained)}; remove it to evaluate anew")
    names = ["SFT" if pipeline.sft is not None else Path(start).name, *(stage.name for stage in pipeline.losses)]
    accuracies = [None, *(Accuracy.of(stage.folder) for stage in pipeline.losses)]
    return [
        Row(
            name=name,
            folder=folder,
            metrics={label: _bounds(figures) for label, figures in model.get("metrics", {}).items()},
            lengths={label: float(mean) for label, mean in model.get("lengths", {}).items()},
            accuracy=accuracy,
        )
        for name, folder, model, accuracy in zip(names, pipeline.models, models, accuracies, strict=True)
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is damaged; remove it to evaluate anew") from error
    return content if isinstance(content, dict) else {}


def _bounds(figures: Mapping[str, float]) -> tuple[float, float, float]:
    value, low, high = (float(figures[bound]) for bound in _BOUNDS)
    return value, low, high


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _table(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for line in cells:
        table.add_row(*line)
    return table


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
