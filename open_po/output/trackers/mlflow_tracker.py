"""MLflow."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_po import __version__
from open_po.errors import Preempted
from open_po.output.metrics import STEP, Metrics
from open_po.output.samples import Sample
from open_po.output.summary import RunSummary, final_figures
from open_po.output.trackers.tracker import PROJECT, Beginning, Tracker

_FOLDER = "mlruns"
_BATCH = 100  # parameters of one request
_LONGEST = 6000  # characters of a parameter
_FIRST_REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


class MlflowTracker(Tracker):
    """MLflow, where MLFLOW_TRACKING_URI says, else in files in `mlruns/` of the run's folder.

    A run that goes on asks once which points are there: what a killed run sent after its checkpoint is not sent twice,
    and what it could not send is.
    """

    advice = "see MLFLOW_TRACKING_URI; without it files are written"

    def __init__(self, beginning: Beginning) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 prefers SQL, mlflow-skinny has none
            folder = (beginning.folder / _FOLDER).resolve()
            _remove_empty(folder)
            uri = folder.as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._there: set[tuple[str, int]] = set()
        with _impatient():
            found = self._known(beginning.run_id)
            experiment = self._experiment() if found is None else ""
        self._id = self.run_id = found.info.run_id if found is not None else self._new_run(experiment, beginning, Param)
        if found is not None:
            self._client.update_run(self._id, status="RUNNING")
            for name in found.data.metrics:
                self._there |= {(name, point.step) for point in self._client.get_metric_history(self._id, name)}
        for record in beginning.history:
            self.metrics_written(record)

    def _known(self, run_id: str | None) -> Any:
        """The run that goes on; None if there is none here, as where a checkpoint came from another store."""
        from mlflow.exceptions import MlflowException

        try:
            return None if run_id is None else self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _new_run(self, experiment: str, beginning: Beginning, param: Any) -> str:
        config = beginning.config
        tags = {"open_po": __version__, "loss_type": " + ".join(config.loss.names)}
        run = self._client.create_run(experiment, run_name=config.output.exp_name, tags=tags)
        params = [param(key, str(value)[:_LONGEST]) for key, value in config.flat().items() if value is not None]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(run.info.run_id, params=params[start : start + _BATCH])
        return str(run.info.run_id)

    def metrics_written(self, metrics: Metrics) -> None:
        self._log(metrics, int(metrics[STEP]))

    def _log(self, metrics: Metrics, step: int) -> None:
        now = int(time.time() * 1000)
        points = {_name(name): value for name, value in metrics.items()}
        new = [
            self._metric(name, value, now, step) for name, value in points.items() if (name, step) not in self._there
        ]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def samples_written(self, samples: Sequence[Sample]) -> None:
        step = samples[0].training_step
        text = json.dumps([asdict(sample) for sample in samples], indent=2)
        self._client.log_text(self._id, text, f"samples/step_{step:06d}.json")

    def stopped(self, error: BaseException) -> None:
        killed = isinstance(error, KeyboardInterrupt)
        self._client.set_tag(self._id, "error", "preempted" if isinstance(error, Preempted) else str(error)[:500])
        self._client.set_terminated(self._id, "KILLED" if killed else "FAILED")

    def completed(self, summary: RunSummary) -> None:
        figures = final_figures(summary)
        self._log(figures, int(figures["final/steps"]))
        for name, version in summary.result.versions.items() if summary.result is not None else ():
            self._client.set_tag(self._id, f"version.{name}", version)
        self._client.set_terminated(self._id)


def _remove_empty(folder: Path) -> None:
    """Remove the metrics of which a killed run had written nothing yet: MLflow then reads none of the store's runs."""
    for path in folder.glob("*/*/metrics/**/*"):
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()


@contextmanager
def _impatient() -> Iterator[None]:
    """A first request that is told soon if nobody answers, where MLflow by itself tries for some minutes.

    Later ones may take these: a server that is restarted meanwhile misses nothing.
    """
    mine = {name: value for name, value in _FIRST_REQUEST.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


def _name(name: str) -> str:
    """A metric's name in MLflow: a part of a mix is `loss.NAME`. In a store of files `loss` cannot be a folder too."""
    return re.sub(r"(^|/)loss/", r"\1loss.", name)
