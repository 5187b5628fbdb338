"""How much memory a run takes, before there is a GPU for it: bytes by part, what fits, what to change first.

    python -m open_po plan CONFIG.yaml [MORE.yaml ...] [--gpu-memory 24GB] [--gpus 8] [--device cuda|cpu]
                           [--field value ...]

Needs no GPU, weights, tokenizer or data: the model's config.json is read, and its training step rehearsed on tensors
without memory. All of it is predicted. Exit code 3 if nothing fits.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence

from open_po.commands.command_line import CommandParser, quiet_imports, refused
from open_po.config import load_config
from open_po.errors import ConfigError, UserError

_UNITS = {"": 1e9, "GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    configs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    parser = CommandParser(prog="python -m open_po plan", description=__doc__)
    parser.add_argument("--gpu-memory", type=size_of, metavar="SIZE", help="of one GPU, as 24GB; default: 80GB")
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="that the run will have (default 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what it will run on (default cuda)")
    if not words:
        parser.print_help()
        return 0
    arguments, rest = parser.parse_known_args(words[len(configs) :])
    try:
        config = load_config([*configs, *rest])
    except ConfigError as error:
        return refused(error)
    quiet_imports()
    from open_po.commands.plan_memory import show

    try:
        return show(config, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def size_of(word: str) -> float:
    """Bytes of a size as people write it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", word.strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 24GB, got {word}")
    return float(found[1]) * _UNITS[found[2].upper()]


def _count(word: str) -> int:
    if (count := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {word}")
    return count
