"""Work with a known end: a live bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

_WIDE = 110  # columns of a terminal that has room for a bar beside the figures
_PLAIN_SECONDS = 10.0  # a console that is no terminal gets one progress line per so many seconds


class Progress:
    """Work with a known end: a live bar on a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console, label: str, *, total: int, unit: str, done: int = 0) -> None:
        self.console, self.label, self.total, self.unit, self.done = console, label, total, unit, done
        self._started_at, self._first = time.monotonic(), done
        self._tokens = self._elsewhere = 0
        self._note = ""
        self._said = time.monotonic()
        self._live = None
        if console.is_terminal and not console.quiet:
            self._live = RichProgress(
                TextColumn("{task.description}"),
                *([BarColumn(bar_width=16)] if console.width >= _WIDE else []),
                TextColumn("{task.completed:,}/{task.total:,} " + unit),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),
                console=console,
                transient=True,
                expand=True,  # a narrow terminal cuts the note, not the time left
            )

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
            self._task = self._live.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if kind is None:
            others = f" (the other {self._elsewhere:,} by other processes)" if self._elsewhere else ""
            mine = f"{self.done - self._first:,} {self.unit}{others}"
            self._print(f"{self.label}: {mine} in {self._elapsed():.1f} s{self._rates()}")

    def advance(self, count: int, *, tokens: int = 0, note: str = "") -> None:
        """`count` more units are done, with so many tokens; the last `note` stands in place of the rates."""
        self.done += count
        self._tokens += tokens
        self._note = note or self._note
        note = self._note or self._rates().removeprefix(", ")
        if self._live is not None:
            self._live.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._said > _PLAIN_SECONDS and self.done < self.total:
            self._said = time.monotonic()
            remaining = self._elapsed() * (self.total - self.done) / max(1, self.done - self._first)
            line = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {note}, {remaining:.0f} s left"
            self._print(line)

    def done_elsewhere(self, count: int) -> None:
        """`count` more units are done, by others: they are in no rate, and not in the last line."""
        self._first += count
        self._elsewhere += count
        self.advance(count)

    def _elapsed(self) -> float:
        return max(1e-9, time.monotonic() - self._started_at)

    def _rates(self) -> str:
        if not self._tokens:
            return ""
        elapsed = self._elapsed()
        return f", {(self.done - self._first) / elapsed:,.1f} {self.unit}/s, {self._tokens / elapsed:,.0f} tokens/s"

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)
