"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from open_po.errors import Preempted
from open_po.output.metrics import STEP, Metrics
from open_po.output.samples import Sample
from open_po.output.summary import RunSummary, final_figures
from open_po.output.trackers.tracker import PROJECT, Beginning, Tracker
from open_po.output.trackers.wandb_files import last_step


class WandbTracker(Tracker):
    """Weights & Biases, in the project and mode that its own environment variables say unless the run does.

    It gets no step twice: what a killed run gave it after its checkpoint stays, and is passed over when it comes again.
    Offline each start has a folder of its own, under one id, and they go on where the one before ends.
    """

    advice = "log in with `wandb login`, or set WANDB_MODE=offline"

    def __init__(self, beginning: Beginning) -> None:
        import wandb

        output = beginning.config.output
        self._run = wandb.init(
            project=output.wandb_project_name or PROJECT,
            entity=output.wandb_entity,
            name=output.exp_name,
            id=beginning.run_id,
            resume="allow" if beginning.run_id else None,
            dir=beginning.folder,
            config=beginning.config.flat(),
        )
        self.run_id = self._run.id
        self._table = wandb.Table
        # Its process may not have had the time to keep, or send, what a killed run gave it.
        kept = last_step(beginning.folder, beginning.run_id) if beginning.run_id else -1
        self._next = self._run.step if self._run.resumed else kept + 1
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
        if isinstance(error, Preempted):
            self._run.mark_preempting()
        self._run.finish(exit_code=1)

    def completed(self, summary: RunSummary) -> None:
        self._run.summary.update(final_figures(summary))
        self._run.finish()
