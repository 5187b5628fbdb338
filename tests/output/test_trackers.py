"""Trackers: what arrives, what a resumed run does to it, and that none of them can stop a run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from open_po.config import load_config
from open_po.output.summary import RunSummary, Status
from open_po.output.trackers import guarded, make
from open_po.output.trackers.tracker import Beginning, Tracker
from open_po.output.trackers.wandb_files import last_step
from open_po.output.trackers.wandb_tracker import WandbTracker
from open_po.training.checkpoint import SavedState
from open_po.training.trainer import Trainer
from tests import cli
from tests.output.test_tracking import wandb_history, wandb_records, whole_records

Points = dict[str, list[tuple[int, float]]]  # by metric: step and value
RUN = {"checkpointing_steps": 2, "eval_steps": 3, "sample_during_eval": 2, "sample_max_new_tokens": 6}


def written(output: Path) -> Points:
    """What metrics.jsonl says."""
    points: Points = {}
    for line in cli.metrics(output):
        for name, value in line.items():
            points.setdefault(name, []).append((int(line["training_step"]), value))
    return points


def in_tensorboard(output: Path) -> tuple[Points, EventAccumulator]:
    """By TensorBoard's own reader."""
    reader = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    scalars = {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
    return scalars, reader


@pytest.fixture(autouse=True)
def mlflow_reads_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tracker that writes them asks for."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def in_mlflow(output: Path) -> tuple[Points, MlflowClient, Any]:
    """By MLflow's own client, of the one run in the store."""
    client = MlflowClient(tracking_uri=(output / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("open_po")
    (run,) = client.search_runs([experiment.experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: sorted((p.step, p.value) for p in points) for name, points in history.items()}, client, run


def approximately(points: Points) -> Any:
    """TensorBoard keeps float32."""
    return {name: [(step, pytest.approx(value, rel=1e-6)) for step, value in found] for name, found in points.items()}


def without_perf(points: Points) -> Points:
    """Without figures that a repetition does not repeat, and those of the end."""
    return {name: found for name, found in points.items() if not name.startswith(("perf/", "final/"))}


def expected_names(points: Points) -> Points:
    """`points` under the names that MLflow has for them."""
    return {name.replace("loss/", "loss."): sorted(found) for name, found in points.items()}


# ------------------------------------------------------------------------------------------------------- what arrives


def documented() -> set[str]:
    """The metrics that the README names."""
    text = (cli.REPOSITORY / "README.md").read_text()
    (paragraph,) = re.findall(r"^Metrics: (.*?)with `eval_mixer_list`", text, re.S | re.M)
    return set(re.findall(r"`([\w/]+)`", paragraph))


def test_all_of_them_have_every_figure_at_once(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = cli.train(
        llama,
        pairs_file,
        tmp_path / "run",
        report_to=["wandb", "tensorboard", "mlflow"],
        exp_name="a name",
        eval_mixer_list=[pairs_file, "3"],
        loss_type=["dpo", "sft"],
        **RUN,
    )
    expected = written(output)
    assert documented() - set(expected) == set()
    assert {"eval/loss", "eval/loss/dpo", "eval/loss/sft"} <= set(expected)

    scalars, board = in_tensorboard(output)
    assert {name: found for name, found in scalars.items() if "final/" not in name} == approximately(expected)
    points, client, run = in_mlflow(output)
    assert {name: found for name, found in points.items() if "final/" not in name} == expected_names(expected)
    rows: dict[int, dict[str, Any]] = {}
    records = wandb_records(output)
    for row in wandb_history(records):
        rows.setdefault(int(row["_step"]), {}).update(row)
    history: Points = {}
    for step, row in sorted(rows.items()):
        for name in set(row) & set(expected):
            history.setdefault(name, []).append((step, row[name]))
    expected["training_step"] = sorted(set(expected["training_step"]))  # a row holds training and evaluation
    assert history == expected

    # The end: the figures of run_summary.json.
    summary = cli.summary(output)
    final = {
        "final/steps": 6,
        "final/pairs_per_second": summary["train"]["pairs"] / summary["train"]["seconds"],
        "final/train_seconds": summary["train"]["seconds"],
        "final/peak_memory_gb": summary["peak_memory_bytes"] / 1e9,
        "final/eval/rewards/accuracy": summary["eval"]["rewards/accuracy"],
    }
    sent = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            sent |= {".".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.summary.update}
    for name, value in final.items():
        assert points[name] == [(6, value)]
        assert scalars[name] == [(6, pytest.approx(value))]
        assert sent[name] == value
    assert run.info.status == "FINISHED"
    assert (run.info.run_name, run.data.params["learning_rate"]) == ("a name", "0.002")

    # Samples, everywhere those of samples.jsonl.
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [sample["training_step"] for sample in samples] == [0, 0, 3, 3, 6, 6]
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("samples/0/text_summary")]
    assert ["    " + sample["prompt"] in text for sample, text in zip(samples[::2], texts, strict=True)] == [True] * 3
    names = [item.path for item in client.list_artifacts(run.info.run_id, "samples")]
    stored = [json.loads(Path(client.download_artifacts(run.info.run_id, name)).read_text()) for name in names]
    assert [*chain.from_iterable(stored)] == samples
    tables = sorted(
        output.glob("wandb/offline-run-*/files/media/table/*.json"), key=lambda p: int(p.name.split("_")[1])
    )
    rows_of_tables = chain.from_iterable(json.loads(path.read_text())["data"] for path in tables)
    assert [*rows_of_tables] == [list(sample.values()) for sample in samples]


# ------------------------------------------------------------------------------------------------------ after a SIGKILL


def kill_at(step: int) -> Any:
    """For `cli.forked`: SIGKILL before the step after `step`, whose figures are written."""

    def prepare() -> None:
        train = Trainer.train_step

        def trap(self: Trainer) -> Any:
            if self.state.progress.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return train(self)

        Trainer.train_step = trap  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    ("killed_at", "ids"),
    [pytest.param(5, 1, id="after_a_checkpoint"), pytest.param(1, 2, id="before_any", marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_without_a_gap_or_a_repeat(
    killed_at: int, ids: int, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """It wrote on after its checkpoint: of step 4, or none."""
    fields = RUN | {"report_to": ["tensorboard", "mlflow"], "eval_mixer_list": [pairs_file, "3"]}
    output = tmp_path / "run"
    words = cli.arguments(llama, pairs_file, output, resume_from_checkpoint="auto", **fields)
    assert cli.forked(words, kill_at(killed_at)) == -signal.SIGKILL
    (metrics,) = (output / "mlruns").glob("*/*/metrics")
    (metrics / "eval" / "begun").touch()  # as where it was killed between opening a file and writing to it
    assert cli.forked(words) == 0
    expected = written(output)
    assert expected["train_loss"][-1][0] == len(expected["train_loss"]) == 6
    scalars, board = in_tensorboard(output)
    assert without_perf(scalars) == approximately(without_perf(expected))
    assert [event.step for event in board.Tensors("samples/0/text_summary")] == [0, 3, 6]
    client = MlflowClient(tracking_uri=(output / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("open_po")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    assert len(runs) == ids, "without a checkpoint it is another run"
    names = runs[0].data.metrics
    points = {name: [(p.step, p.value) for p in client.get_metric_history(runs[0].info.run_id, name)] for name in names}
    assert without_perf(points) == without_perf(expected)
    assert runs[0].info.status == "FINISHED"
    state = json.loads((output / "checkpoints" / "step_000006" / "trainer_state.json").read_text())
    assert state["progress"]["tracker_ids"] == {"mlflow": runs[0].info.run_id}


def test_the_last_step_of_wandbs_files(tmp_path: Path) -> None:
    """More than one of a log's blocks of them, and cut where a killed process was writing."""
    with wandb.init(dir=tmp_path, mode="offline", id="abc") as run:
        for step in range(900):
            run.log({"some_loss": step / 7, "some_other_figure": step}, step=step)
    (path,) = tmp_path.glob("wandb/offline-run-*-abc/*.wandb")
    wandb_records(tmp_path)  # waits for W&B's own process
    assert len(path.read_bytes()) > 2 * 32768
    assert last_step(tmp_path, "abc") == 899
    path.write_bytes(path.read_bytes()[:40000])
    rows = list(wandb_history(whole_records(path.read_bytes())))
    assert last_step(tmp_path, "abc") == rows[-1]["_step"] < 899
    assert last_step(tmp_path, "other") == -1


@pytest.mark.slow  # and of W&B's own process, which a busy machine keeps from its work
def test_wandb_offline_has_each_step_once_after_a_kill(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """In processes of their own, as its library keeps a process of its own for each."""
    fields = {"report_to": "wandb", "checkpointing_steps": 2, "resume_from_checkpoint": "auto"}
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **fields)
    trap = "from tests.output.test_trackers import kill_at; kill_at(5)()"
    for code, prepare in ((-signal.SIGKILL, trap), (0, "pass")):
        script = f"{prepare}; from open_po.commands.train import main; raise SystemExit(main({words!r}))"
        exit_code, _, stderr = cli.finished(cli.start([sys.executable, "-c", script]), timeout=120)
        assert exit_code == code, stderr
    paths = sorted((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert (len(paths), len({path.name for path in paths})) == (2, 1), "of one id"
    deadline = time.monotonic() + 30
    while last_step(tmp_path / "run", paths[0].stem.removeprefix("run-")) < 6:  # W&B's own process is at it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = [row for path in paths for row in wandb_history(whole_records(path.read_bytes()))]
    rows = [row for row in found if "train_loss" in row]
    expected = written(tmp_path / "run")["train_loss"]
    assert [(int(row["_step"]), row["train_loss"]) for row in rows] == expected


@pytest.mark.slow
def test_a_tracker_that_is_asked_for_later_gets_what_was_before(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", checkpointing_steps=2, resume_from_checkpoint="auto")
    assert cli.forked(words, kill_at(5)) == -signal.SIGKILL
    assert cli.main([*words, "--report_to", "tensorboard", "mlflow"]) == 0
    expected = written(tmp_path / "run")
    assert without_perf(in_tensorboard(tmp_path / "run")[0]) == approximately(without_perf(expected))
    assert without_perf(in_mlflow(tmp_path / "run")[0]) == without_perf(expected)


def test_wandb_online_gets_what_a_killed_run_had_not_sent(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library stood in for: what its server has, only that can say."""

    sent: list[int] = []

    class Run:
        id, resumed, step = "abc", True, 4  # 4: the first that is not there

        def log(self, metrics: dict[str, float], step: int) -> None:
            sent.append(step)

    monkeypatch.setattr(wandb, "init", lambda **settings: Run() if settings["id"] == "abc" else None)
    config = load_config(cli.arguments(llama, tmp_path / "data", tmp_path / "run"))
    history = [{"training_step": float(step)} for step in range(7)]
    beginning = Beginning(config=config, folder=tmp_path, run_id="abc", resumed_step=6, history=history)
    tracker = WandbTracker(beginning)
    for step in (3, 7):
        tracker.metrics_written({"training_step": float(step)})
    assert sent == [4, 5, 6, 7]


def test_a_checkpoint_of_before_has_its_wandb_run(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = cli.train(llama, pairs_file, tmp_path / "run", checkpointing_steps=6)
    path = output / "checkpoints" / "step_000006" / "trainer_state.json"
    state = json.loads(path.read_text())
    for found in (None, "abc"):
        state["progress"].pop("tracker_ids", None)
        path.write_text(json.dumps(state | {"progress": state["progress"] | {"wandb_run_id": found}}))
        assert SavedState.read(path.parent).progress.tracker_ids == ({"wandb": found} if found else {})


# ------------------------------------------------------------------------------------------------------ what can fail


class Faulty(Tracker):
    """Raises, or waits, where it is told to."""

    fault: str
    calls: list[str]
    forever = threading.Event()

    def __init__(self, beginning: Beginning) -> None:
        type(self).calls = []
        self._at("start")

    def _at(self, place: str) -> None:
        self.calls.append(place)
        if self.fault == f"raises at {place}":
            raise SystemExit(f"cannot reach\nhttps://me:secret@host at {place}")
        if self.fault == f"waits at {place}":
            self.forever.wait(60)

    def metrics_written(self, metrics: Any) -> None:
        self._at("metrics")

    def completed(self, summary: Any) -> None:
        self._at("end")

    def stopped(self, error: BaseException) -> None:
        self._at(f"stop by {type(error).__name__}")


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Faulty]]:
    monkeypatch.setitem(make._TRACKERS, "mlflow", Faulty)
    for name in ("_START_SECONDS", "_END_SECONDS", "_STOP_SECONDS"):
        monkeypatch.setattr(guarded, name, 0.2)
    Faulty.forever = threading.Event()
    yield Faulty
    Faulty.forever.set()


def told(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("report_to: ")]


LATE = "has not taken everything within 0 s; metrics.jsonl has what it lacks"
FAULTS = {
    "raises at start": ("cannot start (cannot reach https://***@host at start); training goes on without it", 1),
    "raises at metrics": ("failed (cannot reach https://***@host at metrics); training goes on, ", 4),
    "raises at end": ("failed (cannot reach https://***@host at end); training goes on, ", 4),
    "waits at start": (LATE, 1),
    "waits at metrics": (LATE, 2),
    "waits at end": (LATE, 4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_fails_is_told_once_and_told_on(fault: str, faulty: type[Faulty], llama: Path, tmp_path: Path) -> None:
    """Not so after an error at its start."""
    faulty.fault = fault
    config = load_config(cli.arguments(llama, tmp_path / "data", tmp_path / "run"))
    beginning = Beginning(config=config, folder=tmp_path, run_id=None, resumed_step=None, history=[])
    lines: list[str] = []
    observer = guarded.Guarded("mlflow", faulty, beginning, lines.append, {})
    began = time.monotonic()
    for step in (1.0, 2.0):
        observer.metrics_written({"training_step": step})
    assert time.monotonic() - began < 0.1, "training waits for none of it"
    observer.completed(RunSummary(status=Status.COMPLETED))
    line, calls = FAULTS[fault]
    (said,) = lines
    assert said.startswith(f"report_to: mlflow {line}")
    assert len(faulty.calls) == calls


@pytest.mark.parametrize("fault", ["raises at start", "waits at metrics"])
def test_the_run_of_one_that_fails_is_completed(
    fault: str,
    faulty: type[Faulty],
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty.fault = fault
    output = cli.train(llama, pairs_file, tmp_path / "run", report_to="mlflow", max_train_steps=2)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("report_to: ")]) == 1
    assert cli.summary(output)["status"] == "completed"
    assert len(cli.steps(output)) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_run_that_stops_tells_them(
    error: type[BaseException],
    faulty: type[Faulty],
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    faulty.fault = "none"
    monkeypatch.setattr(Trainer, "_save", lambda self, wait: fail())
    words = cli.arguments(llama, pairs_file, tmp_path / "run", report_to="mlflow", checkpointing_steps=2)
    if error is KeyboardInterrupt:
        assert cli.main(words) == 130
    else:
        with pytest.raises(MemoryError):
            cli.main(words)
    assert faulty.calls == ["start", "metrics", "metrics", f"stop by {error.__name__}"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_mlflow_and_tensorboard_know_that_a_run_has_stopped(
    error: type[BaseException], llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("the disk is gone")

    monkeypatch.setattr(Trainer, "_save", lambda self, wait: fail())
    fields = {"report_to": ["mlflow", "tensorboard"], "checkpointing_steps": 2}
    assert cli.main(cli.arguments(llama, pairs_file, tmp_path / "run", **fields)) in (1, 130)
    assert in_mlflow(tmp_path / "run")[2].info.status == ("KILLED" if error is KeyboardInterrupt else "FAILED")
    assert in_tensorboard(tmp_path / "run")[0]["train_loss"][-1][0] == 2


@pytest.mark.slow
def test_a_server_that_never_answers(
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """MLflow's own client, and a port behind which nobody speaks."""
    monkeypatch.setattr(guarded, "_START_SECONDS", 0.2)
    monkeypatch.setattr(guarded, "_END_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        output = cli.train(llama, pairs_file, tmp_path / "run", report_to="mlflow", max_train_steps=2)
    (said,) = told(capsys.readouterr().out)
    assert "has not taken everything" in said
    assert cli.summary(output)["status"] == "completed"


@pytest.mark.slow
def test_a_server_that_is_away(
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    cli.train(llama, pairs_file, tmp_path / "run", report_to="mlflow", max_train_steps=1)
    (said,) = told(capsys.readouterr().out)
    assert "mlflow cannot start (" in said
    assert "see MLFLOW_TRACKING_URI" in said
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


# ------------------------------------------------------------------------------------------------------------- trackio


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_every_figure_once(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Killed and resumed, read back from its database."""
    fields = RUN | {"report_to": "trackio", "eval_mixer_list": [pairs_file, "3"]}
    output = tmp_path / "run"
    words = cli.arguments(llama, pairs_file, output, resume_from_checkpoint="auto", **fields)
    assert cli.forked(words, kill_at(5)) == -signal.SIGKILL
    assert cli.forked(words) == 0
    with sqlite3.connect(output / "trackio" / "open_po.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    points: Points = {}
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            points.setdefault(name, []).append((step, value))
    points.pop("samples")
    assert without_perf(points) == without_perf(written(output))
