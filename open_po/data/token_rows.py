"""Tokenised rows on disk: two Arrow files, of which one holds the token ids and one all that is known of each row.

The first is mapped and read where it is needed; the second is small and taken into arrays at the start.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from open_po.data.tokenization import KEY_DTYPE

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SIDES = ("prompt", "chosen", "rejected")
_LISTS: dict[str, pa.DataType] = {
    **dict.fromkeys(IDS, pa.list_(pa.int32())),
    "turns": pa.list_(pa.list_(pa.int32())),  # as `Turns.flat` gives them
}
_KEYS: dict[str, pa.DataType] = dict.fromkeys(("prompt_key", "chosen_key", "rejected_key"), pa.binary(16))
_KNOWN: dict[str, pa.DataType] = {
    "row": pa.int64(),  # its number in the data set, from 0
    "pair": pa.int32(),  # of a row that gives several, from 1; else 0
    "outcome": pa.int8(),
    "why": pa.string(),  # it does not train
    **_KEYS,
    **{f"{side}_{what}": pa.int32() for what in ("length", "lost", "scored") for side in _SIDES},
    "highest_id": pa.int32(),
    "chosen_score": pa.float64(),  # NaN if the row has none
    "rejected_score": pa.float64(),
}
LISTS_SCHEMA = pa.schema(_LISTS)  # of the first file
KNOWN_SCHEMA = pa.schema(_KNOWN)  # of the second
SCHEMA = pa.schema(_LISTS | _KNOWN)


# What the system says of a file that is gone or lies on a bad disk. Arrow's own errors of damage have no number.
_OF_DAMAGE = (None, errno.ENOENT, errno.EIO)


class NoWholeFile(Exception):
    """A file that is damaged, or is not there."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Raises NoWholeFile for what Arrow raises of a file that is not whole."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in _OF_DAMAGE:
            raise
        raise NoWholeFile(path) from error


class Outcome(IntEnum):
    """What has become of a row."""

    PAIR = 0
    LEFT_OUT = 1  # well-formed, but it cannot train
    BAD_ROW = 2  # cannot be read
    BAD_LINE = 3  # of the file; `why` says which


@dataclass(frozen=True)
class IdColumn:
    """Token ids of several rows: those of row i are `ids[starts[i]:ends[i]]`."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @staticmethod
    def of(lists: pa.ListArray) -> IdColumn:
        """The rows of an Arrow array, not copied."""
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return IdColumn(lists.values.to_numpy(), offsets[:-1], offsets[1:])

    @staticmethod
    def joined(columns: Sequence[IdColumn]) -> IdColumn:
        """The rows of all, one column after the other."""
        if len(columns) == 1:
            return columns[0]
        before = np.cumsum([0, *(len(column.ids) for column in columns)])
        return IdColumn(
            np.concatenate([column.ids for column in columns]),
            np.concatenate([column.starts + start for column, start in zip(columns, before, strict=False)]),
            np.concatenate([column.ends + start for column, start in zip(columns, before, strict=False)]),
        )


class TokenFile:
    """The token ids of one data set's rows, by the rows' places in the file."""

    def __init__(self, path: Path) -> None:
        """Raises NoWholeFile."""
        with _damage_of(path):
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            sizes = [self._file.get_batch(number).num_rows for number in range(self._file.num_record_batches)]
        self.starts = np.cumsum([0, *sizes])  # of each batch, and where the last ends
        self._batches: dict[int, pa.RecordBatch] = {}
        self._columns: dict[int, list[IdColumn]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, place: int) -> dict[str, Any]:
        """All lists of a row, by name."""
        number = self._number(place)
        place -= int(self.starts[number])
        found: dict[str, Any] = {}
        for name, column in zip(IDS, self.columns(number), strict=True):
            found[name] = column.ids[column.starts[place] : column.ends[place]].tolist()
        for name in LISTS_SCHEMA.names[len(IDS) :]:
            found[name] = self._batches[number][name][place].as_py()
        return found

    def columns(self, number: int) -> list[IdColumn]:
        """The ids of a batch's rows: prompts, chosen and rejected responses. They stay in the file."""
        if number not in self._columns:
            batch = self._batches[number] = self._file.get_batch(number)
            self._columns[number] = [IdColumn.of(batch[name]) for name in IDS]
        return self._columns[number]

    def gather(self, places: NDArray[np.int64]) -> list[IdColumn]:
        """The ids of the rows at `places`, in this order: prompts, chosen and rejected responses."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        pieces: list[list[IdColumn]] = [[] for _ in IDS]
        for part in np.split(np.arange(len(places)), cuts):
            number = int(numbers[part[0]])
            for found, column in zip(pieces, self.columns(number), strict=True):
                found.append(_selected(column, places[part] - self.starts[number]))
        return [IdColumn.joined(columns) for columns in pieces]

    def _number(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right")) - 1


def _selected(column: IdColumn, places: NDArray[np.int64]) -> IdColumn:
    """Some rows of a column, with no ids of others between them."""
    starts, ends = column.starts[places], column.ends[places]
    if (starts[1:] == ends[:-1]).all():
        return IdColumn(column.ids[starts[0] : ends[-1]], starts - starts[0], ends - starts[0])
    lengths = ends - starts
    new_ends = np.cumsum(lengths)
    new_starts = new_ends - lengths
    index = np.arange(new_ends[-1]) + np.repeat(starts - new_starts, lengths)
    return IdColumn(column.ids[index], new_starts, new_ends)


class TokenRows:
    """The rows of several files, numbered through."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self._files = files
        self._starts = np.cumsum([0, *map(len, files)])

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._files[number].row(place - int(self._starts[number]))

    def numbered(self, places: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The numbers of rows at places in the first file, in the second, and so on."""
        return np.concatenate([each + start for each, start in zip(places, self._starts, strict=False)])

    def gather(self, places: NDArray[np.int64]) -> list[IdColumn]:
        """The ids of the rows at `places`, in this order: prompts, chosen and rejected responses."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        parts = [
            self._files[numbers[part[0]]].gather(places[part] - self._starts[numbers[part[0]]])
            for part in np.split(np.arange(len(places)), cuts)
        ]
        return [IdColumn.joined([part[side] for part in parts]) for side in range(len(IDS))]


@dataclass(frozen=True)
class Known:
    """What is known of rows, a column each; [R] if nothing else is said."""

    table: pa.Table

    @staticmethod
    def read(path: Path) -> Known:
        """The content of a file. Raises NoWholeFile."""
        with _damage_of(path):
            return Known(pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, places: NDArray[np.int64]) -> Known:
        """Some of the rows."""
        return Known(self.table.take(pa.array(places)).combine_chunks())

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers."""
        column: NDArray[Any] = self.table[name].to_numpy()
        return column

    def sides(self, what: str) -> NDArray[np.int64]:
        """[R, 3] the `what` of prompts, chosen and rejected responses."""
        columns = [self.numbers(f"{side}_{what}") for side in _SIDES]
        return np.stack(columns, 1).astype(np.int64)

    def keys(self, name: str) -> NDArray[np.void]:
        """A column of keys, 16 bytes each."""
        (chunk,) = self.table[name].chunks
        buffer = chunk.buffers()[1]
        return np.frombuffer(buffer, dtype=KEY_DTYPE)[chunk.offset : chunk.offset + len(chunk)]

    @cached_property
    def outcome(self) -> NDArray[np.int8]:
        """`Outcome` of each row."""
        return self.numbers("outcome")

    def reasons(self, outcomes: NDArray[np.bool_]) -> list[str]:
        """Why the rows that are marked do not train."""
        found: list[str] = self.table["why"].filter(pa.array(outcomes)).to_pylist()
        return found


def write_batches(path: Path, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
    """An Arrow file of these batches. Raises OSError."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Each batch of an Arrow file. Raises NoWholeFile."""
    with _damage_of(path):
        file = pa.OSFile(str(path), "rb")
    with file:
        with _damage_of(path):
            reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            with _damage_of(path):
                batch = reader.get_batch(number)
                batch.validate(full=True)
            yield batch
