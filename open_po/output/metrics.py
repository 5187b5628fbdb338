"""The records of a run's metrics.jsonl, and what its figures are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

Metrics = dict[str, float]


def read_metrics(path: Path) -> list[Metrics]:
    """The records of a metrics.jsonl; a line cut off by a crash is passed over."""
    records: list[Metrics] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def evaluations(records: Sequence[Metrics]) -> list[Metrics]:
    """The held-out records of a metrics.jsonl, by step, names without `eval/`."""
    return [
        {name.removeprefix("eval/"): value for name, value in record.items()}
        for record in records
        if "eval/loss" in record
    ]
