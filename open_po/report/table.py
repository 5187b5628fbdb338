"""The table of runs: how far each has come, and its figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from open_po.output.metrics import (
    EPOCH,
    LOSS,
    PAIRS_PER_SECOND,
    PEAK_MEMORY_GB,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    STEP,
    Metrics,
)
from open_po.output.run_folder import RunFolder
from open_po.output.summary import RunResult, Status
from open_po.report.runs import ReportedRun
from open_po.report.series import is_number


@dataclass(frozen=True)
class Cell:
    """What a cell says, the number behind it, by which rows are sorted, and a remark below."""

    text: str = "-"
    value: float | None = None
    note: str = ""


COLUMNS = (
    "status",
    "loss type",
    "steps",
    "held-out accuracy",
    "held-out margin",
    "held-out loss",
    "best step",
    "pairs/s",
    "peak memory",
    "time in steps",
    "seed",
)


def row_of(run: ReportedRun) -> list[Cell]:
    """A run's cells, one for each of COLUMNS. Held-out figures are the last ones, with the first in the remark."""
    result = None if run.summary is None else run.summary.result
    loss = run.config.get("loss_type") if result is None else result.run.loss_type
    seed = run.config.get("seed")
    return [
        _status(run),
        Cell(" + ".join(map(str, loss)) if isinstance(loss, list) else str(loss or "-")),
        _steps(run, result),
        *(
            _held_out(run, name, form)
            for name, form in ((REWARD_ACCURACY, ".1%"), (REWARD_MARGIN, ".4g"), (LOSS, ".4g"))
        ),
        _best(run),
        _rate(run, result),
        _memory(run, result),
        _time(result),
        Cell("-" if seed is None else str(seed), seed if is_number(seed) else None),
    ]


def _status(run: ReportedRun) -> Cell:
    """How far the run is; of one that seems to go on also when it last wrote, for it may have been killed."""
    if run.summary is None:
        return Cell("unknown", note="run_summary.json is missing or damaged")
    note = run.summary.error or ""
    metrics = RunFolder(run.folder).metrics
    if run.summary.status == Status.RUNNING and metrics.exists():
        note = time.strftime("last wrote %Y-%m-%d %H:%M:%S", time.localtime(metrics.stat().st_mtime))
    return Cell(str(run.summary.status), note=note)


def _steps(run: ReportedRun, result: RunResult | None) -> Cell:
    last: Metrics = run.train[-1] if run.train else {}
    steps = int(last.get(STEP, 0)) if result is None else result.train.steps
    epochs = last.get(EPOCH)
    return Cell(f"{steps:,}", steps, f"epoch {epochs:.4g}" if is_number(epochs) else "")


def _held_out(run: ReportedRun, name: str, form: str) -> Cell:
    first, final = run.first_held_out.get(name), run.final_held_out.get(name)
    if final is None:
        return Cell()
    notes = [f"from {format(first, form)}"] if first is not None and _several(run) else []
    groups = None if run.summary is None or run.summary.result is None else run.summary.result.held_out
    if groups is not None and (estimate := groups.all.figures.get(name)) is not None:
        notes.append(f"95%: {estimate.interval(form)}")
    return Cell(format(final, form), final if is_number(final) else None, "; ".join(notes))


def _several(run: ReportedRun) -> bool:
    return run.first_held_out.get(STEP) != run.final_held_out.get(STEP)


def _best(run: ReportedRun) -> Cell:
    """The evaluation that is the most accurate, then the one with the widest margin, as a sweep chooses its best."""
    ranked = [record for record in run.held_out if is_number(record.get(REWARD_ACCURACY))]
    if not ranked:
        return Cell()
    best = max(ranked, key=lambda record: (record[REWARD_ACCURACY], record.get(REWARD_MARGIN, 0.0)))
    return Cell(f"{best[STEP]:,}", best[STEP], f"accuracy {best[REWARD_ACCURACY]:.1%}")


def _rate(run: ReportedRun, result: RunResult | None) -> Cell:
    if result is not None:
        return Cell() if not result.train.seconds else _number(result.train.pairs / result.train.seconds, ",.1f")
    last = next((rate for record in reversed(run.train) if is_number(rate := record.get(PAIRS_PER_SECOND))), None)
    return Cell() if last is None else _number(last, ",.1f", "last written")


def _memory(run: ReportedRun, result: RunResult | None) -> Cell:
    written = [peak for record in run.train if is_number(peak := record.get(PEAK_MEMORY_GB))]
    if result is not None and result.peak_memory_bytes:
        return _number(result.peak_memory_bytes / 1e9, ".2f", unit=" GB")
    return _number(max(written), ".2f", "so far", " GB") if written else Cell()


def _time(result: RunResult | None) -> Cell:
    if result is None or result.train.seconds is None:
        return Cell()
    seconds = result.train.seconds
    return Cell(f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds))), seconds)


def _number(value: float, form: str, note: str = "", unit: str = "") -> Cell:
    return Cell(f"{format(value, form)}{unit}", value, note)


def other_scales(runs: Sequence[ReportedRun]) -> bool:
    """Whether losses and rewards of these runs cannot be compared as numbers."""
    return len({repr([_setting(run, name) for name in ("loss_type", "loss_weights", "beta")]) for run in runs}) > 1


def _setting(run: ReportedRun, name: str) -> Any:
    return run.config.get(name)
