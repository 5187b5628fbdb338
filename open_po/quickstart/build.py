"""The quickstart's folder: made from nothing, without removing anybody else's files."""

from __future__ import annotations

import shutil
from pathlib import Path

from open_po.errors import UserError
from open_po.quickstart.model import make_model, make_tokenizer
from open_po.quickstart.task import make_rows, write_rows

# Names in the quickstart's folder: what is made here, and what the trainer writes where configs/quickstart/ says.
_MARKER = ".open_po_quickstart"
_PARTS = ("data", "base", "sft", "dpo", "reference", "cache")
REPORT_FILE = "report.json"


def build(folder: Path, seed: int) -> None:
    """Write `data/*.jsonl` and the untrained model `base` into `folder`, after removing an earlier quickstart from it.

    Raises UserError, with nothing changed, if the folder holds anything but a quickstart.
    """
    _claim(folder)
    (folder / "data").mkdir()
    for name, rows in make_rows(seed).items():
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def _claim(folder: Path) -> None:
    """Make the folder this quickstart's: only what a quickstart names is removed, and only beside its marker."""
    marker = folder / _MARKER
    if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something else than an earlier quickstart; move it away or choose --dir")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in _PARTS:
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    (folder / REPORT_FILE).unlink(missing_ok=True)
