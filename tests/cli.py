"""Runs of the command line, in this process, in a forked one or in processes of their own, and what they leave."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from open_po.commands.train import main

import_module("open_po.training.run")  # by a run, but then each fork would for itself
REPOSITORY = Path(__file__).parent.parent
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "max_seq_length": 128,
    "preprocessing_num_workers": 1,
}


def flags(**fields: Any) -> list[str]:
    """Command-line arguments for `fields`; None leaves a field out."""
    words: list[str] = []
    for name, value in fields.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return words


def arguments(model: Path, data: Path, output: Path, **fields: Any) -> list[str]:
    """A small run of `model` on `data`; its reference log-probs are kept beside `output`."""
    given = {
        "model_name_or_path": model,
        "mixer_list": [data, "1.0"],
        "output_dir": output,
        "reference_cache_dir": output.parent / "reference",
    }
    return flags(**{**DEFAULTS, **given, **fields})


def train(model: Path, data: Path, output: Path, **fields: Any) -> Path:
    """Run to the end in this process; returns `output`."""
    assert main(arguments(model, data, output, **fields)) == 0
    return output


def failure(capsys: pytest.CaptureFixture[str], words: Sequence[str], exit_code: int = 1) -> str:
    """Run in this process; the error line of a run that must fail with one line on stderr and nothing else there."""
    capsys.readouterr()
    code = main(words)
    stderr = capsys.readouterr().err
    assert code == exit_code, stderr
    return only_error(stderr)


def only_error(stderr: str) -> str:
    """The one line of `stderr`, an error."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]


# -------------------------------------------------------------------------------------------------------- what is left


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict[str, float]]:
    """The training records of metrics.jsonl."""
    return [record for record in metrics(folder) if "train_loss" in record]


def without_perf(records: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if not name.startswith("perf/")} for record in records]


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run_summary.json").read_text())
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved model's weights."""
    return load_file(folder / "model.safetensors")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def files(folder: Path) -> set[str]:
    """Every file in a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    assert one.keys() == other.keys()
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def assert_close_weights(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
    share: float = 1e-4,
) -> None:
    """`got` and `expected` differ by at most a `share` of how far training went from `start`."""
    movement = distance(expected, start)
    assert movement > 0.05, "the run hardly moved: the comparison would show nothing"
    assert distance(got, expected) <= share * movement


# ------------------------------------------------------------------------------------------------------ other processes


def forked(words: Sequence[str], prepare: Callable[[], object] = lambda: None) -> int:
    """Run in a fork of this process, which saves the imports; its exit code, or minus the signal that ended it.

    `prepare` runs in the fork first, to set a trap there.
    """
    _, status = os.waitpid(_fork(words, prepare), 0)
    return os.waitstatus_to_exitcode(status)


def forked_ranks(
    words: Sequence[str],
    prepare: Callable[[int], object] = lambda rank: None,
    *,
    count: int = 2,
    per_node: int | None = None,
    grace: float | None = None,
    seconds: float = 60,
) -> list[int]:
    """Run as two ranks, or `count`, each a fork of this process that nobody ends for another one's sake.

    With `per_node` they believe to be on several machines. With `grace` the others of one that was killed have so many
    seconds to end by themselves, as a launcher gives them.

    Their exit codes; `prepare` gets the rank. Fails the test if they hang.
    """
    port = _free_port()

    def join(rank: int) -> None:
        here = per_node or count
        place = {"RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": here}
        place["MASTER_PORT"] = port
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        AcceleratorState._reset_state(reset_partial_state=True)  # this process was alone
        prepare(rank)

    children = [_fork(words, partial(join, rank)) for rank in range(count)]
    codes: dict[int, int] = {}
    deadline, ends = time.monotonic() + seconds, math.inf
    while len(codes) < count:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child] < 0 and grace is not None:
                ends = min(ends, time.monotonic() + grace)
        elif time.monotonic() > ends:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            ends = math.inf
        elif time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            pytest.fail(f"hung; exit codes so far: {codes}")
        time.sleep(0.01)
    return [codes[child] for child in children]


def forked_ranks_in_turn(runs: Sequence[Sequence[str]], prepare: Callable[[int], object] = lambda rank: None) -> None:
    """Run one command line after the other as two ranks that stay the same processes; fails unless all come through."""
    ports = [str(_free_port()) for _ in runs]

    def job(rank: int) -> None:
        prepare(rank)
        for words, port in zip(runs, ports, strict=True):
            os.environ["MASTER_PORT"] = port
            AcceleratorState._reset_state(reset_partial_state=True)
            _forget_deepspeed()
            assert main(words) == 0, words

    assert forked_ranks(["--help"], job, seconds=60 * len(runs)) == [0, 0]


def _forget_deepspeed() -> None:
    """Have DeepSpeed make its groups anew: it keeps those of a process group that is gone."""
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = None
        for name, value in list(vars(groups).items()):
            if re.fullmatch("_[A-Z_]+", name):
                setattr(groups, name, {} if isinstance(value, dict) else None)


def _free_port() -> int:
    """A port nobody listens on, below those that the system hands out for outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def _fork(words: Sequence[str], prepare: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    torch.set_num_threads(1)  # before other threads, which would race to replace the pool that a fork breaks
    try:
        prepare()
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_at_file_event(number: int, folder: Path) -> Callable[[], object]:
    """For `forked`: SIGKILL just before the fork's `number`th opening, renaming or removal of a file in `folder`."""
    prefix, seen = str(folder), 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and any(isinstance(item, str | Path) and str(item).startswith(prefix) for item in details[:2]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def environment(**more: str) -> dict[str, str]:
    """For processes that a test starts: one thread, as in this process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **more}


def start(command: Sequence[str | Path], **more: str) -> subprocess.Popen[str]:
    """Start a command in the repository and a process group of its own, with pipes for its output."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], timeout: float) -> tuple[int, str, str]:
    """Wait for a process started by `start`; its exit code, stdout and stderr. Its whole group ends on a timeout."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"still running after {timeout} s\n{stdout}\n{stderr}")
    return process.returncode, stdout, stderr
