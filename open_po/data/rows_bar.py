"""`datasets` counts the rows that it maps, in however many processes, on a bar of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType

from datasets import arrow_dataset
from rich.console import Console

from open_po.output.progress import Progress


class _RowsBar:
    """What `datasets` makes in place of its own bar when there are rows to map: what is cached shows none."""

    def __init__(self, console: Console, label: str, *, total: int, initial: int = 0, **_: object) -> None:
        self._progress = Progress(console, label, total=total, unit="rows", done=initial)

    def __enter__(self) -> _RowsBar:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def update(self, count: int) -> None:
        """So many more rows are mapped."""
        self._progress.advance(count)


@contextmanager
def rows_bar(console: Console, label: str) -> Iterator[None]:
    """What `Dataset.map` says in the block goes to a `Progress` of this label.

    `datasets` takes no bar of ours, so the name is changed by which it knows its own: on a terminal the two would
    overwrite each other's lines.
    """
    theirs = arrow_dataset.hf_tqdm
    arrow_dataset.hf_tqdm = partial(_RowsBar, console, label)
    try:
        yield
    finally:
        arrow_dataset.hf_tqdm = theirs
