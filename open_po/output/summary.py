"""What `run_summary.json` says of a run: written and read here alone."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from open_po import __version__
from open_po.output.estimate import Groups
from open_po.output.files import write_atomically
from open_po.output.metrics import HELD_OUT, STEP, Metrics

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "liger-kernel", "peft")
Part = TypeVar("Part")


class Status(StrEnum):
    """How far a run has come."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class ReferenceTotals:
    """What a reference pass did."""

    seconds: float
    pairs_computed: int  # with a response that was not stored at the start
    pairs_reused: int
    responses_computed: int  # by this run's processes; others may have computed the rest at the same time
    rows_verified: int
    max_tokens_per_batch: int | None  # as settled; None if nothing was computed
    packing: dict[str, float] | None  # of the first rank's packs, see `PackingStats.summary`; None if there were none


@dataclass(frozen=True, kw_only=True)
class TrainTotals:
    """What training did."""

    seconds: float  # spent in training steps
    steps: int
    pairs: int
    tokens: int  # prompt and response tokens, prompts counted with each response
    response_tokens: int
    layout: str
    max_tokens_per_batch: int  # as settled, and what memory has made of it since
    packing: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DataTotals:
    """What became of the rows of a data set."""

    pairs: int
    by_source: dict[str, int]  # pairs from each data set, by its name in the mixture
    left_out: dict[str, int]  # rows by reason
    truncated_prompts: int
    truncated_responses: int


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What was run, and where."""

    model_name_or_path: str
    loss_type: list[str]
    processes: int
    device: str


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a complete run found."""

    reference: ReferenceTotals | None  # None if the loss uses no reference
    train: TrainTotals
    eval: Metrics | None  # the last held-out figures
    eval_before: Metrics | None  # those before the first step
    data: DataTotals
    run: RunFacts
    numerics: dict[str, str | int]  # see `Numerics.key`
    peak_memory_bytes: int
    versions: dict[str, str]
    predicted_memory_bytes: int | None = None  # the plan's, beside the peak; None without a plan
    held_out: Groups | None = None  # the last held-out figures with their intervals, by source and length too


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The content of `run_summary.json`; in the file the result's fields stand beside the status."""

    status: Status
    error: str | None = None
    result: RunResult | None = None

    def write(self, path: Path) -> None:
        """Replace the file. Raises OSError."""
        content: dict[str, Any] = {"status": self.status}
        content |= {} if self.result is None else asdict(self.result)
        content |= {} if self.error is None else {"error": self.error}
        _write(path, content)

    @staticmethod
    def update(path: Path, **changes: str) -> None:
        """Change fields of a file; whatever else stands in it, of another version too, stays. Raises OSError."""
        _write(path, _content(path) | changes)

    @staticmethod
    def read(path: Path) -> RunSummary | None:
        """What a file says; None if there is none, or it cannot be read.

        What an earlier version did not write is None in the result, what a later one has added is passed over.
        """
        content = _content(path)
        try:
            status = Status(content["status"])
        except (ValueError, KeyError, TypeError):
            return None
        result = None
        with suppress(KeyError, TypeError, AttributeError):
            reference, groups = content.get("reference"), None
            with suppress(KeyError, TypeError, AttributeError):  # of a version that had none
                groups = Groups.of(content["held_out"])
            own = {
                "reference": None if reference is None else _part(ReferenceTotals, reference),
                "train": _part(TrainTotals, content["train"]),
                "data": _part(DataTotals, content["data"]),
                "run": _part(RunFacts, content["run"]),
                "held_out": groups,
            }
            result = _part(RunResult, content | own)
        return RunSummary(status=status, error=content.get("error"), result=result)


def final_figures(summary: RunSummary) -> Metrics:
    """The numbers of a complete run that are worth comparing, for trackers: `final/` before their names."""
    result = summary.result
    if result is None:
        return {}
    train = result.train
    figures = {
        "steps": float(train.steps),
        "pairs": float(train.pairs),
        "tokens": float(train.tokens),
        "train_seconds": train.seconds,
        "pairs_per_second": train.pairs / train.seconds if train.seconds else 0.0,
        "peak_memory_gb": result.peak_memory_bytes / 1e9,
    }
    figures |= {HELD_OUT + name: value for name, value in (result.eval or {}).items() if name != STEP}
    return {f"final/{name}": value for name, value in figures.items()}


def _content(path: Path) -> dict[str, Any]:
    """The file's JSON; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def _part(kind: type[Part], content: dict[str, Any]) -> Part:
    """A dataclass from its JSON, see `RunSummary.read`. Raises AttributeError if it is no mapping."""
    return kind(**{field.name: content.get(field.name) for field in fields(kind)})  # type: ignore[arg-type]


def versions() -> dict[str, str]:
    """Versions of Python, this package and what its numbers depend on."""
    found = {"python": platform.python_version(), "open_po": __version__}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
