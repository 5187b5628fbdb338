"""The launcher with small programs in place of training: where nodes meet, fail and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from open_po.commands import launch, node_facts
from open_po.commands.local_ranks import Patience
from open_po.commands.node_run import NodeRun
from open_po.commands.place import Place, expand_hosts, interface_to, is_rank, read_place
from open_po.config import RunConfig, load_config
from open_po.distributed.rendezvous import Limits
from open_po.errors import UserError
from tests import cli, tiny

SHORT = Limits(rendezvous=15, silence=1.5, farewell=3, poll=0.1)
HASTY = Patience(by_themselves=1, after_first=0.5, after_second=0.5)
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(["--model_name_or_path", "model", "--mixer_list", "data", "1.0"])


@dataclass
class Launcher:
    """A launcher in a fork of this process, with its output in files."""

    pid: int
    folder: Path
    code: int | None = None

    def wait(self, seconds: float = 20) -> tuple[int, list[str]]:
        """Exit code (minus a signal) and the lines on stderr; fails the test if it does not end."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            child, status = os.waitpid(self.pid, os.WNOHANG)
            if child:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                pytest.fail(f"still running after {seconds} s: {self.stderr()}")
            time.sleep(0.02)
        return self.code, self.stderr()

    def stderr(self) -> list[str]:
        """Without what the C++ of the store adds where a test has imported torch before `__main__` silences it."""
        lines = (self.folder / "stderr").read_text().splitlines()
        return [line for line in lines if line.startswith("error: ")]

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


@dataclass
class Cluster:
    """Launchers of one test; none outlives it."""

    folder: Path
    config: RunConfig
    port: int
    launchers: list[Launcher] = field(default_factory=list)

    def start(
        self,
        program: str,
        *arguments: object,
        prepare: Callable[[], object] = lambda: None,
        limits: Limits = SHORT,
        restarts: int = 0,
        config: RunConfig | None = None,
        **place: Any,
    ) -> Launcher:
        """A launcher whose ranks run `program`, which finds `sys`, `os` and `time` imported."""
        where = {"nodes": 2, "node": 0, "address": "127.0.0.1", "port": self.port, "processes": 1, "devices": False}
        code = f"import json, os, signal, sys, time\n{program}"
        node = NodeRun(
            place=Place(**{**where, **place}),
            command=[sys.executable, "-S", "-c", code, str(self.folder), *map(str, arguments)],
            config=config or self.config,
            restarts=restarts,
            limits=limits,
            patience=HASTY,
        )
        folder = self.folder / f"launcher{len(self.launchers)}"
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        self.launchers.append(Launcher(_fork(node, folder, prepare), folder))
        return self.launchers[-1]

    def await_files(self, *names: str, seconds: float = 15) -> None:
        """Until the ranks have written these."""
        deadline = time.monotonic() + seconds
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, [launcher.stderr() for launcher in self.launchers]
            time.sleep(0.02)


def _fork(node: NodeRun, folder: Path, prepare: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        prepare()
        code = launch.guarded(node.run)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture
def cluster(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    digests = node_facts.code_digests()  # one for all launchers, though a file may be edited while they start
    monkeypatch.setattr(node_facts, "code_digests", lambda: digests)
    cluster = Cluster(tmp_path, config, cli._free_port())
    yield cluster
    for launcher in cluster.launchers:
        if launcher.code is None:
            with suppress(ProcessLookupError, ChildProcessError):
                launcher.kill()
                os.waitpid(launcher.pid, 0)


# Writes its environment, then ends well.
REPORT = "open(f'{sys.argv[1]}/rank{os.environ.get(\"RANK\", \"0\")}', 'w').write(json.dumps(dict(os.environ)))"
# Says that it is there, and stays.
STAY = "open(f'{sys.argv[1]}/rank{os.environ.get(\"RANK\", \"0\")}', 'w').write(str(os.getpid()))\ntime.sleep(60)"
# Saves and ends with 75 on the first signal.
SAVE = f"""
def save(number, frame):
    open(f'{{sys.argv[1]}}/saved{{os.environ.get("RANK", "0")}}', 'w').write(str(number))
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
{STAY}"""


# ---------------------------------------------------------------------------------------------------------- all is well


def test_ranks_get_their_place(cluster: Cluster) -> None:
    nodes = [cluster.start(REPORT, node=node, processes=2) for node in (0, 1)]
    assert [node.wait() for node in nodes] == [(0, []), (0, [])]
    found = [json.loads((cluster.folder / f"rank{rank}").read_text()) for rank in range(4)]
    for rank, environment in enumerate(found):
        assert environment["RANK"] == str(rank)
        assert environment["LOCAL_RANK"] == str(rank % 2)
        assert environment["GROUP_RANK"] == str(rank // 2)
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", str(cluster.port))
        assert environment["TORCHELASTIC_USE_AGENT_STORE"] == "True"
        assert environment["TORCHELASTIC_RESTART_COUNT"] == "0"
        assert environment["GLOO_SOCKET_IFNAME"] == "lo"
        assert environment["NCCL_SOCKET_IFNAME"] == "=lo"
        assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert "2 nodes x 2 CPU processes" in nodes[0].stdout()
    assert "global batch 128 = 4 x 8 x 4 pairs" in nodes[0].stdout()


def test_one_process_is_started_as_by_hand(cluster: Cluster) -> None:
    assert cluster.start(REPORT, nodes=1).wait() == (0, [])
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(json.loads((cluster.folder / "rank0").read_text()))


def test_what_is_set_by_hand_stays(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    assert cluster.start(REPORT, nodes=1, port=0, processes=2).wait() == (0, [])
    found = json.loads((cluster.folder / "rank1").read_text())
    assert {name: found[name] for name in mine} == mine


# A real group over the launcher's store: a rank dies in the first attempt, and the second must find no trace of it.
JOIN = """
sys.path[:0] = json.loads(sys.argv[2])
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(os.environ["RANK"]) + 1])
dist.all_reduce(total)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
open(f'{sys.argv[1]}/sum{attempt}{os.environ["RANK"]}', "w").write(str(total.item()))
if attempt == "0" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_join_by_the_launchers_store_and_again_after_a_failure(cluster: Cluster) -> None:
    paths = json.dumps(sys.path)
    nodes = [cluster.start(JOIN, paths, node=node, restarts=1) for node in (0, 1)]
    assert [node.wait(60) for node in nodes] == [(0, []), (0, [])]
    for name in ("00", "01", "10", "11"):
        assert (cluster.folder / f"sum{name}").read_text() == "3.0"
    assert f"rank 1 on node 1 ({HOST}) was ended by SIGKILL" in nodes[0].stdout()
    assert "starting all ranks again (1 of 1)" in nodes[1].stdout()


# ---------------------------------------------------------------------------------------------- nodes that do not match


def both_refuse(cluster: Cluster, one: Launcher, two: Launcher) -> str:
    """The line with which two launchers end before a rank has started; the same on both."""
    found = [one.wait(), two.wait()]
    assert found[0][0] == 1
    assert found[0] == found[1]
    assert not list(cluster.folder.glob("rank*"))
    (line,) = found[0][1]
    return line


def test_a_node_number_given_twice(cluster: Cluster) -> None:
    zero = cluster.start(REPORT, nodes=3)
    one, two = (cluster.start(REPORT, nodes=3, node=1) for _ in range(2))
    line = both_refuse(cluster, one, two)
    assert line == f"error: NODE_RANK 1: is given twice, to {HOST} and to {HOST}; give each node its own, 0 to 2"
    assert zero.wait() == (1, [line])


def test_a_node_number_out_of_range(cluster: Cluster) -> None:
    line = both_refuse(cluster, cluster.start(REPORT), cluster.start(REPORT, node=2))
    assert line == f"error: NODE_RANK 2 on {HOST}: is out of range, NUM_NODES is 2; nodes count from 0 to 1"


@pytest.mark.parametrize(
    ("place", "expected"),
    [({"nodes": 3}, "NUM_NODES: 2 on node 0"), ({"processes": 2}, "processes per node: 1 on node 0")],
)
def test_nodes_of_another_size(cluster: Cluster, place: dict[str, int], expected: str) -> None:
    line = both_refuse(cluster, cluster.start(REPORT), cluster.start(REPORT, node=1, **place))
    assert line.startswith(f"error: {expected} ({HOST}), ")
    assert line.endswith("; give all nodes the same")


def test_another_configuration(cluster: Cluster, config: RunConfig) -> None:
    other = replace(config, train=replace(config.train, learning_rate=1e-6, seed=7))
    line = both_refuse(cluster, cluster.start(REPORT), cluster.start(REPORT, node=1, config=other))
    assert line == (
        f"error: configuration: on node 0 ({HOST}) and node 1 ({HOST}), learning_rate is 5e-07 and 1e-06, seed is 42 "
        "and 7; give all nodes the same configuration and flags"
    )


def test_other_code(cluster: Cluster) -> None:
    def changed() -> None:
        digests = node_facts.code_digests() | {"open_po/losses/formulas.py": "other"}
        node_facts.code_digests = lambda: digests

    line = both_refuse(cluster, cluster.start(REPORT), cluster.start(REPORT, node=1, prepare=changed))
    assert line == (
        f"error: code: open_po/losses/formulas.py differs between node 0 ({HOST}) and node 1 ({HOST}); give all nodes "
        "the same checkout"
    )


def test_other_packages(cluster: Cluster) -> None:
    def older() -> None:
        version = node_facts._version
        node_facts._version = lambda name: "2.0.1" if name == "torch" else version(name)

    line = both_refuse(cluster, cluster.start(REPORT), cluster.start(REPORT, node=1, prepare=older))
    assert f"node 0 ({HOST}) and node 1 ({HOST}) have torch 2." in line
    assert "and 2.0.1; install the same versions on all nodes" in line


def test_other_restarts(cluster: Cluster) -> None:
    line = both_refuse(cluster, cluster.start(REPORT), cluster.start(REPORT, node=1, restarts=1))
    assert line.startswith("error: --restarts: 0 on node 0")


def test_a_node_that_never_comes(cluster: Cluster) -> None:
    limits = replace(SHORT, rendezvous=1.5)
    nodes = [cluster.start(REPORT, nodes=4, node=node, limits=limits) for node in (0, 2)]
    line = both_refuse(cluster, *nodes)
    assert line.startswith(f"error: NODE_RANK 1, 3 of NUM_NODES 4: did not come to 127.0.0.1:{cluster.port} within 2 s")


def test_a_master_that_cannot_be_reached(cluster: Cluster) -> None:
    code, lines = cluster.start(REPORT, node=1, limits=replace(SHORT, rendezvous=1)).wait()
    assert code == 1
    assert lines[0].startswith(
        f"error: MASTER_ADDR 127.0.0.1, MASTER_PORT {cluster.port}: nothing answers after 1 s (Connection refused); is "
    )
    code, lines = cluster.start(
        REPORT, node=1, address="no.such.host.invalid", limits=replace(SHORT, rendezvous=1)
    ).wait()
    assert "error: MASTER_ADDR no.such.host.invalid, MASTER_PORT" in lines[0]


def test_a_port_that_is_taken(cluster: Cluster) -> None:
    with socket.create_server(("", cluster.port)):
        code, (line,) = cluster.start(REPORT).wait()
    assert code == 1
    assert line.startswith(f"error: MASTER_PORT {cluster.port}: cannot be opened on {HOST}, it is taken; ")


def test_a_latecomer_does_not_disturb_a_run(cluster: Cluster) -> None:
    nodes = [cluster.start(SAVE, node=node) for node in (0, 1)]
    cluster.await_files("rank0", "rank1")
    code, (line,) = cluster.start(REPORT, node=1).wait()
    assert code == 1
    assert "has begun without this node: NODE_RANK 1: is given twice" in line
    for node in nodes:
        node.kill(signal.SIGUSR1)
    assert [node.wait() for node in nodes] == [(75, []), (75, [])]


# ----------------------------------------------------------------------------------------------------- what stops a run


def test_a_killed_rank_ends_both_nodes(cluster: Cluster) -> None:
    nodes = [cluster.start(STAY, node=node, processes=2) for node in (0, 1)]
    cluster.await_files("rank0", "rank1", "rank2", "rank3")
    time.sleep(0.1)
    os.kill(int((cluster.folder / "rank2").read_text()), signal.SIGKILL)
    line = f"error: rank 2 on node 1 ({HOST}) was ended by SIGKILL, as the system does when memory runs out"
    assert [node.wait() for node in nodes] == [(137, [line]), (137, [line])]


def test_the_code_of_the_rank_that_failed_first(cluster: Cluster) -> None:
    fail = "time.sleep(2 * (os.environ['RANK'] == '0'))\nsys.exit(3 if os.environ['RANK'] == '1' else 4)"
    nodes = [cluster.start(fail, node=node) for node in (0, 1)]
    line = f"error: rank 1 on node 1 ({HOST}) ended with exit code 3; its own line says why"
    assert [node.wait() for node in nodes] == [(3, [line]), (3, [line])]


def test_a_rank_that_heeds_no_signal_is_killed(cluster: Cluster) -> None:
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif os.environ['RANK'] == '1': sys.exit(1)\n{STAY}"
    code, lines = cluster.start(deaf, nodes=1, port=0, processes=2).wait()
    assert (code, len(lines)) == (1, 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_launcher_ends_the_other_node(cluster: Cluster, victim: int) -> None:
    nodes = [cluster.start(STAY, node=node) for node in (0, 1)]
    cluster.await_files("rank0", "rank1")
    time.sleep(0.3)
    nodes[victim].kill()
    start = time.monotonic()
    code, (line,) = nodes[1 - victim].wait()
    assert code == 1
    assert line.startswith(f"error: node {victim} ({HOST}) has stopped: ")
    assert time.monotonic() - start < 8
    for rank in (0, 1):  # nor does a rank outlive its launcher
        assert not _runs(int((cluster.folder / f"rank{rank}").read_text()))


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_a_node_that_stands_still_counts_as_stopped(cluster: Cluster) -> None:
    """As one that has lost its power or network: nothing closes, nothing answers."""
    nodes = [cluster.start(STAY, node=node) for node in (0, 1)]
    cluster.await_files("rank0", "rank1")
    time.sleep(0.3)
    nodes[0].kill(signal.SIGSTOP)
    try:
        code, (line,) = nodes[1].wait()
    finally:
        nodes[0].kill(signal.SIGCONT)
    assert code == 1
    assert line.startswith(f"error: node 0 ({HOST}) has stopped: no answer from 127.0.0.1:{cluster.port} for ")
    assert nodes[0].wait()[0] == 1


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_75_comes_back(cluster: Cluster, number: int) -> None:
    nodes = [cluster.start(SAVE, node=node, restarts=1) for node in (0, 1)]
    cluster.await_files("rank0", "rank1")
    for node in nodes:
        node.kill(number)
    assert [node.wait() for node in nodes] == [(75, []), (75, [])]
    assert [(cluster.folder / f"saved{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


def test_each_signal_is_passed_on(cluster: Cluster) -> None:
    program = f"signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))\n{STAY}"
    lone = cluster.start(program.replace("time.sleep(60)", "[time.sleep(0.1) for _ in range(600)]"), nodes=1)
    cluster.await_files("rank0")
    lone.kill(signal.SIGTERM)
    time.sleep(0.5)
    assert _runs(int((cluster.folder / "rank0").read_text()))
    lone.kill(signal.SIGTERM)
    assert lone.wait() == (143, [f"error: rank 0 on node 0 ({HOST}) was ended by SIGTERM"])


def test_ctrl_c_ends_with_130(cluster: Cluster) -> None:
    program = f"signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n{STAY}"
    node = cluster.start(program, nodes=1, port=0, processes=2, restarts=1)
    cluster.await_files("rank0", "rank1")
    node.kill(signal.SIGINT)
    assert node.wait() == (130, [])  # the ranks have their own line


def test_a_signal_before_training_ends_the_others_wait(cluster: Cluster) -> None:
    nodes = [cluster.start(REPORT, nodes=3, node=node) for node in (0, 1)]
    deadline = time.monotonic() + 10
    while not all("waiting for the others" in node.stdout() for node in nodes):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    nodes[1].kill(signal.SIGTERM)
    line = f"error: node 1 ({HOST}) was stopped by SIGTERM"
    assert nodes[1].wait() == (75, [f"{line}; the same command goes on from here"])
    assert nodes[0].wait() == (1, [f"{line} before training began"])


# ------------------------------------------------------------------------------------------------------------- restarts

COUNT = """
count = len([name for name in os.listdir(sys.argv[1]) if name.startswith("try")])
open(f"{sys.argv[1]}/try{count}", "w")
codes = json.loads(sys.argv[2])
sys.exit(codes[count])
"""


@pytest.mark.parametrize(
    ("codes", "restarts", "expected"),
    [([1, 0], 1, 0), ([1, 5, 0], 1, 5), ([1, 1, 0], 2, 0), ([2, 0], 1, 2), ([75, 0], 1, 75), ([130, 0], 1, 130)],
)
def test_a_failed_process_starts_again(cluster: Cluster, codes: list[int], restarts: int, expected: int) -> None:
    code, _ = cluster.start(COUNT, json.dumps(codes), nodes=1, restarts=restarts).wait()
    assert code == expected


def test_restarts_want_a_run_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--restarts", "2", "--model_name_or_path", "m", "--mixer_list", "d", "1.0"]
    assert launch.main(words) == 2
    assert capsys.readouterr().err == (
        "config error: --restarts 2: needs resume_from_checkpoint auto, without which a run does not go on; add it\n"
    )


# --------------------------------------------------------------------------------------------------- which node this is

SLURM = {
    "SLURM_JOB_ID": "412345",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[007-010]",
    "SLURM_GPUS_ON_NODE": "8",
}
HAND = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "GPUS_PER_NODE": "8"}


def place_of(environment: dict[str, str], visible: int = 8) -> tuple[int, int, str, int, int]:
    place = read_place(environment, visible)
    return place.nodes, place.node, place.address, place.port, place.processes


def test_places() -> None:
    assert place_of(HAND) == (2, 1, "10.0.0.1", 1234, 8)
    assert place_of(SLURM) == (4, 2, "gpu007", 15000 + 412345 % 15000, 8)
    assert place_of(SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "b2,b3"})[::2] == (2, "b2", 8)
    assert place_of(SLURM | HAND) == (2, 1, "10.0.0.1", 1234, 8)
    assert place_of({}) == (1, 0, "127.0.0.1", 0, 8)
    assert place_of({}, visible=0)[4] == 1
    assert place_of({"PROCESSES_PER_NODE": "3"}, visible=0)[4] == 3


@pytest.mark.parametrize(
    ("environment", "visible", "line"),
    [
        (HAND | {"NUM_NODES": "two"}, 8, "NUM_NODES two: must be a whole number from 1"),
        (HAND | {"NODE_RANK": ""}, 8, "NODE_RANK: is required with NUM_NODES; give each node its own, from 0"),
        (HAND | {"MASTER_ADDR": ""}, 8, "MASTER_ADDR: is required with NUM_NODES 2; set it to node 0's address on all"),
        (HAND | {"MASTER_PORT": "70000"}, 8, "MASTER_PORT 70000: must be below 65536"),
        ({"NODE_RANK": "1"}, 8, "NODE_RANK 1: needs NUM_NODES"),
        (HAND, 4, "GPUS_PER_NODE 8: this node has 4 GPUs that torch sees"),
        (SLURM, 0, "SLURM_GPUS_ON_NODE 8: this node has 0 GPUs"),
        ({"PROCESSES_PER_NODE": "4"}, 2, "PROCESSES_PER_NODE 4: this node has 2 GPUs"),
        ({"PROCESSES_PER_NODE": "4", "GPUS_PER_NODE": "4"}, 4, "PROCESSES_PER_NODE: contradicts GPUS_PER_NODE"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "32"}, 8, "SLURM_STEP_NUM_TASKS 32: the launcher starts a node's processes"),
    ],
)
def test_places_that_are_none(environment: dict[str, str], visible: int, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_place(environment, visible)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a[1-3,7],b2", ["a1", "a2", "a3", "a7", "b2"]),
        ("gpu[008-011]", ["gpu008", "gpu009", "gpu010", "gpu011"]),
        ("r[1-2]n[3,5]x", ["r1n3x", "r1n5x", "r2n3x", "r2n5x"]),
        ("one", ["one"]),
        ("a-1,b-[2]", ["a-1", "b-2"]),
    ],
)
def test_slurms_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_a_list_of_hosts_that_cannot_be_read() -> None:
    with pytest.raises(UserError, match="cannot be read; set MASTER_ADDR"):
        expand_hosts("a[x-3]")


def test_who_is_a_rank_already() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    assert is_rank(torchrun)
    assert is_rank(torchrun | SLURM | HAND)
    assert is_rank({"RANK": "3", "WORLD_SIZE": "8"})
    assert not is_rank({"RANK": "1", "WORLD_SIZE": "2"} | HAND)  # a cluster that numbers nodes so
    assert not is_rank(HAND)


def test_under_torchrun_the_process_trains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    called: list[Sequence[str]] = []

    def execute(program: str, words: Sequence[str]) -> None:
        called.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execute)
    words = ["--model_name_or_path", "m", "--mixer_list", "d", "1.0"]
    with pytest.raises(SystemExit):
        launch.main(words)
    assert called == [[sys.executable, str(cli.REPOSITORY / "dpo_tune_cache.py"), *words]]


def test_the_interface_on_the_way() -> None:
    assert interface_to("127.0.0.1", many_nodes=False) == "lo"
    assert interface_to("no.such.host.invalid", many_nodes=True) is None


# ------------------------------------------------------------------------------------------------------------- dry runs


def dry_run(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert launch.main(["--dry-run", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def line_of(lines: Sequence[str], name: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"{name}: ")]
    return line.removeprefix(f"{name}: ")


def test_a_dry_run_counts_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(100))
    monkeypatch.setenv("PROCESSES_PER_NODE", "2")

    def steps(amount: str, *more: object) -> str:
        words = ["--model_name_or_path", "m", "--per_device_train_batch_size", 2, "--mixer_list", *amount.split()]
        return line_of(dry_run(capsys, *words, *more), "Steps")

    assert steps(f"{data} 1.0") == "4 = 1 x ceil(pairs / 32) with 100 pairs, if each row gives one"
    assert steps(f"{data} 0.3", "--num_epochs", 3).startswith("3 = 3 x ceil(pairs / 32) with 30 pairs")
    assert steps(f"{data} 64 hub/name 1000").startswith("34 = 1 x ceil(pairs / 32) with 1064 pairs")
    assert steps(f"{data} 1.0", "--max_train_samples", 10).startswith("1 = ")
    assert steps(f"{data} 1.0", "--max_train_steps", 3).startswith("3 (max_train_steps), of 4 = ")
    assert steps("hub/name 1.0", "--pairs", 320).startswith("10 = 1 x ceil(pairs / 32) with 320 pairs")
    assert steps("hub/name 1.0", "--max_train_steps", 7) == "7 at most (max_train_steps), else 1 x ceil(pairs / 32)"
    assert steps("hub/name 1.0").startswith("1 x ceil(pairs / 32); the pairs of hub/name are not counted here")


def test_a_dry_run_prints_commands_that_start_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands, pasted into two shells, reach the same handshake."""
    for name, value in {"NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1", "PROCESSES_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(cli._free_port()))
    lines = dry_run(capsys, "--model_name_or_path", tmp_path / "a b", "--mixer_list", "d", "1.0")
    commands = [lines[lines.index(f"Node {node}:") + 1].strip() for node in (0, 1)]
    assert commands[1] == (
        f"NUM_NODES=2 NODE_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={os.environ['MASTER_PORT']} PROCESSES_PER_NODE=2 "
        f"bash scripts/train/launch.sh --model_name_or_path '{tmp_path}/a b' --mixer_list d 1.0"
    )
    ranks = [line.strip() for line in lines if "dpo_tune_cache.py" in line]
    assert [line.split()[:2] for line in ranks] == [["RANK=0", "LOCAL_RANK=0"], ["RANK=2", "LOCAL_RANK=0"]]


def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_name_or_path", "m", "--mixer_list", "d", "1.0"]
    assert launch.main([*words, "--pairs", "3"]) == 2
    assert "--pairs 3: belongs to --dry-run" in capsys.readouterr().err
    assert launch.main([*words, "--restarts", "-1"]) == 2
    assert "--restarts: must not be below 0, got -1" in capsys.readouterr().err
    assert launch.main(["--dry-run", "--learning_rat", "1"]) == 2
    assert "did you mean learning_rate" in capsys.readouterr().err


def test_a_dry_run_shows_the_configuration_and_what_is_to_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = ("--dataset_mixer_list", "d", "1.0", "--dpo_beta", 0.3, "--packing")
    lines = dry_run(capsys, "--model_name_or_path", "m", *theirs)
    (note,) = (line for line in lines if line.startswith("Note: "))
    assert note.startswith("Note: packing true: pairs are always packed")
    shown = lines[lines.index("Configuration, where it is not the default:") + 1 :]
    assert {"  model_name_or_path: m", "  - d", "  - '1.0'", "  beta: 0.3"} <= set(shown)
    assert not any(line.startswith("  learning_rate") for line in shown)
