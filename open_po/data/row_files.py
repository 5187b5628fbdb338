"""Rows by number: of files, read where they lie, and of data sets that `datasets` keeps on disk."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from pyarrow import parquet

from open_po.data.content import cache_folder, file_digest, file_facts, text_digest
from open_po.data.formats import RowError
from open_po.errors import UserError
from open_po.output.files import write_atomically

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
# Part of the name of what is made of a file: raise it when a file gives other rows than before.
_READING_VERSION = 2
_CHUNK = 16 * 2**20  # bytes that are looked through for line ends at a time
_BATCH = 1024  # rows of a Parquet file that are written at a time
_BOM = b"\xef\xbb\xbf"
_NO_OBJECT = "is not a JSON object with named fields"


class BadLine(RowError):
    """A row that is none; the message begins with the line, or row, of the file."""


class Rows(Protocol):
    """The rows of a data set on disk, by number from 0."""

    @property
    def digest(self) -> str:
        """Hash of their content: equal rows where it is equal."""

    def __len__(self) -> int: ...

    def read(self, numbers: NDArray[np.int64]) -> Iterator[Mapping[str, Any] | BadLine]:
        """The rows of these numbers, which ascend; a fault in place of one that cannot be read.

        Raises UserError if the data changed since they were opened.
        """


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """A file with a JSON object in each line; what has one in another form is rewritten so."""

    path: Path
    digest: str
    lines: NDArray[np.int64]  # [R, 2] where each row begins, in bytes, and the number of its line
    facts: list[int]  # `file_facts` as it was opened
    is_rewritten: bool = False  # then a row that is text is a fault's

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, numbers: NDArray[np.int64]) -> Iterator[Mapping[str, Any] | BadLine]:
        """See `Rows`."""
        with open(self.path, "rb") as file:
            for start, line in self.lines[numbers].tolist():
                file.seek(start)
                yield self._row(file.readline(), line)
        _refuse_change(self.path, self.facts)

    def _row(self, content: bytes, line: int) -> Mapping[str, Any] | BadLine:
        try:
            row = _parse_json(_decode(content, line).rstrip(), line)
        except BadLine as fault:
            return fault
        if isinstance(row, dict):
            return row
        return BadLine(row if self.is_rewritten else f"line {line}: {_NO_OBJECT}")


@dataclass(frozen=True, kw_only=True)
class DatasetRows:
    """Rows that `datasets` has on disk."""

    rows: Dataset
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: NDArray[np.int64]) -> Iterator[Mapping[str, Any] | BadLine]:
        """See `Rows`."""
        yield from self.rows.select(numbers)


def open_file(path: Path) -> Rows:
    """The rows of a file. Raises ValueError with one line, OSError, or what pyarrow raises."""
    kind = path.suffix.lower()
    types = ", ".join(FILE_TYPES)
    if kind not in FILE_TYPES:
        raise ValueError(f"is of no known type; data files are {types}")
    if not path.is_file():
        raise ValueError(f"is no file; data are {types} files, or Hub names")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    facts = file_facts(path)
    digest = text_digest(file_digest(path), kind, str(_READING_VERSION))
    if kind == ".parquet":
        return _open_parquet(path, digest, facts)
    if kind != ".csv" and not _is_list(path):
        rows = JsonLines(path=path, digest=digest, lines=_kept_lines(path, digest, path, facts), facts=facts)
    else:
        text = _kept(f"{digest}.jsonl", lambda target: _rewrite(path, target), path, facts)
        lines = _kept_lines(text, digest, path, facts)
        rows = JsonLines(path=text, digest=digest, lines=lines, facts=file_facts(text), is_rewritten=True)
    if not len(rows):
        raise ValueError("holds no rows")
    return rows


def _kept(name: str, write: Callable[[Path], object], source: Path, facts: list[int]) -> Path:
    """A file that is made of `source` once, and kept. Raises UserError if that is not as `facts` say any more."""
    path = cache_folder() / "read" / name

    def write_what_is_named(target: Path) -> None:
        write(target)
        _refuse_change(source, facts)  # else another content would be kept under this one's hash

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write_what_is_named)
    return path


def _refuse_change(path: Path, facts: list[int]) -> None:
    """Raises UserError if a file is not what it was when it had these `file_facts`."""
    if file_facts(path) != facts:
        raise UserError(f"{path}: has changed while it was read; start again when it is whole")


# ------------------------------------------------------------------------------------------------------------- lines


def _kept_lines(path: Path, digest: str, source: Path, facts: list[int]) -> NDArray[np.int64]:
    """`_lines` of a file of this content, found once; `source` is the file, or what it is rewritten from."""

    def write(target: Path) -> None:
        with open(target, "wb") as file:
            np.save(file, _lines(path))

    kept = _kept(f"{digest}.lines.npy", write, source, facts)
    with suppress(ValueError, OSError, EOFError):
        lines: NDArray[np.int64] = np.load(kept, mmap_mode="r" if kept.stat().st_size > _CHUNK else None)
        return lines
    kept.unlink(missing_ok=True)  # damaged
    return np.asarray(np.load(_kept(kept.name, write, source, facts)))


def _lines(path: Path) -> NDArray[np.int64]:
    """[R, 2] where each line begins that is not blank, in bytes, and its number from 1."""
    found = [np.empty((0, 2), dtype=np.int64)]
    position, number = 0, 1
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK) + file.readline():  # whole lines
            content = np.frombuffer(chunk, dtype=np.uint8)
            ends = np.flatnonzero(content == ord("\n")) + 1
            starts = np.concatenate([[0], ends if ends.size and ends[-1] < len(chunk) else ends[:-1]])
            lines = np.stack([starts + position, np.arange(len(starts)) + number], 1)
            suspects = np.isin(content[starts], list(b" \t\r\n\v\f" + _BOM))
            blank = np.zeros(len(starts), dtype=bool)
            for suspect in np.flatnonzero(suspects).tolist():
                end = starts[suspect + 1] if suspect + 1 < len(starts) else len(chunk)
                line = chunk[starts[suspect] : end]
                blank[suspect] = not (line.removeprefix(_BOM) if position + starts[suspect] == 0 else line).strip()
            found.append(lines[~blank])
            position += len(chunk)
            number += len(starts)
    return np.concatenate(found)


def _is_list(path: Path) -> bool:
    """Whether a JSON file is one list, and not an object in each line."""
    with open(path, "rb") as file:
        first = next(filter(bytes.strip, (line.removeprefix(_BOM) for line in file)), b"")
    return first.lstrip().startswith(b"[")


def _decode(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"line {number}: is not UTF-8 text ({error.reason})") from None


def _parse_json(text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise BadLine(f"line {line}: broken JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and lists in lists in lists
        raise BadLine(f"line {first_line}: JSON that cannot be read ({error})") from None


# ---------------------------------------------------------------------------------------------------------- rewriting


def _rewrite(path: Path, target: Path) -> None:
    """A CSV file, or a list in JSON, with an object in each line; in place of one that is none, its fault as text."""
    with open(target, "w", encoding="utf-8") as file:
        for row in _csv_rows(path) if path.suffix.lower() == ".csv" else _list_rows(path):
            file.write(json.dumps(row) + "\n")


def _text_lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield _decode(line, number)


def _list_rows(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        items = _parse_json("".join(_text_lines(path)))
    except BadLine as fault:  # nothing of a broken list can be relied on
        raise ValueError(str(fault)) from None
    for number, item in enumerate(items, 1):
        yield item if isinstance(item, dict) else f"row {number}: {_NO_OBJECT}"


def _csv_rows(path: Path) -> Iterator[dict[str, str] | str]:
    """The rows of a file whose first row names the columns; a short row lacks its last fields. Cells are text."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long conversation
    reader = csv.reader(_text_lines(path), strict=True)
    header: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {start}: broken CSV ({error})"
        except BadLine as fault:  # the lines behind it might belong to another row
            raise ValueError(str(fault)) from None
        else:
            if not header:
                header = cells
            elif cells:
                yield _csv_row(header, cells, start)


def _csv_row(header: Sequence[str], cells: Sequence[str], line: int) -> dict[str, str] | str:
    if len(cells) > len(header):
        return f"line {line}: has more cells than the header"
    return dict(zip(header, cells, strict=False))


def _open_parquet(path: Path, digest: str, facts: list[int]) -> DatasetRows:
    if parquet.read_metadata(path).num_rows == 0:
        raise ValueError("holds no rows")

    def write(target: Path) -> None:
        source = parquet.ParquetFile(path)
        with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, source.schema_arrow) as writer:
            for batch in source.iter_batches(_BATCH):
                writer.write_batch(batch)

    kept = _kept(f"{digest}.arrow", write, path, facts)
    return DatasetRows(rows=Dataset.from_file(str(kept)), digest=digest)
