"""The ranks of one node: child processes that are started, told of signals and ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from open_po.commands.processes import die_with_parent

_SIGNALS = 3  # that `end` sends


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long ranks have to end when another has failed, in seconds."""

    by_themselves: float = 10.0  # they meet a closed connection
    after_first: float = 5.0  # SIGTERM, at which a rank finishes its step and saves, which it may be unable to
    after_second: float = 10.0  # SIGTERM, which ends a rank at once; then SIGKILL


@dataclass(kw_only=True)
class LocalRanks:
    """Running ranks, by their number on this node. They do not outlive this process."""

    patience: Patience
    children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)  # that have not ended
    _due: list[tuple[float, int]] = field(default_factory=list)  # signals to come, when the ranks are being ended

    def start(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Start a rank for each environment; none may run."""
        self._due.clear()
        for number, environment in enumerate(environments):
            self.children[number] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches the launcher, which passes it on once
                preexec_fn=die_with_parent,
            )

    def ended(self) -> dict[int, int]:
        """Ranks that have ended since the last time, with their exit codes (minus a signal); sends what is due."""
        while self._due and self._due[0][0] <= time.monotonic():
            self.send(self._due.pop(0)[1])
        codes = {number: code for number, child in self.children.items() if (code := child.poll()) is not None}
        for number in codes:
            del self.children[number]
        return codes

    def send(self, number: int) -> None:
        """Send a signal to all that run; SIGKILL also to processes that they have started."""
        for child in self.children.values():
            if child.poll() is not None:
                continue
            with suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(child.pid, number)
                else:
                    child.send_signal(number)

    def end(self, *, at_once: bool = False) -> None:
        """Ask them to end, now or when they have not by themselves; `ended` sends the signals as they become due."""
        if self._due and not (at_once and len(self._due) == _SIGNALS):
            return  # under way
        first = time.monotonic() + (0.0 if at_once else self.patience.by_themselves)
        second = first + self.patience.after_first
        last = second + self.patience.after_second
        self._due = [(first, signal.SIGTERM), (second, signal.SIGTERM), (last, signal.SIGKILL)]

    def kill(self) -> None:
        """End them now."""
        self.send(signal.SIGKILL)
        for child in self.children.values():
            child.wait()
        self.children.clear()
