"""What a tracker is, and what it is told when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_po.config import RunConfig
from open_po.output.metrics import Metrics
from open_po.output.observers import RunObserver

PROJECT = "open_po"  # what runs are filed under where the user says nothing else


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a tracker is told when it starts."""

    config: RunConfig
    folder: Path  # the run's; files of a tracker lie in a folder of their own in it
    run_id: str | None  # under which it goes on, if it has kept this run before
    resumed_step: int | None  # None: the run begins
    history: Sequence[Metrics]  # the run's records up to the resumed step


class Tracker(RunObserver):
    """One tracker of `report_to`. What it raises, and how long it takes, is `Guarded`'s to deal with."""

    advice = ""  # what to do if it cannot start
    run_id: str | None = None  # by which a resumed run finds it again

    def __init__(self, beginning: Beginning) -> None:
        """Starts it. Raises whatever its library does."""
