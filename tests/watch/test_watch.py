"""`python -m open_po watch` on folders of real runs, in every state that they can be in."""

from __future__ import annotations

import itertools
import json
import os
import platform
import pty
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from open_po.commands.watch import main
from open_po.output.board import BoardFile
from open_po.output.files import is_locked, lock_folder
from open_po.output.summary import Status
from open_po.watch.run_state import RunReader, judge
from open_po.watch.small_curves import small_curve
from tests import cli, tiny

Capture = pytest.CaptureFixture[str]
FIELDS: dict[str, Any] = {"num_epochs": 2, "checkpointing_steps": 5, "eval_steps": 5, "exp_name": "a run"}


def run_words(llama: Path, folder: Path, **fields: Any) -> list[str]:
    """A run of 12 steps, with held-out pairs."""
    data, held_out = folder.parent / "pairs.jsonl", folder.parent / "held_out.jsonl"
    tiny.write_jsonl(data, tiny.text_rows(24))
    tiny.write_jsonl(held_out, tiny.text_rows(5, seed=9))
    return cli.arguments(llama, data, folder, **{**FIELDS, "eval_mixer_list": [held_out, "1.0"], **fields})


@pytest.fixture(scope="module")
def complete(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complete") / "run"
    assert cli.main(run_words(llama, folder)) == 0
    return folder


@pytest.fixture
def stopped(llama: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A run that stands still in its eighth step, and its process."""
    folder, child = tmp_path / "run", os.fork()
    if child == 0:
        from open_po.training.gradients import StepGradients

        backward = StepGradients.backward

        def standing_still(self: StepGradients, *positional: Any) -> Any:
            if self.state.progress.step == 7:
                time.sleep(1.5)  # for the board to be written
                os.kill(os.getpid(), signal.SIGSTOP)
            return backward(self, *positional)

        StepGradients.backward = standing_still  # type: ignore[method-assign]
        code = 99
        try:
            code = cli.main(run_words(llama, folder))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    yield child, folder
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def once(capsys: Capture, folder: Path) -> str:
    capsys.readouterr()
    assert main([str(folder), "--once"]) == 0
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- states


def test_a_complete_run(complete: Path, capsys: Capture) -> None:
    """Its newest figures are those of the files, its phases those that it had."""
    picture = once(capsys, complete)
    assert "● completed" in picture
    assert "a run" in picture
    records = cli.steps(complete)
    row = next(line for line in picture.splitlines() if line.startswith("training")).split()
    assert row[1:4] == ["12", f"{records[-1]['train_loss']:.4f}", f"{records[-1]['rewards/accuracy']:.3f}"]
    evaluations = [record for record in cli.metrics(complete) if "eval/loss" in record]
    rows = [line.split() for line in picture.splitlines() if line.startswith("held out ")]
    assert [row[2:5] for row in rows] == [
        [f"{record['training_step']}", f"{record['eval/loss']:.4f}", f"{record['eval/rewards/accuracy']:.3f}"]
        for record in (evaluations[-1], evaluations[0])
    ]
    for phase in ("48/48 distinct responses", "10/10 distinct responses", "12/12 steps", "5/5 pairs"):
        assert f": {phase} in" in picture
    assert re.search(r"checkpoints: step_000010 \(\d+ s ago\), step_000005 ", picture)
    assert set(picture) & {chr(code) for code in range(0x2801, 0x2900)}, "no curve is drawn"


def test_the_board_is_no_part_of_the_model(complete: Path) -> None:
    """It is hidden, which no upload takes."""
    assert {name for name in cli.files(complete) if name.startswith(".")} == {".progress.json"}


def test_a_kill_while_a_complete_run_writes_its_board_for_the_last_time(
    llama: Path, tmp_path: Path, capsys: Capture
) -> None:
    """What it left half-written goes when the same command comes again, and nothing else changes."""
    folder = tmp_path / "run"
    words = run_words(llama, folder, resume_from_checkpoint="auto", max_train_steps=1)

    def trap() -> None:
        def hook(event: str, details: tuple[Any, ...]) -> None:
            renames = event == "os.rename" and str(details[1]) == str(folder / ".progress.json")
            if renames and '"completed"' in (folder / "run_summary.json").read_text():
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    assert cli.forked(words, trap) == -signal.SIGKILL
    assert list(folder.glob(".*.partial"))
    assert "● completed" in once(capsys, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.name.endswith(".partial")}
    assert cli.main(words) == 0
    assert "is complete; nothing to do" in capsys.readouterr().out
    assert (
        {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before | {folder: folder.stat().st_mtime_ns}
        if folder in before
        else {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    )


def test_a_run_that_goes_on_and_one_that_was_killed(stopped: tuple[int, Path], capsys: Capture) -> None:
    process, folder = stopped
    picture = once(capsys, folder)
    assert "● running" in picture
    assert "✓ Tokenising" in picture
    assert ": 24/24 rows in" in picture
    assert f"{platform.node()}, process {process}" in picture
    assert re.search(r"^Training .*7/12 steps", picture, re.MULTILINE)
    assert f"loss {cli.steps(folder)[-1]['train_loss']:.4f}" in picture
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert cli.summary(folder) == {"status": "running"}
    picture = once(capsys, folder)
    assert "● killed" in picture
    assert "✗ Training: 7/12 steps" in picture
    assert main([str(folder)]) == 0  # which ends by itself
    assert "killed" in capsys.readouterr().out.splitlines()[0]


def test_a_run_that_failed_says_why_and_can_be_corrected(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "run"
    assert cli.main(run_words(tmp_path / "typo", folder)) == 1
    assert (folder / ".progress.json").is_file()
    picture = once(capsys, folder)
    assert "● failed" in picture
    assert "typo is no folder" in picture
    assert cli.main(run_words(llama, folder, max_train_steps=1)) == 0, "the folder is free for a corrected run"
    assert "● completed" in once(capsys, folder)


def test_a_run_that_was_asked_to_stop(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "run"
    assert cli.main(run_words(llama, folder, max_run_time=1e-9)) == 75
    picture = once(capsys, folder)
    assert "● interrupted" in picture
    assert "✗ Training: 1/12 steps" in picture
    assert "step_000001" in picture


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: Capture) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main([str(folder)]) == 1
        line = cli.only_error(capsys.readouterr().err)
        assert line.startswith(f"error: {folder}: holds no run, and no sweep; name an output_dir")
        assert ("some seconds after it was started" in line) == (not folder.exists())


def test_files_of_another_version_or_half_written_are_shown_as_far_as_they_go(complete: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete, tmp_path / "run")
    reader = RunReader(folder)
    for damage in ("{", "[]", "null", '{"host": "h", "pid": 1, "started": 1, "written": 1, "phases": [{}]}', ""):
        (folder / ".progress.json").write_text(damage)
        state = reader.look()
        assert state is not None
        assert (state.status, list(state.phases)) == ("completed", [])
        assert len(state.training) == 12
        assert main([str(folder), "--once"]) == 0
    (folder / "config.yaml").write_text("- {")
    assert main([str(folder), "--once"]) == 0


def test_what_a_lock_that_is_not_seen_means() -> None:
    """The folder of a run on another machine, on a file system that does not tell of its lock."""
    now = 1000.0

    def board(host: str, written: float) -> BoardFile:
        return BoardFile(host=host, pid=1, started=0.0, written=written, phases=[])

    here, running = platform.node(), Status.RUNNING
    assert judge(running, True, board(here, 0), now) == ("running", True)
    assert judge(running, False, board(here, now), now) == ("killed", False)
    assert judge(running, False, None, now) == ("killed", False)
    assert judge(running, False, board("elsewhere", now - 60), now) == ("running", True)
    assert judge(running, False, board("elsewhere", now - 600), now) == ("silent", True)
    assert judge(running, None, board(here, now - 60), now) == ("running", True)
    assert judge(Status.COMPLETED, True, board(here, now), now) == ("completed", True)  # it uploads
    assert judge(Status.FAILED, False, board("elsewhere", now), now) == ("failed", False)


def test_looking_does_not_keep_a_run_out(tmp_path: Path) -> None:
    """A run may begin while somebody looks all the time; and then it is seen."""
    child = os.fork()
    if child == 0:
        while True:
            is_locked(tmp_path)
    try:
        for _ in range(20):
            held = lock_folder(tmp_path, "a run")
            assert held is not None
            assert is_locked(tmp_path) is True
            os.close(held)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert is_locked(tmp_path) is False
    assert is_locked(tmp_path / "nowhere") is None


# ----------------------------------------------------------------------------------------------------------- following


def test_watched_on_a_terminal_until_it_ends(stopped: tuple[int, Path]) -> None:
    """The bar of the run's phase comes first, its result last; the exit code is 0."""
    process, folder = stopped
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {**cli.environment(), "COLUMNS": "80", "LINES": "50", "TERM": "xterm"}
        command = [sys.executable, "-m", "open_po", "watch", str(folder), "--interval", "0.1"]
        os.chdir(cli.REPOSITORY)
        os.execv(sys.executable, command)
    written, gone_on = b"", False
    while chunk := _read(terminal):
        written += chunk
        if b"7/12 steps" in written and not gone_on:
            gone_on = True
            os.kill(process, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    shown = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", written.decode())
    assert re.search(r"Training [━╸╺ ]+ *58%  7/12 steps", shown)
    last = shown[shown.rindex("a run") :]
    assert "● completed" in last
    assert "12/12 steps" in last


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is gone
        return b""


def test_watched_through_a_pipe_each_change_is_a_line(stopped: tuple[int, Path]) -> None:
    process, folder = stopped
    watching = cli.start([sys.executable, "-m", "open_po", "watch", folder, "--interval", "0.05"])
    assert watching.stdout is not None
    lines = []
    for line in watching.stdout:
        lines.append(line.rstrip("\n"))
        if "7/12 steps" in line:
            os.kill(process, signal.SIGCONT)
    assert watching.wait() == 0
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert lines[0] == f"{folder}: running"
    assert f"{folder}: completed" in lines
    trainings = [line for line in lines if line.startswith("Training: ")]
    assert all(one != other for one, other in itertools.pairwise(trainings)), "told twice"
    assert not any("\x1b" in line for line in lines)
    assert any(re.match(r"Training: 12/12 steps in ", line) for line in lines)
    newest = [record for record in cli.metrics(folder) if "eval/loss" in record][-1]
    assert any(line.startswith(f"Held out, step 12: loss {newest['eval/loss']:.4f}, ") for line in lines)


def test_metrics_that_grow_or_are_replaced_are_read_once(complete: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete, tmp_path / "run")
    path, reader = folder / "metrics.jsonl", RunReader(folder)

    def steps() -> list[float]:
        state = reader.look()
        assert state is not None
        return [record["training_step"] for record in state.training]

    assert steps() == list(range(1, 13))
    with open(path, "a") as file:
        file.write('{"training_step": 13, "train_loss": 0.5}\n{"training_step": 14, "train_l')
    assert steps() == list(range(1, 14))
    with open(path, "a") as file:
        file.write('oss": 0.5}\n')
    assert steps() == list(range(1, 15))
    (folder / "new").write_text(json.dumps({"training_step": 1, "train_loss": 0.5}) + "\n")
    (folder / "new").rename(path)  # as a run that goes on from a checkpoint does
    assert steps() == [1]


# ----------------------------------------------------------------------------------------------------------- a sweep


def test_a_sweep_is_a_line_for_each_run(complete: Path, tmp_path: Path, capsys: Capture) -> None:
    sweep = tmp_path / "sweep"
    (sweep / "logs").mkdir(parents=True)
    (sweep / "logs" / "reference.log").write_text("a line\nReference log-probs: 5/9 responses\n\n")
    assert "Reference log-probs: 5/9 responses" in once(capsys, sweep)
    shutil.copytree(complete, sweep / "runs" / "beta=1")
    killed = shutil.copytree(complete, sweep / "runs" / "beta=5")
    (killed / "run_summary.json").write_text('{"status": "running"}')
    rows = [f"{number},x,{sweep}/runs/beta={number}" for number in (1, 5, 25)]
    (sweep / "sweep.csv").write_text("\n".join(["beta,status,folder", *rows]) + "\n")
    lines = once(capsys, sweep).splitlines()
    accuracy = [record for record in cli.metrics(complete) if "eval/loss" in record][-1]["eval/rewards/accuracy"]
    assert lines[0].endswith("no longer running  1 completed, 1 killed, 1 not started")
    assert [line.split()[:2] for line in lines[2:]] == [
        ["beta=1", "completed"],
        ["beta=5", "killed"],
        ["beta=25", "not"],
    ]
    assert all(f" {accuracy:.3f} " in line for line in lines[2:4])
    held = lock_folder(sweep, "a sweep")
    assert held is not None
    assert "Sweep " + str(sweep) + "  running" in once(capsys, sweep)
    os.close(held)
    assert main([str(sweep)]) == 0  # not a terminal: lines, and it ends by itself
    assert capsys.readouterr().out.splitlines()[-1].startswith("beta=5: killed")


# ------------------------------------------------------------------------------------------------------------- its dots


@pytest.mark.parametrize("width", [20, 40])
@pytest.mark.parametrize("shape", [lambda x: x, lambda x: -x, lambda x: (x - 50) ** 2, lambda x: 3.0])
def test_a_small_curve_goes_where_its_values_go(width: int, shape: Callable[[float], float]) -> None:
    """Read back from its dots: each column's mean height against the function's, within a dot."""
    height = 6
    points = [(float(x), float(shape(x))) for x in range(101)]
    lines = small_curve("title", points, [], width=width, height=height).plain.splitlines()
    assert lines[0] == "title"
    rows = [line[8:].ljust(width - 9) for line in lines[1 : height + 1]]
    columns = 2 * (width - 9)
    for column in range(columns):
        bits = ((0, 1, 2, 6), (3, 4, 5, 7))[column % 2]
        found = [
            4 * row + dot
            for row, line in enumerate(rows)
            for dot, bit in enumerate(bits)
            if line[column // 2] != " " and (ord(line[column // 2]) - 0x2800) >> bit & 1
        ]
        assert found, f"column {column} is empty"
        rows_of = expected_rows(shape, column, columns, height)
        assert min(abs(row - rows_of[1]) for row in found) <= 1 + max(rows_of) - min(rows_of)


def expected_rows(shape: Callable[[float], float], column: int, columns: int, height: int) -> list[float]:
    """Of the function at a column and those beside it, in dots from the top."""
    values = [float(shape(x)) for x in range(101)]
    low, high = min(values), max(values)
    beside = [shape(100 * min(max(0, each), columns - 1) / (columns - 1)) for each in (column - 1, column, column + 1)]
    return [(4 * height - 1) * (0.5 if high == low else (high - value) / (high - low)) for value in beside]
