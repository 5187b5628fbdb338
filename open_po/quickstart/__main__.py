"""`python -m open_po.quickstart build`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from open_po import quickstart
from open_po.commands.command_line import CommandParser
from open_po.errors import UserError, user_line
from open_po.quickstart.marker import is_built


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code. What a user can cause is told in one line."""
    parser = CommandParser(prog="python -m open_po.quickstart", description=(quickstart.__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    text = "make the rows and the untrained model, unless they are there"
    command = commands.add_parser("build", help=text, description=text)
    command.add_argument("--dir", type=Path, default=Path("output/quickstart"), help="default %(default)s")
    command.add_argument("--seed", type=int, default=42, help="of the rows and weights; default %(default)s")
    options = parser.parse_args(arguments)
    try:
        if is_built(options.dir, options.seed):
            print(f"Quickstart: data and an untrained model are in {options.dir} already")
            return 0
        from open_po.quickstart.build import build  # which imports torch

        build(options.dir, options.seed)
    except (UserError, OSError) as error:
        print(f"error: {user_line(error)}", file=sys.stderr)
        return 1
    print(f"Quickstart: made data and an untrained model in {options.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
