"""What says that a folder holds a quickstart's data and model, whole, and of which seed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from open_po.errors import UserError
from open_po.output.files import write_atomically

PARTS = ("data", "base")
_MARKER = ".open_po_quickstart"


def is_built(folder: Path, seed: int) -> bool:
    """Whether the parts are there, made with just this seed."""
    with suppress(OSError):
        return (folder / _MARKER).read_text() == f"seed {seed}\n" and all((folder / part).is_dir() for part in PARTS)
    return False


def clear(folder: Path) -> None:
    """Make room for the parts, and note that they are not whole; nobody else's files are removed.

    Raises UserError, with nothing changed, if one of them is there that no quickstart has made.
    """
    marker = folder / _MARKER
    for part in PARTS:
        if (folder / part).exists() and not marker.is_file():
            raise UserError(f"{folder / part}: is no quickstart's; move it away or choose --dir")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("")
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)


def finish(folder: Path, seed: int) -> None:
    """Note that the parts are whole."""
    write_atomically(folder / _MARKER, lambda path: path.write_text(f"seed {seed}\n"))
