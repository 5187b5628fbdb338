"""A tracker at arm's length: it cannot stop training, and cannot hold it up for long."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Event, Thread

from open_po.output.metrics import Metrics
from open_po.output.observers import RunObserver
from open_po.output.samples import Sample
from open_po.output.summary import RunSummary
from open_po.output.trackers.tracker import Beginning, Tracker

_START_SECONDS = 15.0  # that a run waits for a tracker to start; one that takes longer starts while training goes on
_END_SECONDS = 60.0  # that a complete run waits for a tracker to take what is left
_STOP_SECONDS = 10.0  # the same for one that fails or is interrupted: a scheduler may give it 30 s


class Guarded(RunObserver):
    """A tracker on a thread of its own, which is told everything in order.

    What it raises, at its start or later, is told in one line, once. `ids` gets its run's id as soon as there is one.
    """

    def __init__(
        self, name: str, kind: type[Tracker], beginning: Beginning, say: Callable[[str], object], ids: dict[str, str]
    ) -> None:
        self._name, self._kind, self._beginning, self._say, self._ids = name, kind, beginning, say, ids
        self._run_id: str | None = None
        self._told = False
        self._events: SimpleQueue[Callable[[Tracker], object] | None] = SimpleQueue()
        started = Event()
        self._thread = Thread(target=self._work, args=(started,), name=f"tracker {name}", daemon=True)
        self._thread.start()
        started.wait(_START_SECONDS)
        self._note_id()

    def metrics_written(self, metrics: Metrics) -> None:
        self._put(lambda tracker: tracker.metrics_written(metrics))

    def samples_written(self, samples: Sequence[Sample]) -> None:
        self._put(lambda tracker: tracker.samples_written(samples))

    def stopped(self, error: BaseException) -> None:
        self._end(lambda tracker: tracker.stopped(error), _STOP_SECONDS)

    def completed(self, summary: RunSummary) -> None:
        self._end(lambda tracker: tracker.completed(summary), _END_SECONDS)

    def _put(self, event: Callable[[Tracker], object] | None) -> None:
        self._note_id()
        if self._thread.is_alive():
            self._events.put(event)

    def _end(self, event: Callable[[Tracker], object], seconds: float) -> None:
        self._put(event)
        self._put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell(f"has not taken everything within {seconds:.0f} s; metrics.jsonl has what it lacks")

    def _note_id(self) -> None:
        if self._run_id is not None:  # on the run's thread, which writes checkpoints
            self._ids[self._name] = self._run_id

    def _work(self, started: Event) -> None:
        # All exceptions: Ctrl-C and signals reach the main thread, and what else ends a process is not a tracker's.
        try:
            tracker = self._kind(self._beginning)
            self._run_id = tracker.run_id
        except BaseException as error:
            advice = f"; {self._kind.advice}" if self._kind.advice else ""
            self._tell(f"cannot start ({_reason(error)}){advice}; training goes on without it")
            return
        finally:
            started.set()
        while (event := self._events.get()) is not None:
            try:
                event(tracker)
            except BaseException as error:
                self._tell(f"failed ({_reason(error)}); training goes on, metrics.jsonl has what it lacks")

    def _tell(self, line: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"report_to: {self._name} {line}")


def _reason(error: BaseException) -> str:
    """What an error says, in one line, without the password of an address."""
    return re.sub(r"://[^/@\s]+@", "://***@", " ".join(str(error).split())) or type(error).__name__
