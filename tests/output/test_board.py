"""Phases: their bars, and the file that other processes read."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from open_po.output.bars import Bar
from open_po.output.console import Output
from open_po.output.phase import BYTES, Phase, PhaseState
from open_po.output.progress import Progress
from tests import cli


@pytest.fixture
def console() -> Output:
    return Output(file=io.StringIO(), width=200, highlight=False)


def phases(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["phases"]
    return found


def wait_until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------- the file


def training_that_fails(console: Output) -> None:
    with Progress(console, "Training", total=9, unit="steps", done=4, memory=lambda: 5) as bar:
        bar.advance(1, note="loss 0.5")
        bar.advance(1)
        for _ in range(2):
            with Progress(console, "Evaluation", total=8, unit="pairs", last_line=False) as evaluation:
                evaluation.advance(8)
        raise KeyError


def test_the_file_says_what_was_advanced(console: Output, tmp_path: Path) -> None:
    """Phases within one another, one that comes twice, one that others help with, and one that fails."""
    path, before = tmp_path / "board.json", time.time()
    console.board.keep_in(path)
    with Progress(console, "Reference", total=50, unit="responses") as reference:
        reference.advance(7, tokens=900)
        reference.done_elsewhere(40)
        reference.advance(3, tokens=100)
    with pytest.raises(KeyError):
        training_that_fails(console)
    console.board.close()
    found = phases(path)
    shown = [(phase["label"], phase["state"], phase["done"], phase["total"], phase["unit"]) for phase in found]
    assert shown == [
        ("Reference", "done", 50, 50, "responses"),
        ("Training", "stopped", 6, 9, "steps"),
        ("Evaluation", "done", 8, 8, "pairs"),
    ]
    assert found[0]["tokens_per_second"] == pytest.approx(100 * found[0]["per_second"])  # 1,000 tokens, 10 responses
    assert [(phase["note"], phase["memory_bytes"]) for phase in found] == [("", 0), ("loss 0.5", 5), ("", 0)]
    for phase in found:
        assert before <= phase["started"] <= phase["updated"] <= time.time()
    content = json.loads(path.read_text())
    assert (content["host"], content["pid"]) == (os.uname().nodename, os.getpid())
    assert [item.name for item in tmp_path.iterdir()] == ["board.json"]


def test_the_file_follows_while_a_phase_goes_on(console: Output, tmp_path: Path) -> None:
    path = tmp_path / "board.json"
    console.board.keep_in(path)
    with Progress(console, "Training", total=9, unit="steps") as bar:
        wait_until(lambda: path.exists() and [phase["done"] for phase in phases(path)] == [0])
        start = time.monotonic()
        bar.advance(3)
        wait_until(lambda: phases(path)[0]["done"] == 3)
        assert time.monotonic() - start < 3
    wait_until(lambda: phases(path)[0]["state"] == "done")
    console.board.close()
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_an_upload_counts_bytes_from_several_threads(console: Output, tmp_path: Path) -> None:
    console.board.keep_in(tmp_path / "board.json")
    with Progress(console, "Upload", total=8_000_000, unit=BYTES) as bar:

        def send() -> None:
            for _ in range(1000):
                bar.advance(1000, note="model.safetensors")

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "8.0 MB of 8.0 MB" in bar.phase().line()
        assert re.search(r"MB/s, model.safetensors", bar.phase().line())
    console.board.close()
    assert phases(tmp_path / "board.json")[0]["done"] == 8_000_000
    assert re.fullmatch(r"Upload: 8.0 MB in \d+\.\d s, [\d.]+ [kMG]B/s\n", console.file.getvalue())  # type: ignore[attr-defined]


def test_a_phase_costs_its_thread_next_to_nothing(console: Output, tmp_path: Path) -> None:
    console.board.keep_in(tmp_path / "board.json")
    with Progress(console, "Training", total=20_000, unit="steps") as bar:
        start = time.thread_time()
        for _ in range(20_000):
            bar.advance(1, tokens=10, note="loss 0.5")
        assert (time.thread_time() - start) / 20_000 < 1e-4
    console.board.close()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system without room; removing `filler` makes some."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    fill = ["dd", "if=/dev/zero", f"of={folder / 'filler'}", "bs=4096"]
    assert b"No space left" in subprocess.run(fill, capture_output=True, check=False).stderr
    yield folder
    subprocess.run(["umount", folder], capture_output=True, check=False)


def test_a_full_disk_is_told_once_and_ends_nothing(full: Path, console: Output) -> None:
    path = full / "board.json"
    console.board.keep_in(path)
    with Progress(console, "Training", total=3, unit="steps") as bar:
        for _ in range(3):
            bar.advance(1)
            time.sleep(0.1)
    with Progress(console, "Evaluation", total=1, unit="pairs"):
        pass
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line for line in lines if "board.json" in line] == [
        f"{path}: cannot be written (No space left on device); the run goes on, and `python -m open_po watch` does not "
        "see its phases"
    ]
    assert [line.split(":")[0] for line in lines if "board.json" not in line] == ["Training", "Evaluation"]
    (full / "filler").unlink()
    console.board.close()
    assert [item.name for item in full.iterdir()] == ["board.json"], "nothing half-written stays"
    assert [phase["done"] for phase in phases(path)] == [3, 0]


# ------------------------------------------------------------------------------------------------------------- its bars


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200])
@pytest.mark.parametrize("label", ["Training", "Reference log-probs", "Tokenising /a/path/that/is/long/pairs.jsonl"])
def test_a_bar_is_as_wide_as_the_terminal_and_cuts_no_figure(width: int, label: str) -> None:
    phase = Phase(
        label=label,
        state=PhaseState.RUNNING,
        done=9_518,
        total=16_000,
        unit="distinct responses",
        per_second=0.5,
        tokens_per_second=12_345.0,
        note="loss 0.6931, accuracy 0.512, margin 0.012, chosen -123.45, lr 1.00e-06",
        memory_bytes=12_300_000_000,
        started=0.0,
        updated=1.0,
    )
    stream = io.StringIO()
    Console(file=stream, width=width).print(Bar(phase))
    lines = stream.getvalue().splitlines()
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    shown = " ".join(stream.getvalue().split())
    for part in ("59%", "9,518/16,000", "3:36:04 left", "0.5 distinct responses/s", "12,345 tokens/s", "12.30 GB"):
        assert part in shown
    for part in phase.note.split(", "):
        assert part in shown
    if width >= 80:
        assert "━" in lines[0] or "╸" in lines[0]


def on_a_terminal(script: str, width: int, **environment: str) -> str:
    """What a Python script writes to a terminal of so many columns."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {**cli.environment(), "COLUMNS": str(width), "TERM": "xterm", **environment}
        os.execv(sys.executable, [sys.executable, "-c", script])
    written = b""
    while chunk := _read(terminal):
        written += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return written.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is gone
        return b""


_TWO_PHASES = """
import threading, time
from open_po.output.console import make_console
from open_po.output.progress import Progress
console = make_console()
with Progress(console, "Training", total=4, unit="steps") as bar:
    bar.advance(1, note="loss 0.5")
    upload = Progress(console, "Upload", total=4, unit="bytes").__enter__()
    time.sleep(0.6)
    console.print("a line between")
upload.advance(4)
threading.Thread(target=upload.__exit__, args=(None, None, None)).start()
"""


def test_phases_that_overlap_have_a_bar_each() -> None:
    written = on_a_terminal(_TWO_PHASES, 100)
    assert re.search(r"Training [^\n]*1/4 steps[^\n]*\r\n[^\n]*Upload [^\n]*0 bytes of 4 bytes", written)
    lines = [line for line in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", written).splitlines() if "━" not in line]
    assert [line.strip().split(" in ")[0] for line in lines if line.strip()] == [
        "a line between",
        "Training: 1 steps",
        "Upload: 4 bytes",
    ]


def test_a_notebook_gets_lines_that_move_no_cursor() -> None:
    """Where a cell starts a command with `!`, it is on a terminal that draws no bars."""
    written = on_a_terminal(_TWO_PHASES, 200, JPY_PARENT_PID="1")
    assert "\x1b" not in written
    assert [line.split(" in ")[0] for line in written.splitlines()] == [
        "a line between",
        "Training: 1 steps",
        "Upload: 4 bytes",
    ]
