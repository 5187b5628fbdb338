"""What the model will really see: a run's tokens, lengths, truncation, packs, before it starts.

    python -m open_po inspect CONFIG.yaml [MORE.yaml ...] [--rows N] [--full] [--processes N] [--out PAGE.html]
                              [--field value ...]

It reads the data as training does, with the same fields (python dpo_tune_cache.py --help lists them), and needs the
tokenizer but no weights. A row that cannot be read stops it as it would stop the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from open_po.commands.command_line import CommandParser, Job, run_command
from open_po.config import DistributedConfig, RunConfig, load_config
from open_po.errors import ConfigError

_ROWS = 3


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    configs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    parser = CommandParser(prog="python -m open_po inspect", description=__doc__)
    parser.add_argument("--rows", type=pairs, default=_ROWS, help=f"pairs to show (default {_ROWS}); 0: tables alone")
    parser.add_argument("--full", action="store_true", help="every token of these pairs, however long they are")
    parser.add_argument("--processes", type=processes, help="that the run will have (default: those of this command)")
    parser.add_argument("--out", type=Path, help="write a page in colour as well, HTML")
    if not words:
        parser.print_help()
        return 0
    arguments, rest = parser.parse_known_args(words[len(configs) :])

    def read() -> RunConfig:
        config = load_config([*configs, *rest])
        _settle_processes(arguments, config)
        # No model is spread here, so this machine need not have what the run's will.
        return dataclasses.replace(config, distributed=DistributedConfig())

    return run_command(read, partial(_job, arguments))


def _job(arguments: argparse.Namespace) -> Job:
    from open_po.commands.inspect_data import inspect

    return partial(inspect, arguments=arguments)


def pairs(word: str) -> int:
    if (count := int(word)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {word}")
    return count


def processes(word: str) -> int:
    if (count := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {word}")
    return count


def _settle_processes(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Where all processes work on the same packs, they count as one. Raises ConfigError."""
    if config.distributed.parallel == "layers" and (arguments.processes or 1) > 1:
        raise ConfigError([f"--processes {arguments.processes}: parallel layers is one process; leave it out"])
    if config.distributed.parallel == "tp":
        arguments.processes = 1
