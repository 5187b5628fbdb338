"""A sweep's folder while it goes on: its runs, a line for each."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from open_po.output.files import is_locked
from open_po.output.metrics import LOSS, REWARD_ACCURACY, REWARD_MARGIN, short_figures
from open_po.output.phase import PhaseState
from open_po.output.summary import Status
from open_po.watch.picture import STYLES
from open_po.watch.run_state import RunReader, RunState

_WAITING = "not started"
_FIGURES = ((LOSS, "loss", "{:.4f}"), (REWARD_ACCURACY, "accuracy", "{:.3f}"), (REWARD_MARGIN, "margin", "{:.4f}"))


@dataclass(frozen=True, kw_only=True)
class SweepState:
    """A sweep at one moment."""

    folder: Path
    alive: bool
    runs: Sequence[tuple[str, RunState | None]]  # by name; None: it has not started
    said: str | None  # by the process that runs before the first run, the reference pass

    @property
    def counts(self) -> str:
        """How many runs there are of each status."""
        statuses = [_WAITING if run is None else run.status for _, run in self.runs]
        return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))

    @property
    def status(self) -> str:
        """What its process is doing."""
        return "running" if self.alive else "no longer running"


class SweepReader:
    """Looks at the folder of a sweep again and again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._readers: dict[str, RunReader] = {}

    def look(self) -> SweepState | None:
        """What the folder says; None if it holds no sweep."""
        runs, logs = self._path / "runs", self._path / "logs"
        if not (runs.is_dir() or logs.is_dir()):
            return None
        alive = is_locked(self._path) is True
        names = dict.fromkeys([*_planned(self._path / "sweep.csv"), *sorted(path.name for path in runs.glob("*"))])
        found = [(name, self._readers.setdefault(name, RunReader(runs / name)).look()) for name in names]
        alive = alive or any(run is not None and run.alive for _, run in found)
        return SweepState(folder=self._path, alive=alive, runs=found, said=None if found else _said(logs))


def _planned(path: Path) -> list[str]:
    """The runs of a sweep.csv, in the grid's order."""
    with suppress(OSError, csv.Error, KeyError), open(path, newline="", encoding="utf-8") as file:
        return [Path(row["folder"]).name for row in csv.DictReader(file)]
    return []


def _said(logs: Path) -> str | None:
    with suppress(OSError, ValueError):
        newest = max(logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return newest.read_text(errors="replace").strip().splitlines()[-1]
    return None


class SweepPicture:
    """A sweep as a table, a run a line."""

    def __init__(self, state: SweepState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state = self._state
        yield Text.assemble(("Sweep ", "bold"), str(state.folder), f"  {state.status}", "  ", state.counts)
        if state.said is not None:
            yield Text(state.said)
        if not state.runs:
            return
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("run", overflow="fold")
        table.add_column("status", no_wrap=True)
        table.add_column("phase", overflow="fold")
        for _, name, _ in _FIGURES:
            table.add_column(f"held-out {name}" if options.max_width >= 110 else name, justify="right")
        for name, run in state.runs:
            newest = run.held_out[-1] if run is not None and run.held_out else {}
            table.add_row(
                name,
                Text(_WAITING, "dim") if run is None else Text(run.status, STYLES[run.status]),
                "" if run is None else _phase(run),
                *(form.format(newest[figure]) if figure in newest else "" for figure, _, form in _FIGURES),
            )
        yield table


def _phase(run: RunState) -> str:
    phase = run.current
    if phase is None or (run.status == Status.COMPLETED and not run.alive):
        return ""
    left = f", {phase.left()}" if phase.state == PhaseState.RUNNING and phase.left() else ""
    return f"{phase.label} {phase.share:.0%}{left}"


def sweep_lines(state: SweepState) -> Iterator[tuple[str, str]]:
    """As `lines` of a run: what there is to tell of a sweep."""
    yield "status", f"Sweep {state.folder}: {state.status}, {state.counts or 'no run has started'}"
    if state.said is not None:
        yield "said", state.said
    for name, run in state.runs:
        if run is not None:
            figures = f", held out {short_figures(run.held_out[-1])}" if run.held_out else ""
            yield f"run {name}", f"{name}: {', '.join(filter(None, [run.status, _phase(run)]))}{figures}"
