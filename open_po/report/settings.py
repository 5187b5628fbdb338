"""In which settings runs differ, and which they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_po.report.runs import ReportedRun

NOT_SET = "not set"
_OF_EACH_RUN = ("exp_name", "output_dir", "resume_from_checkpoint")  # told by the table, or of no run's result


@dataclass(frozen=True)
class Settings:
    """The settings of runs, as their config.yaml has them; a run whose file cannot be read has none."""

    differing: dict[str, list[str]]  # by field, of each run
    shared: dict[str, str]


def compare_settings(runs: Sequence[ReportedRun]) -> Settings:
    """What differs between runs, and what does not; fields in the order of config.yaml."""
    fields = dict.fromkeys(name for run in runs for name in run.config if name not in _OF_EACH_RUN)
    known = [run for run in runs if run.config]
    differing = [name for name in fields if len({repr(run.config.get(name)) for run in known}) > 1]
    return Settings(
        differing={name: [shown(run.config.get(name)) if run.config else "" for run in runs] for name in differing},
        shared={name: shown(known[0].config[name]) for name in fields if name not in differing},
    )


def shown(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return NOT_SET
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value)
    return str(value)
