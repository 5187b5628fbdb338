"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from open_po.errors import Preempted
from open_po.output.metrics import STEP, Metrics
from open_po.output.samples import Sample
from open_po.output.summary import RunSummary, final_figures
from open_po.output.trackers.tracker import PROJECT, Beginning, Tracker


class WandbTracker(Tracker):
    """Weights & Biases, in the project and mode that its own environment variables say unless the run does.

    It takes no step twice: what a killed run sent after its checkpoint stays, and is passed over when it comes again.
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
        # What a killed run had not sent yet. Offline nothing is known of what was sent: each start has its own file.
        self._next = self._run.step if self._run.resumed else 0
        if self._run.resumed:
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
