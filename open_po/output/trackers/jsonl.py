"""metrics.jsonl and samples.jsonl: what every run leaves, whatever else it reports to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_po.output.files import disk_faults, write_atomically
from open_po.output.metrics import STEP, Metrics, read_metrics
from open_po.output.observers import RunObserver
from open_po.output.run_folder import RunFolder
from open_po.output.samples import Sample


class JsonlTracker(RunObserver):
    """One JSON object per line, of metrics and of samples; on resumption lines after the resumed step are dropped."""

    def __init__(self, folder: RunFolder, resumed_step: int) -> None:
        self._folder = folder
        _keep(folder.metrics, resumed_step)
        if folder.samples.exists():  # a run without samples has no file of them
            _keep(folder.samples, resumed_step)

    def metrics_written(self, metrics: Metrics) -> None:
        _append(self._folder.metrics, [metrics])

    def samples_written(self, samples: Sequence[Sample]) -> None:
        _append(self._folder.samples, map(asdict, samples))


def _keep(path: Path, resumed_step: int) -> None:
    kept = [record for record in read_metrics(path) if record[STEP] <= resumed_step]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(path, lambda temporary: temporary.write_text(lines))


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with disk_faults(str(path), "checkpoints are kept"), open(path, "a") as file:
        file.write(lines)
