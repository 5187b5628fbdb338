"""One node's part of a run: it meets the other nodes, starts its ranks, watches all, and comes to an exit code."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from open_po.commands.local_ranks import LocalRanks, Patience
from open_po.commands.node_facts import facts_of
from open_po.commands.place import Place, cores, interface_to
from open_po.config import RunConfig
from open_po.distributed.node_watch import Failure, LoneProcess, NodeWatch, Status
from open_po.distributed.rendezvous import Limits, Rendezvous
from open_po.errors import ConfigError, NotUploadedError, UserError

PREEMPTED = os.EX_TEMPFAIL  # 75: a rank has saved after a signal, and the same command goes on from there
INTERRUPTED = 130
_NEVER_RESTARTED = (PREEMPTED, INTERRUPTED, ConfigError.exit_code, NotUploadedError.exit_code)
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # which some clusters set for nodes
_POLL_SECONDS = 0.1


class _StoppedError(Exception):
    """A signal came while no rank was there to be told of it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(kw_only=True)
class NodeRun:
    """The ranks of this node among those of all nodes."""

    place: Place
    command: Sequence[str]  # of a rank
    config: RunConfig
    restarts: int = 0  # how often failed ranks are started again
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    _ranks: LocalRanks = field(init=False)
    _meeting: Rendezvous | None = None
    _watch: NodeWatch | LoneProcess = field(init=False)
    _signals: list[int] = field(default_factory=list)  # that came and are not passed on yet
    _training: bool = False  # whether ranks have been started
    _told_to_stop: bool = False  # by a signal

    def run(self) -> int:
        """Start the ranks and stay until those of all nodes have ended; returns the exit code.

        Raises UserError if the nodes cannot train together, or one of them stops.
        """
        self._ranks = LocalRanks(patience=self.patience)
        for number in _PASSED_ON:
            signal.signal(number, self._on_signal)
        try:
            self._meet()
            return self._train()
        except _StoppedError as stopped:
            host = socket.gethostname()
            reason = f"node {self.place.node} ({host}) was stopped by {signal.Signals(stopped.number).name}"
            if self._meeting is not None and not self._training:
                self._meeting.abandon(f"{reason} before training began")
            print(f"error: {reason}; the same command goes on from here", file=sys.stderr)
            return INTERRUPTED if stopped.number == signal.SIGINT else PREEMPTED

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self._training:
            raise _StoppedError(number)
        self._signals.append(number)  # passed on by the loop, since ranks may be starting right now

    def _meet(self) -> None:
        place = self.place
        if place.ranks == 1:
            self._watch = LoneProcess(socket.gethostname())
            return
        facts = facts_of(place, self.config, self.restarts)
        self._meeting = Rendezvous(facts, place.address, place.port, self.limits)
        self._meeting.meet(Status().to_json(), _say)
        self._watch = NodeWatch(self._meeting)
        train = self.config.train
        per_rank = train.pairs_of_rank
        if place.node == 0:
            _say(
                f"{place} ({', '.join(self._meeting.hosts)}); global batch "
                f"{per_rank * place.ranks} = {train.per_device_train_batch_size} x "
                f"{train.gradient_accumulation_steps} x {place.ranks} pairs"
            )

    def _train(self) -> int:
        """Attempts, until one is the last; returns the exit code."""
        self._training = True
        attempt, trouble = 0, None
        try:
            while True:
                self._attempt(attempt)
                failure = self._watch.first_failure(attempt)
                if failure is None:
                    return PREEMPTED if self._watch.anyone_preempted(attempt) else 0
                code = 128 - failure.code if failure.code < 0 else failure.code
                if attempt >= self.restarts or code in _NEVER_RESTARTED or not self._agree_on(attempt + 1):
                    self._tell(failure)
                    return code
                attempt += 1
                _say(f"{self._described(failure)}; starting all ranks again ({attempt} of {self.restarts})")
        except UserError as error:
            trouble = str(error)
            raise
        finally:
            self._ranks.kill()  # runs only after an error of the launcher's own
            self._watch.leave(trouble)

    def _attempt(self, attempt: int) -> None:
        """Start the ranks; return when none runs any more on any node. Raises UserError if a node has stopped."""
        self._watch.say(attempt=attempt, ended=False)
        self._ranks.start(self.command, self._environments(attempt))
        trouble: str | None = None
        while self._ranks.children:
            self._heed_signals()
            for number, code in self._ranks.ended().items():
                self._note(attempt, self.place.node * self.place.processes + number, code)
            trouble = trouble or self._watch.trouble()
            if trouble:  # the ranks have had the time in which a node counts as stopped
                self._ranks.end(at_once=True)
            elif self._watch.first_failure(attempt) or self._watch.anyone_preempted(attempt):
                self._ranks.end()  # one that waits for the others in a collective hears no signal
            time.sleep(_POLL_SECONDS)
        self._watch.say(ended=True)
        while not trouble and not self._watch.all_ended(attempt):
            self._wait()
        if trouble:
            raise UserError(trouble)

    def _agree_on(self, attempt: int) -> bool:
        """Whether all nodes begin another attempt."""
        while (decision := self._watch.begin_again(attempt)) is None:
            self._wait()
        return decision

    def _wait(self) -> None:
        """A moment, without ranks. Raises UserError if a node has stopped."""
        self._heed_signals()
        if trouble := self._watch.trouble():
            raise UserError(trouble)
        time.sleep(_POLL_SECONDS)

    def _heed_signals(self) -> None:
        """Pass signals on. Without ranks the first one waits for those of a next attempt, the second ends the wait."""
        if self._signals:
            self._told_to_stop = True
            self._watch.say(stopping=True)
        while self._signals and self._ranks.children:
            self._ranks.send(self._signals.pop(0))
        if len(self._signals) > 1:
            raise _StoppedError(self._signals[-1])

    def _note(self, attempt: int, rank: int, code: int) -> None:
        if code == PREEMPTED:
            self._watch.say(preempted=attempt)
        elif code != 0:
            self._watch.fail(attempt, rank, code)

    def _tell(self, failure: Failure) -> None:
        """One line on why the run ends, unless that is known here: from a lone process's own line, or by Ctrl-C."""
        known = self.place.ranks == 1 and failure.code > 0
        if not known and not (failure.code == INTERRUPTED and self._told_to_stop):
            print(f"error: {self._described(failure)}", file=sys.stderr)

    def _described(self, failure: Failure) -> str:
        rank = f"rank {failure.rank} on node {failure.node} ({self._watch.host(failure.node)})"
        if failure.code < 0:
            name = signal.Signals(-failure.code).name
            why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            return f"{rank} was ended by {name}{why}"
        if failure.code == INTERRUPTED:
            return f"{rank} was interrupted"
        return f"{rank} ended with exit code {failure.code}; its own line says why"

    def _environments(self, attempt: int) -> list[dict[str, str]]:
        """Of each rank of this node."""
        place, common = self.place, dict(os.environ)
        for name in _OF_A_RANK:
            common.pop(name, None)
        if self._meeting is None:
            return [common]
        common |= {
            "WORLD_SIZE": str(place.ranks),
            "LOCAL_WORLD_SIZE": str(place.processes),
            "GROUP_RANK": str(place.node),
            "MASTER_ADDR": place.address,
            "MASTER_PORT": str(self._meeting.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher's store, as torchrun's workers use their agent's
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        if place.processes > 1:
            common.setdefault("OMP_NUM_THREADS", str(max(1, cores() // place.processes)))
        interface = interface_to(place.address, many_nodes=place.nodes > 1)
        if interface is not None:
            common.setdefault("GLOO_SOCKET_IFNAME", interface)
            if place.nodes > 1:
                common.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # that one, not all that begin so
        first = place.node * place.processes
        return [common | {"RANK": str(first + n), "LOCAL_RANK": str(n)} for n in range(place.processes)]


def _say(line: str) -> None:
    print(f"Launch: {line}", flush=True)
