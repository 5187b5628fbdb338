"""What `python -m open_po upload` does."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from functools import partial

from huggingface_hub.utils import disable_progress_bars

from open_po.config import OutputConfig
from open_po.errors import UserError
from open_po.hub.background import EventLog, UploadBar
from open_po.hub.publication import Publication
from open_po.hub.repository import Branch
from open_po.hub.retrying import persistently
from open_po.output.console import make_console
from open_po.output.files import waiting_lock
from open_po.output.run_folder import RunFolder

_LOCK = ".hub.lock"  # held by an upload, a run's or one by hand
_ORPHAN_SECONDS = 0.5  # between two looks whether the run is still there


def upload_run(arguments: argparse.Namespace) -> None:
    """Publish what a run has left to publish. Raises UserError."""
    folder = RunFolder(arguments.folder)
    if folder.read_summary() is None:
        raise UserError(f"{folder.path}: holds no run; name the output_dir of one")
    disable_progress_bars()  # the client's own
    with waiting_lock(folder.path / _LOCK):
        publication = _publication(folder, arguments)
        if arguments.only is not None:
            _end_with(arguments.run)
            _publish_for_a_run(publication, arguments.only, arguments.patience)
        else:
            _publish_all(publication, arguments.patience)


def _publication(folder: RunFolder, arguments: argparse.Namespace) -> Publication:
    """Where to publish: what the command says, else what the run has noted."""
    noted = Publication.read(folder)
    if arguments.hf_repo_id is None:
        if noted is None:
            raise UserError(f"{folder.path}: its run had no push_to_hub; name a repository with --hf_repo_id USER/NAME")
        return noted
    if arguments.merged and (folder.path / "adapter_config.json").is_file():
        raise UserError(
            f"--merged: the run in {folder.path} saved its adapters alone (merge_on_save false); leave it out"
        )
    output = OutputConfig(
        hf_repo_id=arguments.hf_repo_id,
        hf_repo_revision=arguments.hf_repo_revision or "main",
        hf_private=not arguments.public,
    )
    branch = Branch.of(output, patience=arguments.patience, say=print)
    if noted is not None and noted.branch == branch:
        return noted
    return Publication(
        folder=folder,
        branch=branch,
        with_state=False,
        keeps_all=False,
        merged=arguments.merged,
        is_noted=noted is None,  # a run goes on to its own branch
    )


def _end_with(run: int) -> None:
    """End this process soon after the run that has started it, whose folder may be another run's by then."""

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(_ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        console.print(f"Uploaded to the Hub: {publication.branch}, {publication.branch.address}", soft_wrap=True)
    elif publication.published:
        console.print(f"Nothing to upload: {publication.branch} has all there is", soft_wrap=True)
    else:
        console.print("Nothing to upload: the run is not complete, and has no checkpoint with a model")
