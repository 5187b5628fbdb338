"""Metrics: their sums, the JSONL file, the console, and Weights & Biases."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from rich.console import Console
from wandb.proto import wandb_internal_pb2

from open_po.distributed.runtime import Runtime
from open_po.evaluation.meter import PreferenceMeter
from open_po.losses import Counts, MixedLosses, PairLogps, PairLosses
from open_po.output.metrics import read_metrics
from open_po.output.progress import Progress
from open_po.output.run_folder import RunFolder
from open_po.output.trackers import JsonlTracker
from tests import cli

# ----------------------------------------------------------------------------------------------------------- one meter


def pairs_of(chosen: list[float], rejected: list[float], losses: list[float], rejected_tokens: float = 3.0) -> Any:
    """One pack whose rewards are a tenth of its log-probs."""
    logps = PairLogps(
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        chosen_tokens=torch.full((len(chosen),), 2.0),
        rejected_tokens=torch.full((len(chosen),), rejected_tokens),
    )
    part = PairLosses(
        losses=torch.tensor(losses), chosen_rewards=logps.chosen / 10, rejected_rewards=logps.rejected / 10
    )
    return logps, MixedLosses(["some_loss"], [part], [1.0])


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.start(0)


def test_the_meter_means_over_pairs_and_sums_losses_over_the_divisor(runtime: Runtime) -> None:
    """By hand: pairs (-10, -30), (-20, -20) and (-60, -40), one win, one tie, one defeat."""
    meter = PreferenceMeter()
    meter.add(*pairs_of([-10, -20], [-30, -20], [0.5, 1.0]), counts=Counts(pairs=3, chosen_tokens=0))
    meter.add(*pairs_of([-60], [-40], [3.0]), counts=Counts(pairs=3, chosen_tokens=0))
    assert meter.means(runtime) == {
        "loss": pytest.approx(1.5),
        "logps/chosen": pytest.approx(-30),
        "logps/rejected": pytest.approx(-30),
        "rewards/chosen": pytest.approx(-3),
        "rewards/rejected": pytest.approx(-3),
        "rewards/average": pytest.approx(-3),
        "rewards/accuracy": pytest.approx(0.5),
        "rewards/margin": pytest.approx(0),
    }


def test_the_meter_is_empty_afterwards_and_averages_losses_over_steps(runtime: Runtime) -> None:
    meter = PreferenceMeter()
    meter.add(*pairs_of([-10], [-30], [1.0]), counts=Counts(pairs=1, chosen_tokens=0))
    meter.means(runtime)
    for loss in (2.0, 4.0):
        meter.add(*pairs_of([-1], [-2], [loss]), counts=Counts(pairs=1, chosen_tokens=0))
    assert meter.means(runtime, steps=2)["loss"] == pytest.approx(3.0)


def test_the_meter_leaves_out_what_needs_rejected_responses_that_were_not_scored(runtime: Runtime) -> None:
    meter = PreferenceMeter()
    meter.add(*pairs_of([-10], [0], [1.0], rejected_tokens=0.0), counts=Counts(pairs=1, chosen_tokens=0))
    assert set(meter.means(runtime)) == {"loss", "logps/chosen", "rewards/chosen"}


# ---------------------------------------------------------------------------------------------------------- JSON lines


def test_resuming_drops_later_lines_and_half_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path = folder.metrics
    tracker = JsonlTracker(folder, -1)
    for step in range(5):
        tracker.metrics_written({"training_step": step, "train_loss": step / 3})
    with open(path, "a") as file:
        file.write('{"training_step": 2, "train_l')  # cut off by a full disk or a crash
    JsonlTracker(folder, 3).metrics_written({"training_step": 4, "train_loss": 9.0})
    assert [record["train_loss"] for record in read_metrics(path)] == [0, 1 / 3, 2 / 3, 1, 9.0]
    JsonlTracker(folder, -1)
    assert path.read_text() == ""
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


# ------------------------------------------------------------------------------------------------------------- console


def console(**settings: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100, highlight=False, **settings), stream


def test_progress_elsewhere_than_on_a_terminal_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("open_po.output.progress.time.monotonic", lambda: clock[0])
    to, stream = console()
    with Progress(to, "Training", total=110, unit="steps", done=10) as progress:
        for _ in range(100):
            clock[0] += 0.5
            progress.advance(1, tokens=1000)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Training: 31/110 steps, 2.0 steps/s, 2,000 tokens/s, 40 s left"
    assert len(lines) == 5, "a line every ten seconds and one at the end"
    assert lines[-1] == "Training: 100 steps in 50.0 s, 2.0 steps/s, 2,000 tokens/s"
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_leaves_only_its_last_line() -> None:
    to, stream = console(force_terminal=True, color_system=None)
    with Progress(to, "Training", total=3, unit="steps") as progress:
        for _ in range(3):
            progress.advance(1, tokens=10, note="loss 0.5")
    assert "loss 0.5" in stream.getvalue()
    (line,) = shown_on(stream.getvalue())
    assert line.startswith("Training: 3 steps in")


def test_progress_that_fails_claims_nothing() -> None:
    to, stream = console()
    with pytest.raises(KeyError), Progress(to, "Training", total=3, unit="steps"):
        raise KeyError
    assert stream.getvalue() == ""


def test_progress_of_other_ranks_is_silent() -> None:
    to, stream = console(quiet=True, force_terminal=True)
    with Progress(to, "Training", total=1, unit="steps") as progress:
        progress.advance(1, tokens=5)
    assert stream.getvalue() == ""


def shown_on(output: str) -> list[str]:
    """Lines that a terminal shows in the end, of what rich writes: text, carriage returns, erasures, cursor moves."""
    lines, row = [""], 0
    text = re.sub(r"\x1b\[(\?25[lh]|[\d;]*m)", "", output.replace("\r\n", "\n"))  # cursor on and off, colours
    position = 0
    while position < len(text):
        if text.startswith("\x1b[2K", position):
            lines[row], position = "", position + 4
        elif text.startswith("\x1b[1A", position):
            row, position = row - 1, position + 4
        elif text[position] == "\r":
            position += 1
        elif text[position] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
            position += 1
        else:
            lines[row], position = lines[row] + text[position], position + 1
    return [line for line in lines if line]


def test_a_run_on_a_terminal_ends_with_plain_lines(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = cli.arguments(
        llama, pairs_file, tmp_path / "run", eval_mixer_list=[pairs_file, "3"], eval_steps=3, sample_during_eval=1
    )
    child, terminal = pty.fork()
    if child == 0:
        os.environ["COLUMNS"] = "100"
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not what pytest captures
        code = cli.main(words)
        sys.stdout.flush()
        os._exit(code)
    written = b""
    while chunk := _read(terminal):
        written += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lines = shown_on(written.decode())
    assert "\x1b" not in "".join(lines)
    starts = [line.split(":")[0] for line in lines]
    for expected in ("Training data", "Reference log-probs", "Held out, step 0", "Training", "Run completed"):
        assert sum(start.strip() == expected for start in starts) == 1, lines


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is gone
        return b""


# ---------------------------------------------------------------------------------------------------- Weights & Biases


def wandb_records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """What an offline run has stored. W&B's own process writes it, and may be at it a little after `finish`."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while True:
        records = whole_records(path.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{len(records)} records, and none of the run's end"
        time.sleep(0.1)


def whole_records(content: bytes) -> list[wandb_internal_pb2.Record]:
    """The records of a LevelDB log of protobufs behind a header of 7 bytes, as far as it is written."""
    assert content[:4] == b":W&B"
    records, parts, position = [], b"", 7
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # a record's header does not go over the end of a block
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        position += 7
        if position + length > len(content):
            break
        parts += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def wandb_history(records: list[wandb_internal_pb2.Record]) -> Iterator[dict[str, float]]:
    for record in records:
        if record.WhichOneof("record_type") == "history":
            yield {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def test_wandb_receives_every_metric_and_the_configuration(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = cli.train(
        llama,
        pairs_file,
        tmp_path / "run",
        with_tracking=True,
        exp_name="a name",
        wandb_project_name="a project",
        eval_mixer_list=[pairs_file, "3"],
        eval_steps=3,
    )
    records = wandb_records(output)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.display_name, run.project) == ("a name", "a project")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["learning_rate"] == 2e-3
    assert config["model_name_or_path"] == str(llama)
    received: dict[int, dict[str, float]] = {}
    for record in wandb_history(records):
        received.setdefault(int(record["_step"]), {}).update(record)
    expected: dict[int, dict[str, float]] = {}
    for line in cli.metrics(output):  # one row of W&B holds training and evaluation of a step
        expected.setdefault(int(line["training_step"]), {}).update(line)
    assert sorted(received) == list(range(7)) == sorted(expected)
    for step, line in expected.items():
        assert {name: received[step][name] for name in line} == line


@pytest.mark.slow
def test_trackers_are_not_imported_unless_asked_for(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """In a process that has not imported them yet."""
    words = cli.arguments(llama, pairs_file, tmp_path / "run", max_train_steps=1)
    names = "{'wandb', 'tensorboard', 'trackio'} & set(sys.modules)"  # mlflow, if it is there, by DeepSpeed
    script = f"import sys; from open_po.commands.train import main; print(main({words!r}), {names})"
    code, stdout, stderr = cli.finished(cli.start([sys.executable, "-c", script]), timeout=120)
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == "0 set()"


def test_a_resumed_run_goes_on_as_the_same_wandb_run(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    fields = {"with_tracking": True, "checkpointing_steps": 2}
    first = cli.train(llama, pairs_file, tmp_path / "first", **fields)
    (name,) = [path.name for path in (first / "wandb").glob("offline-run-*")]
    second = cli.train(
        llama,
        pairs_file,
        tmp_path / "second",
        resume_from_checkpoint=first / "checkpoints" / "step_000002",
        **fields,
    )
    (again,) = [path.name for path in (second / "wandb").glob("offline-run-*")]
    assert again.rsplit("-", 1)[1] == name.rsplit("-", 1)[1]
    assert [int(record["_step"]) for record in wandb_history(wandb_records(second))] == [3, 4, 5, 6]
    state = json.loads((second / "checkpoints" / "step_000006" / "trainer_state.json").read_text())
    assert state["progress"]["tracker_ids"] == {"wandb": name.rsplit("-", 1)[1]}


def test_wandb_that_cannot_start_is_told_in_one_line_and_training_goes_on(
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No key, no terminal to ask for one, and a server that is not there."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # forget the mode that it was first used in
    cli.train(llama, pairs_file, tmp_path / "run", with_tracking=True, max_train_steps=1)
    wandb.teardown()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "report_to" in line]
    assert line.startswith("report_to: wandb cannot start (")
    assert line.endswith("log in with `wandb login`, or set WANDB_MODE=offline; training goes on without it")
    assert cli.summary(tmp_path / "run")["status"] == "completed"
