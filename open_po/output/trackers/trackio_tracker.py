"""Trackio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

from open_po.output.metrics import STEP, Metrics
from open_po.output.samples import Sample
from open_po.output.summary import RunSummary, final_figures
from open_po.output.trackers.tracker import PROJECT, Beginning, Tracker

_FOLDER = "trackio"
_ELSEWHERE = ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioTracker(Tracker):
    """Trackio, where its environment variables say, else in a database in `trackio/` of the run's folder.

    A run goes on under its name. Steps that are there already are not sent again.
    """

    def __init__(self, beginning: Beginning) -> None:
        if not any(name in os.environ for name in _ELSEWHERE):
            os.environ["TRACKIO_DIR"] = str((beginning.folder / _FOLDER).resolve())  # read when it is imported
        import trackio

        self._table = trackio.Table
        self._run = trackio.init(
            project=PROJECT,
            name=beginning.run_id or beginning.config.output.exp_name,
            resume="allow" if beginning.run_id else "never",
            config=beginning.config.flat(),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.run_id = self._run.name
        self._next: int = self._run._next_step  # one after the last that is there; it has no other name
        for record in beginning.history:
            self.metrics_written(record)

    def metrics_written(self, metrics: Metrics) -> None:
        if metrics[STEP] >= self._next:
            self._run.log(dict(metrics), step=int(metrics[STEP]))

    def samples_written(self, samples: Sequence[Sample]) -> None:
        step = samples[0].training_step
        if step >= self._next:
            rows = [list(asdict(sample).values()) for sample in samples]
            self._run.log({"samples": self._table(columns=list(asdict(samples[0])), data=rows)}, step=step)

    def stopped(self, error: BaseException) -> None:
        self._run.finish()

    def completed(self, summary: RunSummary) -> None:
        figures = final_figures(summary)
        self._run.log(figures, step=int(figures["final/steps"]))
        self._run.finish()
