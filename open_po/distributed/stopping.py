"""When a run is to stop before its end: a scheduler's signal, or the time that it was given."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from open_po.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm and spot machines send these ahead of SIGKILL
_HOUR = 3600.0


class StopRequest:
    """What asks this process to stop, if anything does.

    The first signal raises `Preempted`, or inside `deferred` is only noted. The second ends the process at once.
    """

    def __init__(self, max_hours: float | None) -> None:
        self._until = None if max_hours is None else time.monotonic() + _HOUR * max_hours
        self._signal: str | None = None
        self._deferred = False

    def listen(self) -> None:
        """Take the signals of this process from now on."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        _watch_for_second()

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


# While the main thread waits in a collective, Python runs no handler: neither the first signal's, which would give the
# second its default effect, nor the second's. What Python's own handler in C writes to this pipe is read all the same.
_pipe = -1


def _watch_for_second() -> None:
    """Have a thread end this process when a second signal comes, whatever the main thread does."""
    global _pipe
    _forget_pipe()
    ours, _pipe = os.pipe()
    os.set_blocking(_pipe, False)
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(ours,), daemon=True).start()


def _end_at_second(pipe: int) -> None:
    came = False
    while number := os.read(pipe, 1):
        if number[0] in _SIGNALS:
            if came:
                os._exit(128 + number[0])
            came = True
    os.close(pipe)


def _forget_pipe() -> None:
    global _pipe
    if _pipe != -1:
        signal.set_wakeup_fd(-1)
        os.close(_pipe)
        _pipe = -1


def _leave_to_parent() -> None:
    """In a process that this one has forked, for tokenisation for example: its signals are not the run's."""
    if _pipe != -1:
        _forget_pipe()
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)
