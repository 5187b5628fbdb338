"""TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent
from typing import Any

from open_po.output.metrics import STEP, Metrics
from open_po.output.samples import Sample
from open_po.output.summary import RunSummary, final_figures
from open_po.output.trackers.tracker import Beginning, Tracker

_FOLDER = "tensorboard"


class TensorboardTracker(Tracker):
    """An event file for each start of the run, in `tensorboard/` of its folder.

    Each record is on disk when the next comes. Of a run that goes on, readers pass over the figures that a killed one
    wrote after its checkpoint; texts of samples they show twice.
    """

    def __init__(self, beginning: Beginning) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._config = beginning.config
        self._hparams: Any = hparams
        folder = beginning.folder / _FOLDER
        before, last = list(folder.glob("events.*")), beginning.resumed_step
        if last is None:
            for path in before:  # of a run that was killed before its first checkpoint, and begins again
                path.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=last + 1 if before and last is not None else None)
        if before and last is not None:
            self._writer.flush()
            return
        self._writer.add_text("config", _block(beginning.config.to_yaml()), 0)
        for record in beginning.history:  # of a run that did not report here before
            self.metrics_written(record)
        self._writer.flush()

    def metrics_written(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, int(metrics[STEP]))
        self._writer.flush()

    def samples_written(self, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            parts = {"prompt": sample.prompt, "answer": sample.answer, "chosen": sample.chosen}
            text = "\n\n".join(f"**{name}**\n\n{_block(part)}" for name, part in parts.items())
            self._writer.add_text(f"samples/{number}", text, sample.training_step)
        self._writer.flush()

    def stopped(self, error: BaseException) -> None:
        self._writer.close()

    def completed(self, summary: RunSummary) -> None:
        figures = final_figures(summary)
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in self._config.flat().items()
            if value is not None
        }
        writer: Any = self._writer  # whose own add_hparams makes a run of its own of them
        for part in self._hparams(settings, figures):
            writer.file_writer.add_summary(part)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, int(figures["final/steps"]))
        self._writer.close()


def _block(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return indent(text, "    ", lambda line: True)
