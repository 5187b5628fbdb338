"""When a run is to stop before its end: a scheduler's signal, or the time that it was given."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from open_po.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm and spot machines send these ahead of SIGKILL
_HOUR = 3600.0


class StopRequest:
    """What asks this process to stop, if anything does.

    The first signal raises `Preempted`, or inside `deferred` is only noted. The second ends the process at once,
    unless both come while it waits in a collective: Python hears of neither before that is over.
    """

    def __init__(self, max_hours: float | None) -> None:
        self._until = None if max_hours is None else time.monotonic() + _HOUR * max_hours
        self._signal: str | None = None
        self._deferred = False

    def listen(self) -> None:
        """Take the signals of this process from now on."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self._signal = signal.Signals(number).name
        if not self._deferred:
            raise Preempted(f"{self._signal}; what is on disk is kept, and the same command goes on from there")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts a signal only sets `reason`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if self._signal is None and self._until is not None and time.monotonic() >= self._until:
            return "max_run_time"
        return self._signal
