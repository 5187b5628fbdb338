"""Work with a known end: a live bar on a terminal, now and then a line elsewhere, and its part of the run's board."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal

from open_po.output.board import Board
from open_po.output.console import Output
from open_po.output.phase import BYTES, Phase, PhaseState

_PLAIN_SECONDS = 10.0  # a console that is no terminal gets one progress line per so many seconds
_SAMPLES = 60  # moments, a second or more apart, that the rate of late is taken from


class Progress:
    """Work with a known end: a live bar on a terminal, now and then a line elsewhere.

    On a command's own console (`make_console`) it is also a phase of its board. `memory` gives the most bytes held so
    far; it is called where they are shown. `unit` is a plural, or `BYTES`. The last line can be left to the caller.
    Several threads may advance it.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        memory: Callable[[], int] | None = None,
        last_line: bool = True,
    ) -> None:
        self.console, self.label, self.total, self.unit, self.done = console, label, total, unit, done
        self._board = console.board if isinstance(console, Output) else Board(console)
        self._memory, self._last_line = memory, last_line
        self._lock = threading.Lock()
        self._started_at, self._started, self._first = time.monotonic(), time.time(), done
        self._tokens = self._elsewhere = 0
        self._note = ""
        self._said = self._moved = self._started_at
        self._state, self._ended_at = PhaseState.RUNNING, 0.0
        self._samples: deque[tuple[float, int, int]] = deque([(self._started_at, 0, 0)], maxlen=_SAMPLES)

    def __enter__(self) -> Progress:
        self._board.begin(self.phase)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state, self._ended_at = PhaseState.DONE if kind is None else PhaseState.STOPPED, time.monotonic()
        self._board.end(self.phase)
        if kind is None and self._last_line:
            self._print(self._summary())

    def advance(self, count: int, *, tokens: int = 0, note: str = "") -> None:
        """`count` more units are done, with so many tokens; the last `note` stands beside the rates."""
        now = time.monotonic()
        with self._lock:
            self.done += count
            self._tokens += tokens
            self._note = note or self._note
            self._moved = now
            if now - self._samples[-1][0] >= 1.0:
                self._samples.append((now, self._own, self._tokens))
        self._board.changed()
        if not self._board.has_bars and now - self._said > _PLAIN_SECONDS and self.done < self.total:
            self._said = now
            self._print(self.phase().line())

    def done_elsewhere(self, count: int) -> None:
        """`count` more units are done, by others: they are in no rate, and not in the last line."""
        with self._lock:
            self._first += count
            self._elsewhere += count
        self.advance(count)

    def phase(self) -> Phase:
        """How far it is."""
        with self._lock:
            per_second, tokens_per_second = self._rates()
            return Phase(
                label=self.label,
                state=self._state,
                done=self.done,
                total=self.total,
                unit=self.unit,
                per_second=per_second,
                tokens_per_second=tokens_per_second,
                note=self._note,
                memory_bytes=0 if self._memory is None else self._memory(),
                started=self._started,
                updated=self._started + self._moved - self._started_at,
            )

    @property
    def _own(self) -> int:
        """Units done here since the start."""
        return self.done - self._first

    def _rates(self) -> tuple[float, float]:
        """Units and tokens a second: of late while it goes on, over all of it when it is over."""
        if self._state != PhaseState.RUNNING:
            seconds = max(1e-9, self._ended_at - self._started_at)
            return self._own / seconds, self._tokens / seconds
        at, done, tokens = self._samples[0]
        seconds = max(1e-9, self._moved - at)
        return (self._own - done) / seconds, (self._tokens - tokens) / seconds

    def _summary(self) -> str:
        own = decimal(self._own) if self.unit == BYTES else f"{self._own:,} {self.unit}"
        others = f" (the other {self._elsewhere:,} by other processes)" if self._elsewhere else ""
        rates = ", ".join(["", *self.phase().rates()])
        return f"{self.label}: {own}{others} in {self._ended_at - self._started_at:.1f} s{rates}"

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)
