"""The trackers of a run, by the names that `report_to` knows."""

from __future__ import annotations

from collections.abc import Callable

from open_po.config import RunConfig
from open_po.output.metrics import read_metrics
from open_po.output.observers import RunObserver
from open_po.output.run_folder import RunFolder
from open_po.output.trackers.guarded import Guarded
from open_po.output.trackers.jsonl import JsonlTracker
from open_po.output.trackers.mlflow_tracker import MlflowTracker
from open_po.output.trackers.tensorboard_tracker import TensorboardTracker
from open_po.output.trackers.tracker import Beginning, Tracker
from open_po.output.trackers.trackio_tracker import TrackioTracker
from open_po.output.trackers.wandb_tracker import WandbTracker

_TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}


def make_trackers(
    config: RunConfig,
    folder: RunFolder,
    resumed_step: int | None,
    ids: dict[str, str],
    say: Callable[[str], object],
) -> list[RunObserver]:
    """metrics.jsonl and samples.jsonl, and what `report_to` names; `resumed_step` None: the run begins.

    `ids` are those of the run in its trackers, which a checkpoint keeps: they are read here, and added to.
    """
    made: list[RunObserver] = [JsonlTracker(folder, -1 if resumed_step is None else resumed_step)]
    history = read_metrics(folder.metrics)
    for name in config.output.report_to or ():
        beginning = Beginning(
            config=config, folder=folder.path, run_id=ids.get(name), resumed_step=resumed_step, history=history
        )
        made.append(Guarded(name, _TRACKERS[name], beginning, say, ids))
    return made
