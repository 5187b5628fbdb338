"""What `python -m open_po launch` does on a node once its words are right: tell what would be started, or start it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from open_po.commands.dry_run import dry_run
from open_po.commands.node_run import NodeRun
from open_po.commands.place import read_place
from open_po.commands.plan_memory import planned_memory
from open_po.config import RunConfig
from open_po.distributed.parallelism import LauncherWish, choose_parallelism
from open_po.distributed.rendezvous import Limits
from open_po.errors import UserError


def tell(config: RunConfig, words: Sequence[str], pairs: int | None, restarts: int) -> int:
    """Print each node's command, a rank's, and the batch; returns the exit code."""
    place = read_place(os.environ, torch.cuda.device_count(), dry=True)
    print(dry_run(config, words, place, pairs, restarts))
    print(f"\n{planned_memory(config, place)}")
    return 0


def start(config: RunConfig, command: Sequence[str], restarts: int) -> int:
    """Start this node's ranks, each with `command`, and watch them to the end; returns the exit code."""
    place = read_place(os.environ, torch.cuda.device_count())
    choose_parallelism(config, LauncherWish(), place.ranks)  # each rank would refuse the same
    node = NodeRun(
        place=place,
        command=command,
        config=config,
        restarts=restarts,
        limits=Limits(rendezvous=_rendezvous_seconds(os.environ)),
    )
    return node.run()


def _rendezvous_seconds(environment: Mapping[str, str]) -> float:
    text = environment.get("RENDEZVOUS_SECONDS") or "600"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"RENDEZVOUS_SECONDS {text}: must be a number of seconds above 0")
    return seconds
