"""The quickstart's data and untrained model, made from nothing."""

from __future__ import annotations

from pathlib import Path

from open_po.quickstart.marker import clear, finish
from open_po.quickstart.model import make_model, make_tokenizer
from open_po.quickstart.task import make_rows, write_rows


def build(folder: Path, seed: int) -> None:
    """Write `data/*.jsonl` and the untrained model `base` into `folder`, in place of earlier ones.

    Raises UserError, with nothing changed, if the folder has such parts that no quickstart has made.
    """
    clear(folder)
    (folder / "data").mkdir()
    for name, rows in make_rows(seed).items():
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    finish(folder, seed)
