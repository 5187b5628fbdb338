"""Which node this is, of how many, and how they reach one another: from the environment."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from open_po.errors import UserError

DEFAULT_PORT = 29500
NODE_0 = "ADDRESS_OF_NODE_0"  # stands for it in a dry run that was not told
_SCONTROL_SECONDS = 20
_UNROUTED = "192.0.2.1"  # an address of no machine; asking for the way there sends nothing


@dataclass(frozen=True, kw_only=True)
class Place:
    """This node among the nodes of a run."""

    nodes: int
    node: int
    address: str  # of node 0
    port: int  # 0: one node, which takes a free one
    processes: int  # on each node
    devices: bool  # whether each process has a GPU

    @property
    def ranks(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes

    def __str__(self) -> str:
        kind = "GPU" if self.devices else "CPU"
        return f"{counted(self.nodes, 'node')} x {counted(self.processes, f'{kind} process', 'es')}"


def counted(count: int, noun: str, plural: str = "s") -> str:
    """`1 node`, `2 nodes`."""
    return f"{count} {noun}{'' if count == 1 else plural}"


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or `accelerate launch` has started this process as one of a run's ranks.

    They set LOCAL_RANK. Some clusters set RANK and WORLD_SIZE for nodes; there NUM_NODES says that a launcher is meant.
    """
    started = bool(environment.get("RANK") and environment.get("WORLD_SIZE"))
    named = environment.get("NUM_NODES") or environment.get("SLURM_JOB_ID")
    return started and bool(environment.get("LOCAL_RANK") or not named)


def read_place(environment: Mapping[str, str], visible: int, *, dry: bool = False) -> Place:
    """This node's place; `visible` GPUs are there. A dry run is of no particular node and needs no GPU.

    Raises UserError for what is missing or contradicts.
    """
    slurm = environment.get("SLURM_JOB_ID")
    nodes = _number(environment, 1, "NUM_NODES", *_SLURM_NODES, least=1)
    processes, devices = _processes(environment, visible, dry)
    if nodes == 1 and not dry:
        if environment.get("NODE_RANK", "0").strip() not in ("", "0"):
            raise UserError(f"NODE_RANK {environment['NODE_RANK']}: needs NUM_NODES, the number of nodes; set both")
        return Place(nodes=1, node=0, address="127.0.0.1", port=0, processes=processes, devices=devices)
    if slurm and not dry:
        _refuse_many_tasks(environment, nodes)
    node = _number(environment, 0 if dry else None, "NODE_RANK", "SLURM_NODEID", least=None)
    address = environment.get("MASTER_ADDR") or _first_slurm_host(environment) or (NODE_0 if dry else "")
    if not address:
        raise UserError(f"MASTER_ADDR: is required with NUM_NODES {nodes}; set it to node 0's address on all nodes")
    # From the number, so that jobs on one machine differ; below the ports that systems hand out by themselves.
    default = 15000 + int(slurm) % 15000 if slurm and slurm.isdigit() else DEFAULT_PORT
    port = _number(environment, default, "MASTER_PORT", least=1)
    if port > 65535:
        raise UserError(f"MASTER_PORT {port}: must be below 65536")
    return Place(nodes=nodes, node=node, address=address, port=port, processes=processes, devices=devices)


def _number(environment: Mapping[str, str], default: int | None, *names: str, least: int | None) -> int:
    """The first of the variables that is set."""
    for name in names:
        if text := environment.get(name, "").strip():
            if not re.fullmatch(r"-?\d+", text) or (least is not None and int(text) < least):
                raise UserError(f"{name} {text}: must be a whole number" + ("" if least is None else f" from {least}"))
            return int(text)
    if default is None:
        raise UserError(f"{names[0]}: is required with NUM_NODES; give each node its own, from 0")
    return default


def _processes(environment: Mapping[str, str], visible: int, dry: bool) -> tuple[int, bool]:
    """Processes on a node, and whether each has a GPU.

    GPUS_PER_NODE (or Slurm's) means GPUs and wants as many to be visible; PROCESSES_PER_NODE is for machines without.
    """
    if environment.get("PROCESSES_PER_NODE"):
        if environment.get("GPUS_PER_NODE"):
            raise UserError(
                "PROCESSES_PER_NODE: contradicts GPUS_PER_NODE; set one, GPUS_PER_NODE where there are GPUs"
            )
        count = _number(environment, 1, "PROCESSES_PER_NODE", least=1)
        if visible and count > visible and not dry:
            raise UserError(
                f"PROCESSES_PER_NODE {count}: this node has {visible} GPUs, and each process takes one; lower it, or "
                "set CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        return count, visible > 0
    for name in ("GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if environment.get(name):
            count = _number(environment, 1, name, least=1)
            if count > visible and not dry:
                raise UserError(
                    f"{name} {count}: this node has {visible} GPUs that torch sees; correct it, or unset it and set "
                    "PROCESSES_PER_NODE for processes on the CPU"
                )
            return count, True
    return max(1, visible), visible > 0


# -------------------------------------------------------------------------------------------------------------- Slurm

_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
_SLURM_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def _refuse_many_tasks(environment: Mapping[str, str], nodes: int) -> None:
    tasks = _number(environment, nodes, "SLURM_STEP_NUM_TASKS", least=1)
    if tasks > nodes:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS {tasks}: the launcher starts a node's processes itself; give srun "
            f"--ntasks-per-node=1 for its {nodes} nodes"
        )


def _first_slurm_host(environment: Mapping[str, str]) -> str | None:
    text = next((environment[name] for name in _SLURM_LISTS if environment.get(name)), None)
    if text is None:
        return None
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", text],
            capture_output=True,
            text=True,
            check=True,
            timeout=_SCONTROL_SECONDS,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):  # no scontrol in a container, for example
        told = []
    return (told or expand_hosts(text))[0]


def expand_hosts(text: str) -> list[str]:
    """The hosts that Slurm writes as `a[1-3,07],b2`. Raises UserError for what is no such list."""
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        names = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            middle = [literal] if literal else [number for span in ranges.split(",") for number in _span(span, text)]
            names = [name + part for name in names for part in middle]
        hosts += names
    if not hosts:
        raise UserError(f"SLURM_JOB_NODELIST {text}: names no host; set MASTER_ADDR to node 0's address")
    return hosts


def _span(span: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", span.strip())
    if match is None:
        raise UserError(f"SLURM_JOB_NODELIST {text}: cannot be read; set MASTER_ADDR to node 0's address")
    first, last = match[1], match[2] or match[1]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


# ---------------------------------------------------------------------------------------------------------- interface


def interface_to(address: str, *, many_nodes: bool) -> str | None:
    """The network interface on the way to `address`, where it can be told.

    A node's own name often stands for 127.0.1.1 in its /etc/hosts. Other nodes cannot reach that, so with several nodes
    the interface of the default route is taken in its place.
    """
    source = _source_to(address)
    if source is not None and many_nodes and _is_loopback(source) and not _is_loopback(address):
        source = _source_to(_UNROUTED)
    for name, addresses in psutil.net_if_addrs().items():
        if source is not None and any(entry.address.split("%")[0] == source for entry in addresses):
            return str(name)
    return None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _source_to(address: str) -> str | None:
    """This machine's address on the way to another. A UDP socket sends nothing when it is connected."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0]).split("%")[0]
    except (OSError, UnicodeError):
        return None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
