"""Publish what a run has left to publish on the Hugging Face Hub; what is there already is not sent again.

    python -m open_po upload OUTPUT_DIR [--hf_repo_id USER/NAME] [--hf_repo_revision BRANCH] [--public]

Repository and branch are those that the run had with push_to_hub; of a run without they must be named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from open_po.commands.command_line import CommandParser
from open_po.config import branch_problem, repository_problem
from open_po.errors import UserError


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = CommandParser(prog="python -m open_po upload", description=__doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path)
    parser.add_argument("--hf_repo_id", metavar="NAME", help="repository, USER/NAME or NAME")
    named = "goes with --hf_repo_id: "
    parser.add_argument("--hf_repo_revision", metavar="BRANCH", help=f"{named}branch, default main")
    parser.add_argument("--public", action="store_true", help=f"{named}make a new repository public")
    parser.add_argument("--merged", action="store_true", help=f"{named}of a LoRA run the merged model")
    parser.add_argument(
        "--patience", type=float, default=600.0, metavar="S", help="seconds of trying again (default %(default)s)"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a run starts in the background
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)  # the process of that run
    arguments = parser.parse_args(words)
    given = {"hf_repo_revision": arguments.hf_repo_revision, "public": arguments.public, "merged": arguments.merged}
    if arguments.hf_repo_id is None and any(given.values()):
        parser.error(f"argument --{next(name for name in given if given[name])}: needs --hf_repo_id")
    if arguments.hf_repo_id is not None and (problem := repository_problem(arguments.hf_repo_id)):
        parser.error(f"argument --hf_repo_id: {problem}")
    if arguments.hf_repo_revision is not None and (problem := branch_problem(arguments.hf_repo_revision)):
        parser.error(f"argument --hf_repo_revision: {problem}")
    from open_po.commands.upload_run import upload_run  # which loads what a mistake can do without

    try:
        upload_run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; what is on the Hub stays, and the same command goes on", file=sys.stderr)
        return 130
    return 0
