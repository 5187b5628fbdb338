"""Going on from the Hub: the newest checkpoint of a run whose machine is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import HfApi

from open_po.errors import UserError
from open_po.hub.publication import STATE_FOLDER
from open_po.hub.repository import Branch
from open_po.hub.retrying import AT_START, Say, persistently
from open_po.output.run_folder import RunFolder


def fetch_checkpoint(folder: RunFolder, branch: Branch, newest: Path | None, say: Say) -> None:
    """Put the checkpoint that a branch has, and the metrics up to it, into a run's folder.

    `newest` is the newest one that is there; if it is as new, nothing changes. Raises UserError.
    """
    state = f"{STATE_FOLDER}/trainer_state.json"
    what = f"resume_from_checkpoint hub: fetching from {branch}"
    partial = folder.checkpoints / ".step_hub.partial"

    def fetch(*patterns: str) -> bool:
        """Whether there is anything of that."""
        HfApi().snapshot_download(
            branch.repository, revision=branch.revision, allow_patterns=list(patterns), local_dir=partial
        )
        return (partial / STATE_FOLDER).is_dir()

    try:
        if not persistently(what, lambda: fetch(state), patience=AT_START, say=say):
            if (
                persistently(what, lambda: fetch("run_summary.json"), patience=AT_START, say=say)
                or (partial / "run_summary.json").is_file()
            ):
                raise UserError(
                    f"resume_from_checkpoint hub: the run in {branch} is complete; load it from there, or name another "
                    "hf_repo_revision"
                )
            say(f"No checkpoint in {branch} yet")
            return
        step = _step(partial / state, branch)
        target = folder.checkpoints / f"step_{step:06d}"
        if newest is not None and int(newest.name.removeprefix("step_")) >= step:
            say(f"{newest} is as new as what {branch} has")
            return
        records = [path.name for path in (folder.metrics, folder.samples)]
        persistently(what, lambda: fetch(f"{STATE_FOLDER}/*", *records), patience=AT_START, say=say)
        if _step(partial / state, branch) != step:
            raise UserError(f"{what}: the branch has got another checkpoint meanwhile; start again")
        for name in records:
            if (partial / name).is_file():
                (partial / name).replace(folder.path / name)
        (partial / STATE_FOLDER).rename(target)
        say(f"Fetched step {step} from {branch}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _step(state: Path, branch: Branch) -> int:
    try:
        return int(json.loads(state.read_text())["progress"]["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"resume_from_checkpoint hub: the checkpoint in {branch} is damaged ({error})") from error
