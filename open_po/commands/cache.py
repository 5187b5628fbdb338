"""The reference log-probs on disk.

    python -m open_po cache build CONFIG.yaml [--field value ...]     compute what a run would need, without training
    python -m open_po cache info                                      models, rows, tokens, bytes
    python -m open_po cache verify                                    read every file and check it
    python -m open_po cache prune [--key K] [--model M] [--older-than DAYS] [--damaged] [--dry-run]
    python -m open_po cache merge FOLDER [FOLDER ...] --into FOLDER   join caches, of several machines for example

`build` takes what `python dpo_tune_cache.py` takes; started several times, on several machines that share the folder or
under torchrun, the processes share the work. The others take --dir, the cache's folder, if it is not the default one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from open_po.commands.command_line import CommandParser, Job, run_command
from open_po.config import ReferenceConfig, help_text, load_config
from open_po.errors import UserError, user_line

if TYPE_CHECKING:
    from rich.console import Console


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if words and words[0] == "build":
        return _build(words[1:])
    parser = CommandParser(prog="python -m open_po cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|info|verify|prune|merge")
    for name in ("info", "verify", "prune", "merge"):
        command = commands.add_parser(name)
        if name == "merge":
            command.add_argument(
                "folders", nargs="+", type=Path, help="caches to take rows from; they stay as they are"
            )
            command.add_argument("--into", required=True, type=Path, help="the cache that gets them")
            continue
        default = Path(ReferenceConfig().reference_cache_dir).expanduser()
        command.add_argument("--dir", type=Path, default=default, help=f"the cache's folder (default {default})")
        if name == "prune":
            command.add_argument(
                "--key", action="append", type=_text, default=[], help="remove the store whose name begins so"
            )
            command.add_argument("--model", type=_text, help="remove the stores of models whose name holds this text")
            command.add_argument("--older-than", type=_days, metavar="DAYS", help="remove files not written since")
            command.add_argument("--damaged", action="store_true", help="remove files that are damaged")
            command.add_argument("--dry-run", action="store_true", help="say what would be removed")
    arguments = parser.parse_args(words)
    try:
        return _change_or_tell(arguments)
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"error: {user_line(error)}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


def _change_or_tell(arguments: argparse.Namespace) -> int:
    from open_po.commands import cache_stores
    from open_po.output.console import make_console

    commands: dict[str, Callable[[argparse.Namespace, Console], int]] = {
        "info": cache_stores.info,
        "verify": cache_stores.verify,
        "prune": cache_stores.prune,
        "merge": cache_stores.merge,
    }
    return commands[arguments.command](arguments, make_console())


def _text(word: str) -> str:
    if not word:
        raise argparse.ArgumentTypeError("is empty")
    return word


def _days(word: str) -> float:
    days = float(word)
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"must be days, 0 or more, got {word}")
    return days


def _build(words: Sequence[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(help_text("python -m open_po cache build"))
        return 0
    return run_command(lambda: load_config(words), _build_job)


def _build_job() -> Job:
    from open_po.commands.cache_build import build

    return build
