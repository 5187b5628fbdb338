"""While a run of several nodes lasts: each launcher says how it is, and hears how the others are.

A thread does the talking, since a question to a machine that has lost its power blocks; the launcher itself only reads
what was heard last and when. Everything a node says is in one record that it replaces, and nobody waits in a barrier.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from open_po.distributed.rendezvous import OWN_KEYS, Rendezvous, status_key

_ORDER = f"{OWN_KEYS}order"
_PUBLISH_SECONDS = 3.0  # to wait for a last word to be written
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank that failed; `order` counts them over all nodes."""

    attempt: int
    node: int
    rank: int
    code: int  # minus the signal that ended it
    order: int = 0


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a node says of itself."""

    beat: int = 0
    attempt: int = 0
    ended: bool = False  # all of its ranks of this attempt
    left: bool = False  # its launcher
    stopping: bool = False  # it was told to stop by a signal
    preempted: int | None = None  # the attempt in which a rank has saved and wants to be started again
    trouble: str | None = None  # why it gives the run up
    failures: list[dict[str, Any]] = field(default_factory=list)  # of all attempts

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))


class NodeWatch:
    """This node's record, and those of the others as they were heard last."""

    def __init__(self, meeting: Rendezvous) -> None:
        self._meeting, self.node, self._limits = meeting, meeting.facts.node, meeting.limits
        self._mine = Status()
        self._lock = threading.Lock()
        self._changes = self._published = 0
        now = time.monotonic()
        self._contact = now
        self._heard = [now] * meeting.facts.nodes
        self._all = [Status()] * meeting.facts.nodes
        self._broken = False
        self._wake, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._talk, name="node-watch", daemon=True).start()

    # ------------------------------------------------------------------------------------------------- the thread

    def _talk(self) -> None:
        while not self._over.is_set():
            try:
                self._exchange()
            except RuntimeError:  # the store's
                self._broken = True
                return
            self._wake.wait(self._limits.poll)
            self._wake.clear()

    def _exchange(self) -> None:
        store = self._meeting.store
        with self._lock:
            mine, change = self._mine, self._changes
        numbered = [dict(failure, order=failure["order"] or store.add(_ORDER, 1)) for failure in mine.failures]
        with self._lock:
            later = self._mine.failures[len(numbered) :]
            self._mine = replace(self._mine, beat=self._mine.beat + 1, failures=[*numbered, *later])
            mine = replace(mine, beat=self._mine.beat, failures=numbered)
        store.set(status_key(self.node), mine.to_json())
        records = store.multi_get([status_key(node) for node in range(len(self._all))])
        now = time.monotonic()
        for node, record in enumerate(records):
            status = Status(**json.loads(record))
            if status.beat != self._all[node].beat:
                self._heard[node] = now
            self._all[node] = status
        self._contact, self._published = now, change

    # ----------------------------------------------------------------------------------------------- what is said

    def say(self, **changes: Any) -> None:
        """Change this node's record."""
        with self._lock:
            self._mine = replace(self._mine, **changes)
            self._changes += 1
        self._wake.set()

    def fail(self, attempt: int, rank: int, code: int) -> None:
        """Say that a rank of this node has failed."""
        failure = asdict(Failure(attempt=attempt, node=self.node, rank=rank, code=code))
        with self._lock:
            self._mine = replace(self._mine, failures=[*self._mine.failures, failure])
            self._changes += 1
        self._wake.set()

    def leave(self, trouble: str | None) -> None:
        """Say the last word. Node 0 stays until all others have said theirs, with a limit: it hosts the store."""
        self.say(left=True, ended=True, trouble=trouble)
        if time.monotonic() - self._contact <= self._limits.silence:
            self._wait_until(lambda: self._published >= self._changes, _PUBLISH_SECONDS)
        if self.node == 0:
            self._wait_until(self._others_are_gone, self._limits.farewell)
        self._over.set()
        self._wake.set()

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (condition() or self._broken or time.monotonic() > deadline):
            self._wake.set()
            time.sleep(_LOOK_SECONDS)

    # ---------------------------------------------------------------------------------------------- what is heard

    def _others_are_gone(self) -> bool:
        return all(s.left or self._silence(node) > self._limits.silence for node, s in enumerate(self._all))

    def _silence(self, node: int) -> float:
        """Seconds since a node's last sign of life."""
        return time.monotonic() - self._heard[node]

    def trouble(self) -> str | None:
        """Why the run cannot go on, though no rank may have failed; None if it can."""
        now, hosts = time.monotonic(), self._meeting.hosts
        for status in self._all:
            if status.trouble:
                return status.trouble
        where = f"{self._meeting.address}:{self._meeting.port}"
        if self._broken:
            return f"node 0 ({hosts[0]}) has stopped: its store at {where} has closed"
        if now - self._contact > self._limits.silence:
            return f"node 0 ({hosts[0]}) has stopped: no answer from {where} for {now - self._contact:.0f} s"
        for node, status in enumerate(self._all):
            silent = self._silence(node)
            if silent > self._limits.silence and not status.left and node != self.node:
                return f"node {node} ({hosts[node]}) has stopped: no sign of life for {silent:.0f} s"
        return None

    def first_failure(self, attempt: int) -> Failure | None:
        """The rank that failed before all others, as far as is known here."""
        known = [Failure(**failure) for status in self._all for failure in status.failures]
        return min((f for f in known if f.attempt == attempt), key=lambda f: f.order, default=None)

    def all_ended(self, attempt: int) -> bool:
        """Whether no rank of an attempt runs any more, on any node."""
        return all(s.left or s.attempt > attempt or (s.attempt == attempt and s.ended) for s in self._all)

    def anyone_stopping(self) -> bool:
        """Whether a node was told to stop."""
        return any(status.stopping for status in self._all)

    def anyone_preempted(self, attempt: int) -> bool:
        """Whether a rank has saved and wants to be started again."""
        return any(status.preempted == attempt for status in self._all)

    def begin_again(self, attempt: int) -> bool | None:
        """Whether this attempt, after a failed one, is to be made; None while node 0 has not decided.

        Node 0 decides, once no rank runs any more: not if a node was told to stop.
        """
        if self.node == 0:
            if self.anyone_stopping():
                return False
            self._meeting.clear_ranks_keys()
            self.say(attempt=attempt, ended=False)
            return True
        zero = self._all[0]
        return True if zero.attempt >= attempt else False if zero.left else None

    def host(self, node: int) -> str:
        """A node's name."""
        return self._meeting.hosts[node]


class LoneProcess:
    """The same for a run of one process, which has nobody to talk to."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._mine = Status()
        self._failures: list[Failure] = []

    def say(self, **changes: Any) -> None:
        """Change the record."""
        self._mine = replace(self._mine, **changes)

    def fail(self, attempt: int, rank: int, code: int) -> None:
        """Note a failure."""
        self._failures.append(Failure(attempt=attempt, node=0, rank=rank, code=code))

    def leave(self, trouble: str | None) -> None:
        """Nobody hears it."""

    def trouble(self) -> str | None:
        """Nothing can be wrong but the process itself."""
        return None

    def first_failure(self, attempt: int) -> Failure | None:
        """The failure of an attempt."""
        return next((failure for failure in self._failures if failure.attempt == attempt), None)

    def all_ended(self, attempt: int) -> bool:
        """There are no others."""
        return True

    def anyone_preempted(self, attempt: int) -> bool:
        """Whether the process has saved and wants to be started again."""
        return self._mine.preempted == attempt

    def begin_again(self, attempt: int) -> bool | None:
        """Unless it was told to stop."""
        return not self._mine.stopping

    def host(self, node: int) -> str:
        """This machine's name."""
        return self._host
