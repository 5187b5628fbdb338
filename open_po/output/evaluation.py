"""What `evaluation.json` says of models and their answers: written here, shown as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from open_po.output.estimate import Estimate
from open_po.output.files import write_atomically

SIDES = ("chosen", "rejected", "generated")


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """One model."""

    model: str  # a folder or a Hub name
    run: str | None  # the folder of the run that made it, if that is known
    step: int | None  # of that run
    metrics: dict[str, Estimate]  # with the interval that the true value lies in, 95 of 100 times
    lengths: dict[str, float]  # mean tokens of the chosen, rejected and generated answers, by its own tokenizer
    characters: dict[str, float]  # mean characters of the same


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much higher a model's score is than the first one's, over the same resamples of examples."""

    metric: str
    first: str
    other: str
    difference: float
    low: float
    high: float
    p: float  # how often chance alone makes a difference as large


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The content of `evaluation.json`."""

    task: str
    data: list[str]
    examples: int
    max_new_tokens: int
    models: dict[str, ModelScores]
    comparisons: list[Comparison]

    def write(self, path: Path) -> None:
        """Replace the file. Raises OSError."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def scores_table(evaluation: Evaluation, decimals: Mapping[str, int]) -> Table:
    """Models and their scores, with intervals, and the lengths of answers."""
    title = f"Evaluation: {evaluation.task}, {evaluation.examples:,} examples, with 95% intervals"
    models = evaluation.models
    table = Table(title=title, title_justify="left")
    table.add_column("model", style="bold", overflow="fold")
    stepped = any(scores.step is not None for scores in models.values())
    sides = [side for side in reversed(SIDES) if any(side in scores.lengths for scores in models.values())]
    for name in [*(["step"] if stepped else []), *decimals, *(f"tokens, {side}" for side in sides)]:
        table.add_column(name, justify="right", overflow="fold")
    for name, scores in models.items():
        cells = ["-" if scores.step is None else f"{scores.step:,}"] if stepped else []
        cells += [scores.metrics[metric].text(f".{count}f") for metric, count in decimals.items()]
        cells += [f"{scores.lengths[side]:.1f}" if side in scores.lengths else "-" for side in sides]
        table.add_row(name, *cells)
    return table


def comparisons_table(evaluation: Evaluation, decimals: Mapping[str, int]) -> Table:
    """Differences from the first model."""
    first = next(iter(evaluation.models))
    table = Table(title=f"Difference from {first}, by paired bootstrap", title_justify="left")
    table.add_column("model", style="bold", overflow="fold")
    for name in ("metric", "difference", "95% interval", "p"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for found in evaluation.comparisons:
        form = f"+.{decimals[found.metric]}f"
        interval = f"{found.low:{form}} to {found.high:{form}}"
        table.add_row(found.other, found.metric, f"{found.difference:{form}}", interval, _chance(found.p))
    return table


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.002 else "< 0.002"
