"""`python -m open_po.quickstart build|report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from open_po import quickstart
from open_po.commands.command_line import CommandParser, refused
from open_po.config import load_config
from open_po.errors import ConfigError, UserError


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code. What a user can cause is told in one line."""
    parser = CommandParser(prog="python -m open_po.quickstart", description=(quickstart.__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("build", "make the data and the untrained model"), ("report", "compare the two stages")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--dir", type=Path, default=Path("output/quickstart"), help="default %(default)s")
        if name == "build":
            command.add_argument("--seed", type=int, default=42, help="of the rows and weights; default %(default)s")
            then = "a configuration for later: nothing is made if it has a mistake"
            command.add_argument("then", nargs="*", metavar="-- CONFIG.yaml --field value ...", help=then)
    options = parser.parse_args(arguments)
    try:
        if options.command == "build" and options.then:
            load_config(options.then)
    except ConfigError as error:
        return refused(error)
    return _do(options)


def _do(options: argparse.Namespace) -> int:
    from open_po.distributed.runtime import Runtime
    from open_po.quickstart.build import build
    from open_po.quickstart.report import measure, tell

    runtime = Runtime.start(seed=0)
    try:
        if options.command == "build":
            build(options.dir, options.seed)
            runtime.say(f"Quickstart: made data and an untrained model in {options.dir}")
        else:
            tell(measure(options.dir, runtime.device), options.dir, runtime.console)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or options.dir}: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        runtime.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
