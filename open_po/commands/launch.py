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
from collections.abc import Callable, Sequence
from pathlib import Path

import open_po
from open_po.commands.command_line import CommandParser, refused
from open_po.commands.place import is_rank
from open_po.config import RunConfig, load_config
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
    command = rank_command(words)
    if is_rank(os.environ) and not options.dry_run:
        os.execv(command[0], command)
    from open_po.commands import launch_node

    if options.dry_run:
        return launch_node.tell(config, words, options.pairs, options.restarts)
    return launch_node.start(config, command, options.restarts)


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
