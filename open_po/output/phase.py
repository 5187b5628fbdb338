"""A phase of a run, as bars, lines and other processes see it: tokenising, reference, training, evaluation, upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from enum import StrEnum
from typing import Any

from rich.filesize import decimal

BYTES = "bytes"  # the unit that is shown as kB, MB, GB


class PhaseState(StrEnum):
    """Whether a phase goes on."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"  # by an error, or by a request to stop


@dataclass(frozen=True, kw_only=True)
class Phase:
    """How far a phase has come. Times are seconds since the epoch."""

    label: str
    state: PhaseState
    done: int
    total: int
    unit: str
    per_second: float  # units, lately; over the whole phase once it is over
    tokens_per_second: float  # 0: it counts none
    note: str  # its newest figures
    memory_bytes: int  # the most held so far; 0: not measured
    started: float
    updated: float  # when it last came further

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else float(self.state == PhaseState.DONE)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rate of late; None if there is no rate yet, or nothing left."""
        left = self.total - self.done
        return left / self.per_second if left > 0 and self.per_second > 0 else None

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    @staticmethod
    def of(content: Mapping[str, Any]) -> Phase:
        """From its `content`. Raises TypeError, KeyError or ValueError if that is none."""
        own = {field.name: content[field.name] for field in fields(Phase)}
        return Phase(**(own | {"state": PhaseState(own["state"])}))

    # --------------------------------------------------------------------------------------------------------- in words

    def amount(self) -> str:
        """How much of how much."""
        if self.unit == BYTES:
            return f"{decimal(self.done)} of {decimal(self.total)}"
        return f"{self.done:,}/{self.total:,} {self.unit}"

    def rates(self) -> list[str]:
        """Units and tokens a second, as far as it has them."""
        found = [speed(self.per_second, self.unit)] if self.per_second > 0 else []
        return found + ([f"{self.tokens_per_second:,.0f} tokens/s"] if self.tokens_per_second else [])

    def figures(self) -> list[str]:
        """Its rates, its note and its memory, as far as it has them."""
        note = [self.note] if self.note else []
        return self.rates() + note + ([memory(self.memory_bytes)] if self.memory_bytes else [])

    def left(self) -> str:
        """The time that it still takes; empty if that is not known."""
        return "" if self.seconds_left is None else f"{duration(self.seconds_left)} left"

    def line(self) -> str:
        """All of it in a line."""
        parts = [f"{self.label}: {self.amount()}", *self.figures()]
        if self.state == PhaseState.DONE:
            parts[0] += f" in {duration(self.updated - self.started)}"
        elif self.state == PhaseState.STOPPED:
            parts[0] += ", stopped"
        elif self.left():
            parts.append(self.left())
        return ", ".join(parts)


def speed(per_second: float, unit: str) -> str:
    """A rate."""
    if unit == BYTES:
        return f"{decimal(int(per_second))}/s"
    return f"{per_second:,.1f} {unit}/s" if per_second >= 1 else f"{per_second:.2g} {unit}/s"


def memory(size: int) -> str:
    """An amount of memory."""
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds, or hours, minutes and seconds."""
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))
