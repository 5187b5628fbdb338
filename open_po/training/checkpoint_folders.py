"""The folders of checkpoints: found, pruned, removed whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, if any."""
    return next(reversed(checkpoint_folders(folder)), None)


def prune(folder: Path, keep: int, needed: Callable[[Path], bool] = lambda checkpoint: False) -> None:
    """Remove all but the `keep` newest checkpoints and those that are still `needed`."""
    for checkpoint in checkpoint_folders(folder)[:-keep]:
        if not needed(checkpoint):
            remove(checkpoint)


def checkpoint_folders(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first."""
    steps = {path: step for path in folder.glob("step_*") if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path])


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name says; None if it is no checkpoint's name."""
    found = re.fullmatch(r"step_(\d+)", checkpoint.name)
    return None if found is None else int(found[1])


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it exists. It is renamed first: half of one must not be taken for a whole one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    if checkpoint.exists():
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def sync_all(folder: Path, *, recursive: bool = True) -> None:
    """Have a folder's entries, and with `recursive` all that is in it, on disk when this returns. Raises OSError."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
