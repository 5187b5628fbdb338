"""Where rows come from: files, data sets on disk and Hub datasets, mixed by fraction or count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from open_po.config import MixturePart
from open_po.data.content import cache_folder, folder_digest, text_digest
from open_po.data.row_files import FILE_TYPES, DatasetRows, Rows, open_file
from open_po.errors import UserError

# Rows of a subset, and the order of a mixture, are drawn by this constant and not by the run's seed, so that a sweep
# over seeds trains on the same rows and finds their reference log-probs in the cache.
_DRAW_SEED = 0
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """The rows of one dataset that a mixture takes."""

    part: MixturePart
    name: str  # for messages
    rows: Rows
    taken: NDArray[np.int64]  # numbers of rows, from 0; one that stands here again is trained on again
    available: int  # rows that there were to take from

    @cached_property
    def times(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that are taken, each once and ascending, and how often each is."""
        if (self.taken[1:] > self.taken[:-1]).all():
            return self.taken, np.ones_like(self.taken)
        counts = np.bincount(self.taken)
        numbers = np.flatnonzero(counts)
        return numbers, counts[numbers]

    def draw(self, count: int) -> SourceRows:
        """`count` of the rows, in their old order."""
        if count == len(self.taken):
            return self
        return replace(self, taken=self.taken[np.sort(_order(len(self.taken))[:count])])


def load_mixture(mixture: Sequence[MixturePart], max_rows: int | None = None) -> list[SourceRows]:
    """The rows of each part of a mixture.

    With `max_rows`, the parts are thinned by one draw over the whole mixture, in which one may get none. Raises
    UserError for what cannot be read.
    """
    parts = [_take(_load(part)) for part in mixture]
    return parts if max_rows is None else _thin(parts, max_rows)


def is_data_file(name: str) -> bool:
    """Whether a data set's name is that of a file here, of any type, or can only be one."""
    path = Path(name).expanduser()
    return path.suffix.lower() in FILE_TYPES or path.is_file()


def _take(source: SourceRows) -> SourceRows:
    """As many of the rows as the mixture asks for: above all of them, all once more, and a draw of the rest."""
    amount, available = source.part.amount, source.available
    count = amount if isinstance(amount, int) else max(1, round(amount * available))
    if isinstance(amount, int) and count > available:
        raise UserError(
            f"{source.part.dataset}: {count} rows are asked for, split {source.part.split} has {available}; a fraction "
            "above 1.0 repeats rows"
        )
    whole, rest = divmod(count, available)
    drawn = [source.taken] * whole + ([source.draw(rest).taken] if rest else [])
    return replace(source, taken=np.concatenate(drawn))


def _thin(parts: list[SourceRows], count: int) -> list[SourceRows]:
    """`count` rows drawn from all parts together."""
    owners = np.repeat(np.arange(len(parts)), [len(part.taken) for part in parts])
    shares = np.bincount(owners[_order(len(owners))[:count]], minlength=len(parts)).tolist()
    return [part.draw(share) for part, share in zip(parts, shares, strict=True)]


def _order(length: int) -> NDArray[np.int64]:
    generator = torch.Generator().manual_seed(_DRAW_SEED)
    order: NDArray[np.int64] = torch.randperm(length, generator=generator).numpy()
    return order


# ----------------------------------------------------------------------------------------------------------- reading


def _load(part: MixturePart) -> SourceRows:
    """All rows of a split. Raises UserError if there are none or they cannot be read."""
    name, is_file = part.dataset, is_data_file(part.dataset)
    path = Path(name).expanduser()
    which = part.split if part.configuration is None else f"{part.configuration}, {part.split}"
    try:
        if is_file:
            shown = name
            rows, taken = _load_file(path, part)
        else:
            shown = f"{name} ({which})"
            found = _load_folder(path, part) if path.is_dir() else _load_hub(part)
            rows, taken = found, np.arange(len(found))
    except UserError:
        raise
    except Exception as error:  # datasets wraps parser, file and network errors in types of its own
        reason = _root_cause(error)
        if not is_file:
            types = ", ".join(FILE_TYPES)
            reason = f"neither a file ({types}) nor a Hub dataset that can be loaded, split {which} ({reason})"
        raise UserError(f"{name}: {reason}") from error
    if not len(taken):
        raise UserError(f"{name}: split {part.split} holds no rows")
    return SourceRows(part=part, name=shown, rows=rows, taken=taken, available=len(taken))


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _load_file(path: Path, part: MixturePart) -> tuple[Rows, NDArray[np.int64]]:
    """A file's rows, and which of them the split takes. Raises ValueError with one line."""
    if part.configuration is not None:
        raise ValueError(f"is a file, which has no configuration {part.configuration}; leave it out")
    rows = open_file(path)
    spans = _spans(part.split, {"train": len(rows)})
    return rows, np.concatenate([np.arange(0), *(np.arange(start, end) for _, start, end in spans)])


def _load_hub(part: MixturePart) -> Rows:
    rows = datasets.load_dataset(part.dataset, part.configuration, split=part.split)
    return DatasetRows(rows=rows, digest=text_digest(rows._fingerprint, part.split))


def _load_folder(path: Path, part: MixturePart) -> Rows:
    """The rows of a folder on this machine, of files that `datasets` reads or as its `save_to_disk` wrote it."""
    content = folder_digest(path)
    digest = text_digest(content, str(part.configuration), part.split)
    if any((path / name).is_file() for name in _SAVED):
        return DatasetRows(rows=_saved(path, part.split), digest=digest)
    # `datasets` goes by the files' times, so what it makes of another content gets another place.
    cache = cache_folder() / "folders" / content
    rows = datasets.load_dataset(str(path), part.configuration, split=part.split, cache_dir=str(cache))
    return DatasetRows(rows=rows, digest=digest)


def _saved(path: Path, split: str) -> Dataset:
    found = datasets.load_from_disk(str(path))
    by_name = {"train": found} if isinstance(found, Dataset) else found
    spans = _spans(split, {name: len(rows) for name, rows in by_name.items()})
    return datasets.concatenate_datasets([by_name[name].select(range(start, end)) for name, start, end in spans])


def _spans(split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """The rows that a split such as `train[:90%]` takes: of which split, from and to. Raises ValueError."""
    found = []
    for span in datasets.ReadInstruction.from_spec(split).to_absolute(lengths):
        length = lengths[span.splitname]
        found.append((span.splitname, span.from_ or 0, length if span.to is None else span.to))
    return found
