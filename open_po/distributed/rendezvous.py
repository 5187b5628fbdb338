"""Before a run of several nodes begins: they find one another and compare what each is about to do.

Node 0's launcher hosts a `TCPStore` for the whole life of the run, which the ranks use too. Whatever would make the
nodes train different things ends all of them with one line, the same on each.
"""

from __future__ import annotations

import errno
import json
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import TCPStore

from open_po.errors import UserError

OWN_KEYS = "launch/"  # all other keys of the store are the ranks'
# The verdict is written once, by whoever is first: the hosts if the run begins, else why it does not.
_CONNECTED, _GONE, _VERDICT = (f"{OWN_KEYS}{name}" for name in ("connected", "gone", "verdict"))
_POLL_SECONDS = 0.1
_KNOCK_SECONDS = 0.5
_STORE_TIMEOUT = timedelta(seconds=30)  # of one question to the store
_SHOWN = 4  # differences of one kind that a line names


def status_key(node: int) -> str:
    """Where a node says how it is."""
    return f"{OWN_KEYS}status/{node}"


def _facts_key(node: int) -> str:
    return f"{OWN_KEYS}facts/{node}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long launchers wait for one another, in seconds."""

    rendezvous: float = 600.0  # for all nodes to come
    silence: float = 30.0  # without a sign of life before a node counts as stopped
    farewell: float = 10.0  # of node 0 for the others to have heard the end
    poll: float = 1.0  # between signs of life


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node is about to do. All but its number and host must be the same on all."""

    node: int
    host: str
    nodes: int
    processes: int
    restarts: int
    code: Mapping[str, str]  # digest by file
    config: Mapping[str, Any]  # value by field
    versions: Mapping[str, str | None]  # by package
    token: str = field(default_factory=lambda: uuid.uuid4().hex)  # no two launchers write the same

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str | bytes) -> NodeFacts:
        """What `to_json` wrote."""
        return NodeFacts(**json.loads(text))


def difference(zero: NodeFacts, other: NodeFacts) -> str | None:
    """What keeps a node from training with node 0, in one line with the fix; None if nothing does."""
    there, here = f"node 0 ({zero.host})", f"node {other.node} ({other.host})"
    for name, mine, theirs in (
        ("NUM_NODES", zero.nodes, other.nodes),
        ("processes per node", zero.processes, other.processes),
        ("--restarts", zero.restarts, other.restarts),
    ):
        if mine != theirs:
            return f"{name}: {mine} on {there}, {theirs} on {here}; give all nodes the same"
    if files := _unequal(zero.code, other.code):
        return f"code: {_some(files)} differs between {there} and {here}; give all nodes the same checkout"
    if fields := _unequal(zero.config, other.config):
        values = [f"{name} is {_short(zero.config.get(name))} and {_short(other.config.get(name))}" for name in fields]
        return f"configuration: on {there} and {here}, {_some(values)}; give all nodes the same configuration and flags"
    if packages := _unequal(zero.versions, other.versions):
        values = [f"{name} {zero.versions.get(name)} and {other.versions.get(name)}" for name in packages]
        return f"packages: {there} and {here} have {_some(values)}; install the same versions on all nodes"
    return None


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _some(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# -------------------------------------------------------------------------------------------------------------- store


def host_store(port: int) -> tuple[TCPStore, int]:
    """A store that lives in this process for as long as it is kept, and its port; port 0 takes a free one.

    Raises UserError if the port cannot be had.
    """
    try:
        listening = _listen(port)
    except OSError as error:
        reason = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(
            f"MASTER_PORT {port}: cannot be opened on {socket.gethostname()}, {reason}; end what listens there "
            "(another launcher of NODE_RANK 0?), or give all nodes another MASTER_PORT"
        ) from error
    port = int(listening.getsockname()[1])
    descriptor = listening.detach()
    store = TCPStore("127.0.0.1", port, None, True, _STORE_TIMEOUT, False, master_listen_fd=descriptor)
    return store, port


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # else: IPv6 is switched off
                raise
    return socket.create_server(("", port), backlog=1024)


def reach_store(address: str, port: int, seconds: float) -> TCPStore:
    """The store that another process hosts. Raises UserError if nothing answers for so many `seconds`."""
    deadline = time.monotonic() + seconds
    while True:  # a socket of ours first: TCPStore would tell every try on stderr
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(5.0, seconds))).close()
            break
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"MASTER_ADDR {address}, MASTER_PORT {port}: nothing answers after {seconds:.0f} s ({reason}); is "
                    "the launcher of NODE_RANK 0 running at that address, with the same NUM_NODES and MASTER_PORT, and "
                    "does the firewall let the port through?"
                ) from error
        time.sleep(_KNOCK_SECONDS)
    try:
        return TCPStore(address, port, None, False, _STORE_TIMEOUT, False)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR {address}, MASTER_PORT {port}: something else than a launcher answers there; is that the "
            "address of NODE_RANK 0? If it is, give all nodes another MASTER_PORT"
        ) from error


# ---------------------------------------------------------------------------------------------------------- rendezvous


class Rendezvous:
    """A store that all nodes have reached, and their hosts in order."""

    def __init__(self, facts: NodeFacts, address: str, port: int, limits: Limits) -> None:
        self.facts, self.address, self.limits = facts, address, limits
        self.hosts = [facts.host]
        self._deadline = time.monotonic() + limits.rendezvous
        self._server: TCPStore | None = None
        if facts.node == 0:
            self._server, port = host_store(port)
        self.port = port
        # Node 0 too goes by the address: so it finds out when that leads to another node 0.
        self.store = reach_store(address, port, limits.rendezvous)

    def meet(self, status: str, say: Callable[[str], None]) -> None:
        """Wait until all nodes are here and agree; `status` is what each says of itself at first.

        Raises UserError, on every node that has come, if they cannot train together or one does not come.
        """
        try:
            self._enter(status)
            if self.facts.nodes > 1:
                say(f"{self.facts.host} is node {self.facts.node} of {self.facts.nodes}; waiting for the others")
            if self.facts.node == 0:
                self._await_all()
            else:
                self._await_verdict()
        except UserError:
            self._leave()
            raise
        except RuntimeError as error:  # the store's
            raise UserError(
                f"node 0 ({self.address}:{self.port}) has stopped before training began; its own line says why"
            ) from error

    def abandon(self, reason: str) -> None:
        """End the other nodes' wait too, where training has not begun."""
        with suppress(RuntimeError):  # the store has gone, and so will they
            self._decide(refusal=reason)
        self._leave()

    def _leave(self) -> None:
        """Node 0, which hosts the store, stays until the others have read in it why there is no run."""
        deadline = time.monotonic() + self.limits.farewell
        with suppress(RuntimeError):  # node 0 has left already
            self.store.add(_GONE, 1)
            while self._server is not None and time.monotonic() < deadline:
                if self.store.add(_GONE, 0) >= self.store.add(_CONNECTED, 0):
                    return
                time.sleep(_POLL_SECONDS)

    def _enter(self, status: str) -> None:
        facts = self.facts
        self.store.add(_CONNECTED, 1)
        if not 0 <= facts.node < facts.nodes:
            self._refuse(
                f"NODE_RANK {facts.node} on {facts.host}: is out of range, NUM_NODES is {facts.nodes}; nodes count "
                f"from 0 to {facts.nodes - 1}"
            )
        mine = facts.to_json()
        written = self.store.compare_set(_facts_key(facts.node), "", mine).decode()
        if written != mine:
            self._refuse(
                f"NODE_RANK {facts.node}: is given twice, to {NodeFacts.from_json(written).host} and to {facts.host}; "
                f"give each node its own, 0 to {facts.nodes - 1}"
            )
        if facts.node > 0:
            self._wait_for([_facts_key(0)])
            if problem := difference(self._facts_of(0), NodeFacts.from_json(mine)):
                self._refuse(problem)
        self.store.set(status_key(facts.node), status)  # which also says that this node agrees

    def _facts_of(self, node: int) -> NodeFacts:
        return NodeFacts.from_json(self.store.get(_facts_key(node)))

    def _decide(self, **verdict: Any) -> dict[str, Any]:
        """Write a verdict unless there is one; returns the one that holds."""
        held: dict[str, Any] = json.loads(self.store.compare_set(_VERDICT, "", json.dumps(verdict)))
        return held

    def _refuse(self, problem: str) -> NoReturn:
        """Raise `problem` here and, unless they train already, on the other nodes."""
        held = self._decide(refusal=problem)
        if "hosts" in held:
            raise UserError(f"the run at {self.address}:{self.port} has begun without this node: {problem}")
        raise UserError(held["refusal"])

    def _wait_for(self, keys: Sequence[str], more_seconds: float = 0.0) -> list[str]:
        """Until the keys are there; returns those that are not when the time is over. Raises what ends all nodes."""
        while missing := [key for key in keys if not self.store.check([key])]:
            if self.store.check([_VERDICT]):
                self._heed(json.loads(self.store.get(_VERDICT)))
            if time.monotonic() > self._deadline + more_seconds:
                break
            time.sleep(_POLL_SECONDS)
        return missing

    def _heed(self, verdict: dict[str, Any]) -> None:
        if "refusal" in verdict:
            raise UserError(verdict["refusal"])
        self.hosts = verdict["hosts"]

    def _await_all(self) -> None:
        nodes = range(self.facts.nodes)
        missing = self._wait_for([status_key(node) for node in nodes])
        absent = [str(node) for node in nodes if status_key(node) in missing]
        if absent:
            self._refuse(
                f"NODE_RANK {', '.join(absent)} of NUM_NODES {self.facts.nodes}: did not come to "
                f"{self.address}:{self.port} within {self.limits.rendezvous:.0f} s; start the same "
                "command on each node (RENDEZVOUS_SECONDS waits longer)"
            )
        self._heed(self._decide(hosts=[self._facts_of(node).host for node in nodes]))

    def _await_verdict(self) -> None:
        # Node 0 began to wait at another time than this node, and its line names who is missing.
        if self._wait_for([_VERDICT], more_seconds=self.limits.rendezvous):
            raise UserError(f"node 0 ({self.address}:{self.port}) has not begun; look at its output")
        self._heed(json.loads(self.store.get(_VERDICT)))

    def clear_ranks_keys(self) -> None:
        """Forget what the ranks have written, so that new ones find an empty store. All of them must have ended."""
        for key in self.store.list_keys():
            if not key.startswith(OWN_KEYS):
                self.store.delete_key(key)
