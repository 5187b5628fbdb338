"""Where rows come from: files and Hub datasets, mixed by fraction or count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import Dataset

from open_po.config import mixture
from open_po.errors import UserError

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# Rows of a subset, and the order of a mixture, are drawn by this constant and not by the run's seed, so that a sweep
# over seeds trains on the same rows and finds their reference log-probs in the cache.
_DRAW_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of one dataset that a mixture takes."""

    name: str  # for messages
    rows: Dataset
    row_numbers: list[int]  # of each row in its dataset, from 1

    def draw(self, count: int) -> Part:
        """`count` rows in their old order."""
        if count == len(self.rows):
            return self
        drawn = sorted(_order(len(self.rows))[:count])
        return Part(name=self.name, rows=self.rows.select(drawn), row_numbers=[self.row_numbers[i] for i in drawn])


def load_mixture(items: Sequence[str], splits: Sequence[str], max_rows: int | None = None) -> list[Part]:
    """The rows of each part of a mixture.

    `items` and `splits` are `mixer_list` and `mixer_list_splits`. With `max_rows`, the parts are thinned by one draw
    over the whole mixture. Raises UserError for what cannot be read.
    """
    wanted = mixture(items)
    per_part = list(splits) * len(wanted) if len(splits) == 1 else splits
    parts: list[Part] = []
    for (name, amount), split in zip(wanted, per_part, strict=True):
        rows = _load(name, split)
        part = Part(name=f"{name} ({split})", rows=rows, row_numbers=list(range(1, len(rows) + 1)))
        count = amount if isinstance(amount, int) else max(1, round(amount * len(rows)))
        if count > len(rows):
            raise UserError(f"mixer_list asks for {count} rows of {name} split {split}, which has {len(rows)}")
        parts.append(part.draw(count))
    return parts if max_rows is None else _thin(parts, max_rows)


def _thin(parts: list[Part], count: int) -> list[Part]:
    """`count` rows drawn from all parts together."""
    owners = [index for index, part in enumerate(parts) for _ in part.row_numbers]
    shares = Counter(owners[position] for position in _order(len(owners))[:count])
    return [part.draw(shares[index]) for index, part in enumerate(parts) if shares[index]]


def _order(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(_DRAW_SEED)
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


def _load(name: str, split: str) -> Dataset:
    path = Path(name).expanduser()
    is_file = path.suffix in _LOADERS
    if is_file and not path.is_file():
        raise UserError(f"{name}: no such file; data are .jsonl, .json, .csv or .parquet files, or Hub names")
    if is_file and path.stat().st_size == 0:
        raise UserError(f"{name}: the file is empty")
    try:
        if is_file:
            rows = datasets.load_dataset(_LOADERS[path.suffix], data_files={"train": str(path)}, split=split)
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets wraps parser, file and network errors in types of its own
        raise UserError(_why_not_loaded(name, path if is_file else None, split, error)) from error
    if len(rows) == 0:
        raise UserError(f"{name}: split {split} holds no rows")
    return rows


def _why_not_loaded(name: str, path: Path | None, split: str, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if path is None:
        return f"{name}: neither a local file nor a Hub dataset that can be reached, split {split} ({reason})"
    if _LOADERS[path.suffix] == "json":
        broken = _first_json_error(path)
        if broken:
            return broken
    return f"{name}: cannot be read as {path.suffix[1:]}, split {split} ({reason})"


def _first_json_error(path: Path) -> str | None:
    """File and line of the first JSON error, or None if every line (or the whole file) parses."""
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        return f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"{path}, line {error.lineno}: broken JSON ({error.msg}, column {error.colno})"
        return None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno})"
        if not isinstance(row, dict):
            return f"{path}, line {number}: is not a JSON object with named fields"
    return None
