"""The runs that a report is about, as their folders tell of them."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from open_po.errors import UserError
from open_po.output.files import read_json_lines
from open_po.output.metrics import STEP, TRAIN_LOSS, Metrics, evaluations, read_metrics
from open_po.output.run_folder import RunFolder
from open_po.output.summary import RunSummary


@dataclass(frozen=True)
class ReportedRun:
    """A run's records, settings and summary, as far as they are there."""

    label: str  # no other run of the report has it
    folder: Path
    config: dict[str, Any]  # empty if config.yaml cannot be read
    records: list[Metrics]  # each with its step
    summary: RunSummary | None
    samples: list[dict[str, Any]]

    @cached_property
    def train(self) -> list[Metrics]:
        """The records of training."""
        return [record for record in self.records if TRAIN_LOSS in record]

    @cached_property
    def held_out(self) -> list[Metrics]:
        """The held-out records, by step, names without `eval/`."""
        return evaluations(self.records)

    @property
    def first_held_out(self) -> Metrics:
        """The first held-out figures; empty if there are none."""
        return self._of_summary("eval_before") or (self.held_out[0] if self.held_out else {})

    @property
    def final_held_out(self) -> Metrics:
        """The last held-out figures so far; empty if there are none."""
        return self._of_summary("eval") or (self.held_out[-1] if self.held_out else {})

    def _of_summary(self, name: str) -> Metrics | None:
        result = None if self.summary is None else self.summary.result
        found: Metrics | None = None if result is None else getattr(result, name)
        return found


@dataclass(frozen=True)
class ReportedSweep:
    """A sweep's folder and the runs in it."""

    label: str
    folder: Path
    fields: tuple[str, ...]  # that its grids named, and that have several values
    runs: tuple[ReportedRun, ...]
    not_started: tuple[str, ...]  # settings of the last grid without a folder


@dataclass(frozen=True)
class Reported:
    """Everything that a report is about."""

    runs: tuple[ReportedRun, ...]  # in the order they were named, a sweep's in that of its grid
    sweeps: tuple[ReportedSweep, ...]


def read_folders(paths: Sequence[Path]) -> Reported:
    """The runs in `paths`, of which each is a run's folder or a sweep's; a folder that is named twice counts once.

    Raises UserError that names the folders that hold neither, and OSError.
    """
    folders = list({path.resolve(): path for path in paths}.values())
    inside = {path: [path] if _holds_run(path) else _runs_of_sweep(path) for path in folders}
    if empty := [str(path) for path in folders if not inside[path]]:
        raise UserError(
            f"{', '.join(empty)}: {'holds' if len(empty) == 1 else 'hold'} no run; name the output_dir of a run, or of "
            "a sweep"
        )
    sweeps = [path for path in folders if inside[path] != [path]]
    names = dict(zip(sweeps, _told_apart([(path.resolve().name, path) for path in sweeps]), strict=True))
    read: dict[Path, ReportedRun] = {}
    for path in folders:
        prefix = f"{names[path]}: " if path in names and len(folders) > 1 else ""
        for folder in inside[path]:
            run = _read_run(folder)
            label = prefix + folder.name.replace(",", ", ") if path in names else run.label
            read.setdefault(folder.resolve(), replace(run, label=label))
    labels = _told_apart([(run.label, run.folder) for run in read.values()])
    read = {key: replace(run, label=label) for (key, run), label in zip(read.items(), labels, strict=True)}
    return Reported(
        runs=tuple(read.values()),
        sweeps=tuple(_sweep(names[path], path, [read[folder.resolve()] for folder in inside[path]]) for path in sweeps),
    )


def _holds_run(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.metrics.is_file() or folder.read_summary() is not None or "output_dir" in _read_config(folder)


def _runs_of_sweep(path: Path) -> list[Path]:
    """The folders of a sweep's runs: those of sweep.csv in its order, then those of earlier grids."""
    found = [folder for folder in sorted((path / "runs").glob("*")) if _holds_run(folder)]
    order = _listed(path)
    return sorted(found, key=lambda folder: order.index(folder.name) if folder.name in order else len(order))


def _listed(path: Path) -> list[str]:
    """The names of the run folders that sweep.csv lists; none if it is missing or damaged."""
    with suppress(OSError, UnicodeDecodeError, csv.Error), open(path / "sweep.csv", newline="") as file:
        return [Path(row["folder"]).name for row in csv.DictReader(file) if row.get("folder")]
    return []


def _read_config(folder: RunFolder) -> dict[str, Any]:
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        content = yaml.safe_load(folder.config.read_text())
        if isinstance(content, dict):
            return {str(name): value for name, value in content.items()}
    return {}


def _read_run(path: Path) -> ReportedRun:
    folder = RunFolder(path)
    config = _read_config(folder)
    return ReportedRun(
        label=str(config.get("exp_name") or path.resolve().name),
        folder=path,
        config=config,
        records=[record for record in read_metrics(folder.metrics) if isinstance(record.get(STEP), int)],
        summary=folder.read_summary(),
        samples=read_json_lines(folder.samples),
    )


def _sweep(label: str, path: Path, runs: Sequence[ReportedRun]) -> ReportedSweep:
    named = dict.fromkeys(name for run in runs for name in re.findall(r"(?:^|,)(\w+)=", run.folder.name))
    started = {run.folder.name for run in runs}
    return ReportedSweep(
        label=label,
        folder=path,
        fields=tuple(name for name in named if len({repr(run.config.get(name)) for run in runs}) > 1),
        runs=tuple(runs),
        not_started=tuple(name for name in _listed(path) if name not in started),
    )


def _told_apart(names: Sequence[tuple[str, Path]]) -> list[str]:
    """Names of folders; those that several have get the end of their path that tells them apart."""
    found = []
    for name, path in names:
        others = [other.resolve() for same, other in names if same == name and other != path]
        mine = path.resolve()
        tails = ("/".join(mine.parts[-length:]) for length in range(1, len(mine.parts) + 1))
        tail = next((tail for tail in tails if not any(f"/{other}".endswith(f"/{tail}") for other in others)), mine)
        found.append(f"{name} ({tail})" if others else name)
    return found
