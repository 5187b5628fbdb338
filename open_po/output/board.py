"""The phases that a process is in: bars on a terminal, and a file that other processes look at."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from open_po.output.bars import Bar
from open_po.output.files import write_atomically
from open_po.output.phase import Phase

_WRITE_SECONDS = 1.0  # between two versions of the file
_HEARTBEAT_SECONDS = 30.0  # after which it is written although nothing has changed
_PATIENCE_SECONDS = 5.0  # for a file system that does not answer when a run ends
_REFRESH = 4  # times a second that bars are drawn


@dataclass(frozen=True, kw_only=True)
class BoardFile:
    """What a process has told of itself."""

    host: str
    pid: int
    started: float  # seconds since the epoch, as `written`
    written: float
    phases: list[Phase]  # in the order in which they began for the first time

    @staticmethod
    def read(path: Path) -> BoardFile | None:
        """What a file says; None if there is none, or it cannot be read."""
        try:
            content: Mapping[str, Any] = json.loads(path.read_text())
            return BoardFile(
                host=str(content["host"]),
                pid=int(content["pid"]),
                started=float(content["started"]),
                written=float(content["written"]),
                phases=[Phase.of(phase) for phase in content["phases"]],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Board:
    """Phases, the open ones as bars on a terminal; all of them in a file while there is one to keep.

    The file is written by a thread of its own, so that no phase ever waits for a disk. All of it may be called from
    several threads.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()  # of what is listed here
        self._display = threading.Lock()  # of starting and stopping the bars, whose thread takes the other one
        self._open: list[Callable[[], Phase]] = []
        self._phases: dict[tuple[str, int], Callable[[], Phase]] = {}
        self._live: Live | None = None
        self._writer: _Writer | None = None

    @property
    def has_bars(self) -> bool:
        """Whether phases are shown as they go on."""
        return self._console.is_terminal and not self._console.quiet

    def begin(self, look: Callable[[], Phase]) -> None:
        """A phase has begun; `look` says from any thread how far it is.

        It takes the place of an earlier one of the same name and size: of evaluations the last one is kept.
        """
        first = look()
        name = (first.label, first.total)
        with self._display:
            with self._lock:
                self._open.append(look)
                self._phases.pop(name, None)
                self._phases[name] = look
            if self.has_bars and self._live is None:
                draw = self._picture
                live = Live(console=self._console, get_renderable=draw, transient=True, refresh_per_second=_REFRESH)
                self._live = live
                live.start()
        self.changed(now=True)

    def end(self, look: Callable[[], Phase]) -> None:
        """A phase is over; `look` keeps on saying how it ended."""
        with self._display:
            if self._live is not None and len(self._open) == 1:
                self._live.stop()
                self._live = None
            with self._lock:
                self._open.remove(look)
        self.changed(now=True)

    def changed(self, *, now: bool = False) -> None:
        """A phase has come further; with `now` the file need not wait for its second."""
        if self._writer is not None:
            self._writer.changed(now)
            if complaint := self._writer.complaint():
                self._console.print(complaint, soft_wrap=True, markup=False)

    def _picture(self) -> Group:
        with self._lock:
            phases = [look() for look in self._open]
        return Group(*(Bar(phase) for phase in phases))

    # --------------------------------------------------------------------------------------------------------- its file

    def keep_in(self, path: Path) -> None:
        """Write the phases to `path` from now on; the first time at once."""
        self._writer = _Writer(path, self._content)

    def close(self) -> None:
        """Write the file for the last time, if there is one, and let go of it."""
        if self._writer is not None:
            self._writer.close()
            self.changed()
            self._writer = None

    def _content(self) -> list[Phase]:
        with self._lock:
            return [look() for look in self._phases.values()]


class _Writer:
    """Keeps a file, in a thread. What a disk refuses is said once, and tried again with the next change."""

    def __init__(self, path: Path, phases: Callable[[], list[Phase]]) -> None:
        self._path, self._phases, self._started = path, phases, time.time()
        self._wake, self._soon, self._over = threading.Condition(), True, False
        self._changed = False
        self._complaint: str | None = None
        self._complained = False
        self._thread = threading.Thread(target=self._keep, name="progress", daemon=True)
        self._thread.start()

    def changed(self, now: bool) -> None:
        self._changed = True
        if now:
            with self._wake:
                self._soon = True
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._over = True
            self._wake.notify()
        self._thread.join(_PATIENCE_SECONDS)

    def complaint(self) -> str | None:
        """A line for the user, the first time that there is one."""
        if self._complaint is None or self._complained:
            return None
        self._complained = True
        return self._complaint

    def _keep(self) -> None:
        written = 0.0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._soon or self._over, timeout=_WRITE_SECONDS)
                over, soon, self._soon = self._over, self._soon, False
            if over or soon or self._changed or time.monotonic() - written > _HEARTBEAT_SECONDS:
                self._changed = False
                written = time.monotonic()
                self._write()
            if over:
                return

    def _write(self) -> None:
        content = {
            "host": platform.node(),
            "pid": os.getpid(),
            "started": self._started,
            "written": time.time(),
            "phases": [phase.content() for phase in self._phases()],
        }
        try:
            # Not synced: after a crash of the machine nobody needs it, and a sync disturbs what writes checkpoints.
            write_atomically(self._path, lambda path: path.write_text(json.dumps(content, indent=1)), sync=False)
        except OSError as error:
            self._complaint = (
                f"{self._path}: cannot be written ({error.strerror}); the run goes on, and `python -m open_po watch` "
                "does not see its phases"
            )
