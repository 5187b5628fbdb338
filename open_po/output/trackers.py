"""Where metrics go: metrics.jsonl, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from open_po.config import RunConfig
from open_po.errors import UserError
from open_po.output.files import disk_faults, write_atomically
from open_po.output.metrics import Metrics, read_metrics


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Metrics) -> None:
        """Record one set of metrics, `training_step` among them."""

    def close(self) -> None:
        """No more metrics will come."""


class JsonlTracker:
    """One JSON object per line; on resumption lines after the resumed step are dropped."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["training_step"] <= resumed_step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda temporary: temporary.write_text(lines))
        self.path = path

    def log(self, metrics: Metrics) -> None:
        with disk_faults(str(self.path), "checkpoints are kept"), open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def close(self) -> None:
        pass


class WandbTracker:
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

    def log(self, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=int(metrics["training_step"]))

    def close(self) -> None:
        self.run.finish()


class Trackers:
    """All trackers of the main rank; on other ranks there are none."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, metrics: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(dict(metrics))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
