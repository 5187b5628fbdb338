"""A report's page read back, and run folders to make one of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from open_po.commands import report

VOID = {"meta", "line", "circle", "input", "br", "wbr", "link", "img"}


class Page(HTMLParser):
    """What stands in a page: its elements with their attributes and text, the rows of its tables, its figures."""

    def __init__(self, source: str, *, figures: bool = True) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = self.title = ""
        self._open: list[str] = []
        self._table: list[list[str]] = []
        self.feed(source)
        self.figures: list[dict[str, Any]] = []
        if figures:
            (text,) = (text for attributes, text in self.scripts if attributes.get("id") == "figures")
            self.figures = json.loads(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((found, ""))
        elif tag == "table":
            self._table = self.tables.setdefault(found.get("id") or f"table {len(self.tables)}", [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif tag == "small" and self._table and self._table[-1]:
            self._table[-1][-1] = self._table[-1][-1].strip() + " | "

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, tag
        if tag in ("td", "th"):
            self._table[-1][-1] = self._table[-1][-1].strip()
        elif tag == "table":
            self._table = []

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif "style" not in self._open:
            self.text += data
            self.title += data if "title" in self._open[-1:] else ""
            if self._table and self._table[-1] and {"td", "th"} & set(self._open):
                self._table[-1][-1] += data

    def rows(self, table: str) -> list[dict[str, str]]:
        """A table's rows by the names in its head; a remark stands behind a bar."""
        head, *rows = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in rows]

    def figure(self, title: str) -> dict[str, Any]:
        return next(figure for figure in self.figures if figure["title"] == title)

    def points(self, title: str, run: int, kind: str) -> tuple[list[int], list[float]]:
        """The one trace of a kind that a run has in a figure."""
        (trace,) = (trace for trace in self.figure(title)["data"] if trace["meta"] == {"run": run, "kind": kind})
        return trace["x"], trace["y"]


def make_page(out: Path, *folders: Path) -> Page:
    """The page that the command writes about some folders."""
    assert report.main([*map(str, folders), "--out", str(out)]) == 0
    return Page(out.read_text())


def make_run(
    folder: Path,
    *,
    steps: int = 40,
    every: int = 10,
    name: str = "a run",
    summary: Mapping[str, Any] | None = None,
    accuracy: float = 0.9,
    **settings: Any,
) -> Path:
    """A run's folder: `steps` records of training, and held-out ones at 0 and `every` so many if that is not 0."""
    folder.mkdir(parents=True)
    config = {"exp_name": name, "output_dir": str(folder), "loss_type": "dpo", "beta": 0.1, "seed": 1, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    lines = []
    for step in range(steps + 1):
        if step:
            lines.append({"training_step": step, **train_figures(step)})
        if every and step % every == 0:
            share = accuracy if step == steps else 0.5
            figures = {"loss": 0.7 - step / 1000, "rewards/accuracy": share, "rewards/margin": step / 10}
            lines.append({"training_step": step, **{f"eval/{metric}": value for metric, value in figures.items()}})
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "run_summary.json").write_text(json.dumps(summary or {"status": "running"}))
    return folder


def train_figures(step: int) -> dict[str, float]:
    """Of a step: each metric its own noisy curve."""
    names = ("train_loss", "rewards/accuracy", "rewards/margin", "grad_norm", "perf/pairs_per_second")
    figures = {name: (at + 1) * (1 + 1 / step) + 0.1 * math.sin(step * (at + 7)) for at, name in enumerate(names)}
    return figures | {"learning_rate": 1e-6 / step, "epoch": step / 100, "perf/peak_memory_gb": 1 + step / 100}


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
