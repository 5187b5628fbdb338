"""Where metrics go: metrics.jsonl, Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path

from open_po.config import RunConfig
from open_po.errors import UserError
from open_po.output.files import disk_faults, write_atomically
from open_po.output.metrics import STEP, Metrics, read_metrics
from open_po.output.observers import RunObserver


class JsonlTracker(RunObserver):
    """One JSON object per line; on resumption lines after the resumed step are dropped."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [record for record in read_metrics(path) if record[STEP] <= resumed_step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda temporary: temporary.write_text(lines))
        self.path = path

    def metrics_written(self, metrics: Metrics) -> None:
        with disk_faults(str(self.path), "checkpoints are kept"), open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\n")


class WandbTracker(RunObserver):
    """Weights & Biases, in the project and mode that its own environment variables say unless the run does."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        import wandb

        output = config.output
        try:
            self.run = wandb.init(
                project=output.wandb_project_name or "open_po",
                entity=output.wandb_entity,
                name=output.exp_name,
                id=run_id,
                resume="allow" if run_id else None,
                dir=folder,
                config=config.flat(),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"with_tracking: W&B cannot start ({' '.join(str(error).split())}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def metrics_written(self, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=int(metrics[STEP]))

    def training_ended(self) -> None:
        self.run.finish()
