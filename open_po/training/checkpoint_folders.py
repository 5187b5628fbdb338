"""The folders of checkpoints: found, pruned, removed whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, if any."""
    return next(reversed(_checkpoints(folder)), None)


def prune(folder: Path, keep: int, needed: Callable[[Path], bool] = lambda checkpoint: False) -> None:
    """Remove all but the `keep` newest checkpoints and those that are still `needed`."""
    for checkpoint in _checkpoints(folder)[:-keep]:
        if not needed(checkpoint):
            remove(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first."""
    steps = {path: re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*")}
    return sorted((path for path, step in steps.items() if step), key=lambda path: int(path.name[5:]))


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
