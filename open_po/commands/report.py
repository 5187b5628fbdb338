"""Write one HTML page about runs: curves, figures, settings that differ, samples before and after.

    python -m open_po report OUTPUT_DIR [MORE ...] [--out report.html]

Each folder is a run's, finished or not, or a sweep's, which stands for its runs. The page needs no network.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from open_po.commands.command_line import CommandParser, refuse_unwritable
from open_po.errors import UserError, user_line
from open_po.output.files import write_atomically


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = CommandParser(prog="python -m open_po report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="of a run or a sweep")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    arguments = parser.parse_args(words)
    out: Path = arguments.out
    from open_po.report.page import render  # with what `--help` can do without
    from open_po.report.runs import read_folders

    try:
        refuse_unwritable(out)
        reported = read_folders(arguments.folders)
        page = render(reported)
        write_atomically(out, lambda path: path.write_text(page, encoding="utf-8"))
    except (UserError, OSError) as error:
        print(f"error: {user_line(error)}", file=sys.stderr)
        return 1
    count = len(reported.runs)
    print(f"Report on {count} run{'' if count == 1 else 's'}: {out} ({len(page) / 1e6:.1f} MB)")
    return 0
