"""What the folder of a run says of it while it goes on, and afterwards."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from open_po.output.board import BoardFile
from open_po.output.files import is_locked
from open_po.output.metrics import TRAIN_LOSS, Metrics, evaluations
from open_po.output.phase import Phase, PhaseState
from open_po.output.run_folder import RunFolder
from open_po.output.summary import Status

_SILENCE_SECONDS = 120.0  # four of a board's heartbeats
_CHECKPOINTS = 3  # of which the age is told

STARTING = "starting"
KILLED = "killed"  # it says that it is running, and no process holds its folder
SILENT = "silent"  # as far as it can be seen from here: it runs on another machine, and writes nothing any more


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run at one moment."""

    folder: Path
    config: Mapping[str, Any]  # config.yaml; empty if it cannot be read
    status: str  # a `Status`, or one of the words above
    alive: bool  # whether more may come
    error: str | None
    board: BoardFile | None
    metrics: Sequence[Metrics]
    checkpoints: Sequence[tuple[str, float]]  # the newest ones, newest first, with the time of each
    uploaded_to: str | None

    @property
    def phases(self) -> Sequence[Phase]:
        """Its phases; one that a killed run was in has stopped."""
        phases = [] if self.board is None else self.board.phases
        if self.alive:
            return phases
        going = PhaseState.RUNNING
        return [replace(phase, state=PhaseState.STOPPED) if phase.state == going else phase for phase in phases]

    @property
    def current(self) -> Phase | None:
        """The phase that began last of those that go on, or of all."""
        phases = [phase for phase in self.phases if phase.state == PhaseState.RUNNING] or list(self.phases)
        return max(phases, key=lambda phase: phase.started, default=None)

    @property
    def updated(self) -> float | None:
        """When it last came further, in seconds since the epoch."""
        times = [phase.updated for phase in self.phases] + [at for _, at in self.checkpoints]
        return max(times, default=None)

    @property
    def training(self) -> list[Metrics]:
        """Its records of training."""
        return [record for record in self.metrics if TRAIN_LOSS in record]

    @property
    def held_out(self) -> list[Metrics]:
        """Its held-out records, names without `eval/`."""
        return evaluations(self.metrics)


class RunReader:
    """Looks at the folder of a run again and again; of metrics.jsonl it reads what is new."""

    def __init__(self, path: Path) -> None:
        self._folder = RunFolder(path)
        self._metrics = _Tail(self._folder.metrics)

    def look(self) -> RunState | None:
        """What the folder says; None if it holds no run."""
        folder = self._folder
        if not folder.config.is_file():
            return None
        locked = is_locked(folder.path)  # before its summary, which a run that ends writes first
        board = BoardFile.read(folder.board)
        summary = folder.read_summary()
        status, alive = judge(None if summary is None else summary.status, locked, board, time.time())
        if status == KILLED and is_locked(folder.path):  # it began between the two looks
            status, alive = STARTING, True
        return RunState(
            folder=folder.path,
            config=_config(folder.config),
            status=status,
            alive=alive,
            error=None if summary is None else summary.error,
            board=board,
            metrics=self._metrics.records(),
            checkpoints=_newest(folder.checkpoints),
            uploaded_to=folder.published_to(),
        )


def judge(status: Status | None, locked: bool | None, board: BoardFile | None, now: float) -> tuple[str, bool]:
    """A run's status in a word, and whether more may come of it.

    `status` is what its summary says, `locked` whether its folder is seen to be held, see `is_locked`.
    """
    if locked:
        return STARTING if status is None else str(status), True
    if status not in (None, Status.RUNNING):
        return str(status), False
    elsewhere = board is not None and board.host != platform.node()
    if (locked is False and not elsewhere) or board is None:
        return KILLED, False
    return (Status.RUNNING if now - board.written < _SILENCE_SECONDS else SILENT), True


def _config(path: Path) -> Mapping[str, Any]:
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if isinstance(content, dict):
            return content
    return {}


def _newest(folder: Path) -> list[tuple[str, float]]:
    found = sorted(folder.glob("step_*"), key=lambda path: (len(path.name), path.name), reverse=True)
    times = []
    for path in found[:_CHECKPOINTS]:
        with suppress(OSError):  # pruned meanwhile
            times.append((path.name, path.stat().st_mtime))
    return times


class _Tail:
    """The records of a metrics.jsonl that grows; one that is replaced is read anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: int | None = None
        self._position = 0
        self._records: list[Metrics] = []

    def records(self) -> list[Metrics]:
        try:
            with open(self._path, "rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self._identity or about.st_size < self._position:
                    self._identity, self._position, self._records = about.st_ino, 0, []
                file.seek(self._position)
                text = file.read()
        except OSError:
            return self._records
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half-written
        self._position += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    self._records.append(record)
        return self._records
