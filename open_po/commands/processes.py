"""Child processes, so many at a time, that never outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0  # for a process to end by itself when it is asked to
_DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG

try:  # here and not between fork and exec, where loading a library may wait for a thread that the fork lacks
    _LIBC: ctypes.CDLL | None = ctypes.CDLL("libc.so.6")
except OSError:  # not Linux
    _LIBC = None


@dataclass(kw_only=True)
class Slot:
    """Room for one process at a time, on one device, with the environment that it gets."""

    environment: dict[str, str]
    what: Any = None
    child: subprocess.Popen[bytes] | None = None
    started: float = 0.0


class Slots:
    """The processes that may run at the same time. None of them outlives this one."""

    def __init__(self, environments: Sequence[dict[str, str]]) -> None:
        self.slots = [Slot(environment=environment) for environment in environments]

    @staticmethod
    def of(devices: Sequence[str | None], jobs: int) -> Slots:
        """`jobs` slots, the devices dealt out in turn; on a CPU the cores are divided."""
        environments = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(
            ","
        )  # of which the devices are numbers, if it is set
        for number in range(jobs):
            device = devices[number % len(devices)]
            environment = dict(os.environ)
            if device is not None:
                renamed = visible != [""] and device.isdigit() and int(device) < len(visible)
                environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if renamed else device
            if jobs > 1:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
            environments.append(environment)
        return Slots(environments)

    @property
    def free(self) -> bool:
        """Whether another process can start."""
        return any(slot.child is None for slot in self.slots)

    @property
    def busy(self) -> bool:
        """Whether any process runs."""
        return any(slot.child is not None for slot in self.slots)

    def start(self, what: Any, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        """Start a process in a free slot; what it says goes to the end of `log`."""
        slot = next(slot for slot in self.slots if slot.child is None)
        slot.what, slot.started = what, time.monotonic()
        with open(log, "ab") as file:
            slot.child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment or slot.environment,
                start_new_session=True,  # a terminal's Ctrl-C is passed on once, by `stop`
                preexec_fn=die_with_parent,
            )

    def ended(self) -> Iterator[tuple[Any, int, float]]:
        """What has ended since the last time: what it was, its exit code, its seconds."""
        for slot in self.slots:
            if slot.child is not None and (code := slot.child.poll()) is not None:
                slot.child = None
                yield slot.what, code, time.monotonic() - slot.started

    def run_alone(self, command: Sequence[str], log: Path) -> int:
        """Run one process to its end, on the first slot's device with all of the cores; returns its exit code."""
        environment = dict(os.environ)
        if device := self.slots[0].environment.get("CUDA_VISIBLE_DEVICES"):
            environment["CUDA_VISIBLE_DEVICES"] = device
        self.start(None, command, log, environment)
        while True:
            for _, code, _ in self.ended():
                return code
            self.wait()

    def wait(self) -> None:
        """A moment, before looking again at what has ended."""
        time.sleep(_POLL_SECONDS)

    def stop(self, patience: float = _PATIENCE_SECONDS) -> None:
        """End what runs: asked first, after so many seconds killed."""
        children = [slot.child for slot in self.slots if slot.child is not None]
        for child in children:
            child.terminate()
        deadline = time.monotonic() + patience
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for _ in self.ended():
            pass


def last_line(log: Path) -> str:
    """What a process said last."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no output"
    return lines[-1].removeprefix("error: ") if lines else "no output"


def die_with_parent() -> None:
    """In a child before its program starts: SIGTERM for it when the process that started it ends, in whatever way."""
    if _LIBC is not None:
        _LIBC.prctl(_DIES_WITH_PARENT, signal.SIGTERM)
