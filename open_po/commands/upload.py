"""Publish what a run has left to publish on the Hugging Face Hub; what is there already is not sent again.

    python -m open_po upload OUTPUT_DIR [--hf_repo_id USER/NAME] [--hf_repo_revision BRANCH] [--public]

Repository and branch are those that the run had with push_to_hub; of a run without they must be named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from open_po.commands.command_line import CommandParser
from open_po.config import OutputConfig
from open_po.errors import UserError
from open_po.hub.background import EventLog, UploadBar
from open_po.hub.publication import Publication
from open_po.hub.repository import Branch
from open_po.hub.retrying import AT_THE_END, persistently
from open_po.output.console import make_console
from open_po.output.files import waiting_lock
from open_po.output.run_folder import RunFolder

_LOCK = ".hub.lock"  # an upload that a killed run has left behind may still be under way


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = CommandParser(prog="python -m open_po upload", description=__doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=Path)
    parser.add_argument("--hf_repo_id", metavar="NAME", help="repository, USER/NAME or NAME")
    named = "goes with --hf_repo_id: "
    parser.add_argument("--hf_repo_revision", default="main", metavar="BRANCH", help=f"{named}branch, default main")
    parser.add_argument("--public", action="store_true", help=f"{named}make a new repository public")
    parser.add_argument("--merged", action="store_true", help=f"{named}of a LoRA run the merged model")
    parser.add_argument(
        "--patience", type=float, default=AT_THE_END, metavar="S", help="seconds of trying again (default %(default)s)"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a run starts in the background
    arguments = parser.parse_args(words)
    folder = RunFolder(arguments.folder)
    try:
        if folder.read_summary() is None:
            raise UserError(f"{folder.path}: holds no run; name the output_dir of one")
        publication = _publication(folder, arguments)
        with waiting_lock(folder.path / _LOCK):
            if arguments.only is not None:
                _publish_for_a_run(publication, arguments.only, arguments.patience)
            else:
                _publish_all(publication, arguments.patience)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; what is on the Hub stays, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def _publication(folder: RunFolder, arguments: argparse.Namespace) -> Publication:
    """Where to publish: what the command says, else what the run has noted."""
    noted = Publication.read(folder)
    if arguments.hf_repo_id is None:
        if noted is None:
            raise UserError(f"{folder.path}: its run had no push_to_hub; name a repository with --hf_repo_id USER/NAME")
        return noted
    output = OutputConfig(
        hf_repo_id=arguments.hf_repo_id,
        hf_repo_revision=arguments.hf_repo_revision,
        hf_private=not arguments.public,
    )
    branch = Branch.of(output, patience=arguments.patience, say=print)
    if noted is not None and noted.branch == branch:
        return noted
    return Publication(folder=folder, branch=branch, with_state=False, keeps_all=False, merged=arguments.merged)


def _publish_for_a_run(publication: Publication, name: str, patience: float) -> None:
    """Publish one thing, for a run that watches what this says."""
    log = EventLog(sys.stdout)
    log.total(publication.size(name))
    what = f"upload of {name} to {publication.branch}"
    persistently(what, lambda: publication.publish(name, log.sent), patience=patience, say=log.say)


def _publish_all(publication: Publication, patience: float) -> None:
    """Publish everything that is due, and say so."""
    console = make_console()
    due = publication.due()
    for name in due:
        total = publication.size(name)
        with UploadBar(console, name, total) as bar:
            publish = partial(publication.publish, name, partial(bar.show, total=total))
            persistently(f"upload of {name} to {publication.branch}", publish, patience=patience, say=console.print)
    if due:
        console.print(f"Uploaded to the Hub: {publication.branch}", soft_wrap=True)
    elif publication.published:
        console.print(f"Nothing to upload: {publication.branch} has all there is", soft_wrap=True)
    else:
        console.print("Nothing to upload: the run is not complete, and has no checkpoint with a model")
