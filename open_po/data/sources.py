"""Where rows come from: files and Hub datasets, mixed by fraction or count."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from datasets import Dataset
from pyarrow import parquet

from open_po.config import MixturePart
from open_po.errors import UserError

_FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
_TYPES = ", ".join(_FILE_TYPES)

# Rows of a subset, and the order of a mixture, are drawn by this constant and not by the run's seed, so that a sweep
# over seeds trains on the same rows and finds their reference log-probs in the cache.
_DRAW_SEED = 0

# `datasets` guesses the types of a JSON or CSV column from its values: answers that look like dates become timestamps
# and are changed even if text is asked for, `007` becomes 7, and `NA` is taken for a missing answer. So the rows of
# these files are kept whole, as JSON, in one column.
_JSON_ROW = "open_po_json_row"
_READING_VERSION = 1  # part of the name under which they are kept: raise it when a file gives other rows than before


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """The rows of one dataset that a mixture takes."""

    source: str  # its name in the mixture
    name: str  # for messages
    rows: Dataset  # `row_fields` reads one
    row_numbers: Sequence[int]  # of each row, from 1: in the file, or in the split of a Hub dataset
    available: int  # rows that there were to take from

    def draw(self, count: int) -> SourceRows:
        """`count` rows in their old order."""
        if count == len(self.rows):
            return self
        drawn = sorted(_order(len(self.rows))[:count])
        numbers = [self.row_numbers[i] for i in drawn]
        return replace(self, rows=self.rows.select(drawn), row_numbers=numbers)


def load_mixture(mixture: Sequence[MixturePart], max_rows: int | None = None) -> list[SourceRows]:
    """The rows of each part of a mixture.

    With `max_rows`, the parts are thinned by one draw over the whole mixture, in which one may get none. Raises
    UserError for what cannot be read.
    """
    parts: list[SourceRows] = []
    for wanted in mixture:
        name, amount, split = wanted.dataset, wanted.amount, wanted.split
        part = _load(name, split)
        available = len(part.rows)
        count = amount if isinstance(amount, int) else max(1, round(amount * available))
        if count > available:
            raise UserError(f"{name}: {count} rows are asked for, split {split} has {available}")
        parts.append(part.draw(count))
    return parts if max_rows is None else _thin(parts, max_rows)


def row_fields(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a row of `SourceRows.rows`, by name."""
    return cast(Mapping[str, Any], json.loads(row[_JSON_ROW])) if _JSON_ROW in row else row


def is_data_file(name: str) -> bool:
    """Whether a data set's name is that of a file here, of any type, or can only be one."""
    path = Path(name).expanduser()
    return path.suffix.lower() in _FILE_TYPES or path.is_file()


def _thin(parts: list[SourceRows], count: int) -> list[SourceRows]:
    """`count` rows drawn from all parts together."""
    owners = [index for index, part in enumerate(parts) for _ in part.row_numbers]
    shares = Counter(owners[position] for position in _order(len(owners))[:count])
    return [part.draw(shares[index]) for index, part in enumerate(parts)]


def _order(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(_DRAW_SEED)
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


# ----------------------------------------------------------------------------------------------------------- reading


def _load(name: str, split: str) -> SourceRows:
    """All rows of a split. Raises UserError if there are none or they cannot be read."""
    path, is_file = Path(name).expanduser(), is_data_file(name)
    try:
        if is_file:
            rows = _load_file(path)
            indices = _slice(split, len(rows))
            numbers: Sequence[int] = [index + 1 for index in indices]
            shown, rows = name, rows.select(indices)
        else:
            shown, rows = f"{name} ({split})", datasets.load_dataset(name, split=split)
            numbers = range(1, len(rows) + 1)
        part = SourceRows(source=name, name=shown, rows=rows, row_numbers=numbers, available=len(numbers))
    except Exception as error:  # datasets wraps parser, file and network errors in types of its own
        reason = _root_cause(error)
        if not is_file:
            reason = f"neither a file ({_TYPES}) nor a Hub dataset that can be loaded, split {split} ({reason})"
        raise UserError(f"{name}: {reason}") from error
    if not part.row_numbers:
        raise UserError(f"{name}: split {split} holds no rows")
    return part


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _load_file(path: Path) -> Dataset:
    """The rows of a file. Raises ValueError with one line, or what `datasets` raises."""
    kind = path.suffix.lower()
    if kind not in _FILE_TYPES:
        raise ValueError(f"is of no known type; data files are {_TYPES}")
    if not path.is_file():
        raise ValueError(f"is no file; data are {_TYPES} files, or Hub names")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    if kind == ".parquet":
        if parquet.read_metadata(path).num_rows == 0:
            raise ValueError("holds no rows")
        return datasets.load_dataset("parquet", data_files={"train": glob.escape(str(path))}, split="train")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return Dataset.from_generator(
        _text_rows,
        gen_kwargs={"path": path},
        features=datasets.Features({_JSON_ROW: datasets.Value("string")}),
        fingerprint=f"{digest}-{kind[1:]}-{_READING_VERSION}",
    )


def _slice(split: str, length: int) -> list[int]:
    """Indices of the rows of a file that a split such as `train[:90%]` takes. Raises ValueError."""
    spans = datasets.ReadInstruction.from_spec(split).to_absolute({"train": length})
    return [index for span in spans for index in range(span.from_, span.to)]


def _text_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a JSON or CSV file, each as JSON. Raises ValueError naming the line that is wrong."""
    empty = True
    for row in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path):
        empty = False
        yield {_JSON_ROW: row}
    if empty:
        raise ValueError("holds no rows")


def _json_rows(path: Path) -> Iterator[str]:
    """The objects of a file that is one list of them, or has one in each line."""
    if next(filter(str.strip, _lines(path)), "").lstrip().startswith("["):
        for number, item in enumerate(_parse_json("".join(_lines(path))), 1):
            if not isinstance(item, dict):
                raise ValueError(f"row {number}: is not a JSON object with named fields")
            yield json.dumps(item)
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            if not isinstance(_parse_json(line.rstrip(), number), dict):
                raise ValueError(f"line {number}: is not a JSON object with named fields")
            yield line.strip()


def _parse_json(text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"line {line}: broken JSON ({error.msg}, column {error.colno})") from None


def _csv_rows(path: Path) -> Iterator[str]:
    """The rows of a file whose first row names the columns; a short row lacks its last fields."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long conversation
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            if not header:
                header = cells
            elif len(cells) > len(header):
                raise ValueError(f"line {start}: has more cells than the header")
            elif cells:
                yield json.dumps(dict(zip(header, cells, strict=False)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {start}: broken CSV ({error})") from None


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: is not UTF-8 text ({error.reason})") from None
