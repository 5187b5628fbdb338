"""Start a run's processes, on one node or on several at once.

    python -m open_po launch [--dry-run] [--restarts N] [--pairs N] CONFIG.yaml [MORE.yaml ...] [--field value ...]

The same command on each node. NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE (PROCESSES_PER_NODE
without GPUs) say which node this is, or Slurm does; without either it is the only one. Under torchrun or accelerate
launch this process is a rank already, and trains. Nodes that would train different things end with a line that says so.

Exit codes: 0 all ranks ended well; 75 preempted after saving, the same command goes on; 2 a mistake in the
configuration; else that of the rank that failed first, 128 + n where signal n ended it. docs/launching.md says more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import open_po
from open_po.commands.command_line import CommandParser, refused
from open_po.commands.node_run import NodeRun
from open_po.commands.place import is_rank, read_place
from open_po.commands.plan import plan
from open_po.config import RunConfig, load_config
from open_po.distributed.parallelism import LauncherWish, choose_parallelism
from open_po.distributed.rendezvous import Limits
from open_po.errors import ConfigError, UserError


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = CommandParser(prog="python -m open_po launch", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print each node's command and the batch; start nothing")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="start failed ranks again, up to N times")
    parser.add_argument("--pairs", type=int, metavar="N", help="pairs of the training data, for a dry run's steps")
    options, rest = parser.parse_known_args(words)
    return guarded(lambda: _launch(rest, options))


def guarded(action: Callable[[], int]) -> int:
    """The exit code of `action`; what a user can cause is told in one line."""
    try:
        return action()
    except ConfigError as error:
        return refused(error)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _launch(words: Sequence[str], options: argparse.Namespace) -> int:
    config = load_config(words)
    _check_options(options.restarts, options.pairs, options.dry_run, config)
    if options.dry_run:
        place = read_place(os.environ, torch.cuda.device_count(), dry=True)
        print(plan(config, words, place, options.pairs, options.restarts))
        return 0
    command = rank_command(words)
    if is_rank(os.environ):
        os.execv(command[0], command)
    place = read_place(os.environ, torch.cuda.device_count())
    choose_parallelism(config, LauncherWish(), place.ranks)  # each rank would refuse the same
    node = NodeRun(
        place=place,
        command=command,
        config=config,
        restarts=options.restarts,
        limits=Limits(rendezvous=_rendezvous_seconds(os.environ)),
    )
    return node.run()


def rank_command(words: Sequence[str]) -> list[str]:
    """What a rank runs."""
    program = Path(open_po.__file__).resolve().parent.parent / "dpo_tune_cache.py"
    return [sys.executable, str(program), *words]


def _check_options(restarts: int, pairs: int | None, dry: bool, config: RunConfig) -> None:
    problems = []
    if restarts < 0:
        problems.append(f"--restarts: must not be below 0, got {restarts}")
    if restarts > 0 and config.output.resume_from_checkpoint != "auto":
        problems.append(
            f"--restarts {restarts}: needs resume_from_checkpoint auto, without which a run does not go on; add it"
        )
    if pairs is not None and pairs < 1:
        problems.append(f"--pairs: must be above 0, got {pairs}")
    if pairs is not None and not dry:
        problems.append(f"--pairs {pairs}: belongs to --dry-run; max_train_samples takes fewer rows")
    if problems:
        raise ConfigError(problems)


def _rendezvous_seconds(environment: Mapping[str, str]) -> float:
    text = environment.get("RENDEZVOUS_SECONDS") or "600"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"RENDEZVOUS_SECONDS {text}: must be a number of seconds above 0")
    return seconds
