"""How trackers and the Hub learn of a run: the run tells its observers, and knows nothing else of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from open_po.output.metrics import Metrics
from open_po.output.samples import Sample
from open_po.output.summary import RunSummary


class RunObserver:
    """What is told of a run on rank 0; an observer overrides what concerns it. Errors that it raises end the run."""

    def metrics_written(self, metrics: Metrics) -> None:
        """One set of figures, `training_step` among them."""

    def samples_written(self, samples: Sequence[Sample]) -> None:
        """Answers to held-out prompts, all of one step."""

    def checkpoint_written(self, checkpoint: Path) -> None:
        """A checkpoint, whole and on disk."""

    def needs(self, checkpoint: Path) -> bool:
        """Whether a checkpoint that is old enough to be removed must stay a little longer."""
        return False

    def training_ended(self) -> None:
        """The last step is done: no more metrics or checkpoints will come. The model is not saved yet."""

    def stopped(self, error: BaseException) -> None:
        """The run ends before its time, and `completed` will not be called."""

    def completed(self, summary: RunSummary) -> None:
        """The run is over: its model and its summary are written."""


class Observers(RunObserver):
    """Several observers, told in turn; none on ranks other than 0."""

    def __init__(self, observers: Sequence[RunObserver] = ()) -> None:
        self._observers = tuple(observers)

    def metrics_written(self, metrics: Metrics) -> None:
        for observer in self._observers:
            observer.metrics_written(dict(metrics))

    def samples_written(self, samples: Sequence[Sample]) -> None:
        for observer in self._observers:
            observer.samples_written(samples)

    def checkpoint_written(self, checkpoint: Path) -> None:
        for observer in self._observers:
            observer.checkpoint_written(checkpoint)

    def needs(self, checkpoint: Path) -> bool:
        return any(observer.needs(checkpoint) for observer in self._observers)

    def training_ended(self) -> None:
        for observer in self._observers:
            observer.training_ended()

    def stopped(self, error: BaseException) -> None:
        for observer in self._observers:
            observer.stopped(error)

    def completed(self, summary: RunSummary) -> None:
        for observer in self._observers:
            observer.completed(summary)
