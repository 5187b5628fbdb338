"""Rows are tokenised in shards, by however many processes, and kept by content: a pass that is killed goes on.

What decides a row's ids names a folder. In it every shard is a file that is whole from the moment it has its name, and
a process that makes one holds a lock on it that ends with the process. When all are there they become two files, see
`token_rows.py`, and go.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from open_po.config import MixturePart
from open_po.config.data import ScoredTurns
from open_po.data.content import cache_folder, text_digest
from open_po.data.formats import RowError, RowReader, row_reader
from open_po.data.row_files import BadLine, Rows
from open_po.data.token_rows import (
    KNOWN_SCHEMA,
    LISTS_SCHEMA,
    SCHEMA,
    Known,
    NoWholeFile,
    Outcome,
    TokenFile,
    read_batches,
    write_batches,
)
from open_po.data.tokenization import LeftOut, Lost, PreferencePair, Truncation, response_key, tokenise
from open_po.data.workers import run_workers
from open_po.output.files import waiting_lock, write_atomically
from open_po.output.progress import Progress

# Part of the name under which tokenised rows are kept: raise it when the same row gives other ids, or columns, than
# before.
_TOKENISATION_VERSION = 7
_ROWS_PER_WORKER = 500  # below, starting another process costs more than it saves
_SHARD_ROWS = 1024  # what a kill loses, of each process
_MOST_SHARDS = 4096
_BATCH_TOKENS = 2**20  # after which a batch is written: what a process holds of a shard
_POLL_SECONDS = 0.1  # between looks at what other processes have made


@dataclass(frozen=True, kw_only=True)
class Tokenisation:
    """The rows of a data set that become tokens, and how."""

    rows: Rows
    numbers: NDArray[np.int64]  # of the rows, ascending, each once
    part: MixturePart
    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str
    truncation: Truncation
    scored_turns: ScoredTurns

    @cached_property
    def folder(self) -> Path:
        """Where it is kept."""
        part = self.part
        which = hashlib.sha256(self.numbers.tobytes()).hexdigest() if self.is_subset else "all"
        reading = [str(part.format), str(part.prompt_template), _code(part.format)]
        how = [*reading, self.tokenizer_digest, str(self.truncation), self.scored_turns, str(_TOKENISATION_VERSION)]
        return cache_folder() / "tokenised" / text_digest(self.rows.digest, which, *how)

    @property
    def is_subset(self) -> bool:
        """Whether the data set has other rows."""
        return len(self.numbers) < len(self.rows)

    @property
    def lists(self) -> Path:
        """The token ids."""
        return self.folder / "ids.arrow"

    @property
    def known(self) -> Path:
        """What is known of each row; there only when the ids are."""
        return self.folder / "rows.arrow"

    def shard(self, number: int) -> Path:
        """A shard's file."""
        return self.folder / "shards" / f"{number:04d}.arrow"

    @cached_property
    def shards(self) -> int:
        """How many there are, whoever makes them."""
        return math.ceil(len(self.numbers) / self.shard_rows)

    @property
    def shard_rows(self) -> int:
        """Rows of a shard but for the last."""
        return max(_SHARD_ROWS, math.ceil(len(self.numbers) / _MOST_SHARDS))

    def rows_done(self) -> int:
        """Rows in the shards that are there."""
        if self.known.exists():
            return len(self.numbers)
        with suppress(OSError):
            return min(len(self.numbers), self.shard_rows * len(list(self.shard(0).parent.glob("[0-9]*.arrow"))))
        return 0


def _code(layout: str | None) -> str:
    """Hash of the module of a format of the user's own, MODULE:FUNCTION, whose code decides too."""
    name, colon, _ = (layout or "").partition(":")
    with suppress(OSError, TypeError):
        return text_digest(inspect.getsource(sys.modules[name])) if colon else ""
    return ""


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """Rows that are tokenised."""

    file: TokenFile
    known: Known
    places: NDArray[np.int64]  # of each row in the file


def read_tokenised(work: Tokenisation) -> Tokenised | None:
    """What is kept of it, also among all rows of its data set; None if that is not all, or damaged."""
    if work.is_subset and (whole := _read(replace(work, numbers=np.arange(len(work.rows))))) is not None:
        wanted = np.zeros(len(work.rows), dtype=bool)
        wanted[work.numbers] = True
        places = np.flatnonzero(wanted[whole.known.numbers("row")])
        return Tokenised(file=whole.file, known=whole.known.take(places), places=places)
    return _read(work)


def _read(work: Tokenisation) -> Tokenised | None:
    while True:
        there = work.known.exists()  # then the ids are too
        with suppress(NoWholeFile):
            file, known = TokenFile(work.lists), Known.read(work.known)
            if len(file) == len(known):
                return Tokenised(file=file, known=known, places=np.arange(len(known)))
        if there:
            work.known.unlink(missing_ok=True)
        if there or not work.known.exists():
            return None


def tokenise_rows(
    work: Tokenisation, *, label: str, num_workers: int | None, console: Console, check: Callable[[Known], object]
) -> Tokenised:
    """Tokenise what is not kept yet; all of it then.

    `check` sees the first of many rows, and the first of its errors ends it: what is wrong is often wrong everywhere.
    """
    while (found := read_tokenised(work)) is None:
        work.shard(0).parent.mkdir(parents=True, exist_ok=True)
        done = work.rows_done()
        with Progress(console, label, total=len(work.numbers), unit="rows", done=done) as bar:
            _make_all(work, num_workers, lambda: bar.advance(max(0, work.rows_done() - bar.done)), check)
        _merge(work)
    return found


def _make_all(
    work: Tokenisation, num_workers: int | None, show: Callable[[], object], check: Callable[[Known], object]
) -> None:
    """Make all shards; the first, of many, in this process."""
    if work.shards > 1:
        make_shards(work, range(1), show)
        with suppress(NoWholeFile):  # another process was quicker, and merged all; or see `_merge`
            check(Known.read(work.shard(0)))
    left = len(work.numbers) - work.rows_done()
    workers = min(
        num_workers or len(os.sched_getaffinity(0)),
        math.ceil(left / _ROWS_PER_WORKER),
        math.ceil(left / work.shard_rows),
    )
    if workers > 1:
        run_workers(make_shards, (work, range(work.shards)), workers, show)
    else:
        make_shards(work, range(work.shards), show)
    show()


def make_shards(work: Tokenisation, numbers: range, show: Callable[[], object] = lambda: None) -> None:
    """Make those of the shards `numbers` that nobody has made, and wait for those that others are making."""
    left = list(numbers)
    while left and not work.known.exists():
        others = []
        for number in left:
            if work.shard(number).exists():
                continue
            with _claim(work, number) as mine:
                if not mine:
                    others.append(number)
                elif not work.shard(number).exists() and not work.known.exists():
                    write_atomically(work.shard(number), partial(_write_shard, work, number))
            show()
        if len(others) == len(left):
            time.sleep(_POLL_SECONDS)
            show()
        left = others


@contextmanager
def _claim(work: Tokenisation, number: int) -> Iterator[bool]:
    """Whether a shard is this process's to make: it holds the shard's byte of a file locked while it does."""
    with open(work.folder / "claims", "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # no locks here: what two make is the same
            pass
        yield True


def _merge(work: Tokenisation) -> None:
    """The two files of all shards, which are removed; or of them one that is damaged alone, to be made again."""
    with waiting_lock(work.folder / "merging"):
        if work.known.exists():
            return
        tables: list[pa.RecordBatch] = []

        def write(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, LISTS_SCHEMA) as writer:
                for number in range(work.shards):
                    for batch in read_batches(work.shard(number)):
                        _part(batch, writer, tables)

        try:
            write_atomically(work.lists, write)
        except NoWholeFile as damaged:
            damaged.path.unlink(missing_ok=True)
            return
        known = pa.Table.from_batches(tables, KNOWN_SCHEMA).combine_chunks()
        write_atomically(work.known, lambda path: write_batches(path, iter(known.to_batches()), KNOWN_SCHEMA))
        shutil.rmtree(work.shard(0).parent, ignore_errors=True)


def _part(batch: pa.RecordBatch, writer: Any, tables: list[pa.RecordBatch]) -> None:
    """Write a batch's ids, and keep a copy of what else it has."""
    writer.write_batch(batch.select(LISTS_SCHEMA.names))
    known = batch.select(KNOWN_SCHEMA.names)
    tables.append(pa.ipc.read_record_batch(known.serialize(), known.schema))  # else the ids would stay in memory too


# ---------------------------------------------------------------------------------------------------------- one shard


def _write_shard(work: Tokenisation, number: int, path: Path) -> None:
    write_batches(path, _batches(work, number), SCHEMA)


def _batches(work: Tokenisation, number: int) -> Iterator[pa.RecordBatch]:
    """The rows of a shard, tokenised."""
    numbers = work.numbers[number * work.shard_rows :][: work.shard_rows]
    reader = row_reader(work.part.format, work.part.prompt_template)
    records: list[dict[str, Any]] = []
    tokens = 0
    for row_number, row in zip(numbers.tolist(), work.rows.read(numbers), strict=True):
        for record in _records(row, reader, work):
            records.append(record | {"row": row_number})
            tokens += sum(len(record[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if tokens > _BATCH_TOKENS:
            yield pa.RecordBatch.from_pylist(records, SCHEMA)
            records, tokens = [], 0
    if records:
        yield pa.RecordBatch.from_pylist(records, SCHEMA)


def _records(row: Any, reader: RowReader, work: Tokenisation) -> Iterator[dict[str, Any]]:
    """A row's pairs, or why it gives none. Faults are kept rather than raised, so that all of them can be told."""
    if isinstance(row, BadLine):
        yield _without_ids(Outcome.BAD_LINE, str(row), 0)
        return
    try:
        pairs = reader(row)
    except RowError as fault:
        yield _without_ids(Outcome.BAD_ROW, str(fault), 0)
        return
    if not pairs:
        yield _without_ids(Outcome.LEFT_OUT, reader.why_none(row), 0)
    for place, pair in enumerate(pairs, 1):
        number = place if len(pairs) > 1 else 0
        try:
            ids, lost = tokenise(pair, work.tokenizer, work.truncation, work.scored_turns)
        except RowError as fault:
            yield _without_ids(Outcome.BAD_ROW, str(fault), number)
        except LeftOut as reason:
            yield _without_ids(Outcome.LEFT_OUT, str(reason), number)
        else:
            yield _record(ids, lost, pair.scores, number)


def _without_ids(outcome: Outcome, why: str, number: int) -> dict[str, Any]:
    return _record(PreferencePair([], [], []), Lost(0, 0, 0), None, number, outcome, why)


def _record(
    ids: PreferencePair,
    lost: Lost,
    scores: tuple[float, float] | None,
    number: int,
    outcome: Outcome = Outcome.PAIR,
    why: str = "",
) -> dict[str, Any]:
    """A row of `SCHEMA`, but for its number."""
    prompt, chosen, rejected = ids.prompt_ids, ids.chosen_ids, ids.rejected_ids
    turns, scored = ids.turns, ids.scored_tokens
    better, worse = scores or (math.nan, math.nan)
    return {
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "turns": turns.flat(),
        "pair": number,
        "outcome": outcome.value,
        "why": why,
        "prompt_key": response_key(prompt, [], turns.prompt),
        "chosen_key": response_key(prompt, chosen, turns.prompt, turns.chosen),
        "rejected_key": response_key(prompt, rejected, turns.prompt, turns.rejected),
        "prompt_length": len(prompt),
        "chosen_length": len(chosen),
        "rejected_length": len(rejected),
        "prompt_lost": lost.prompt,
        "chosen_lost": lost.chosen,
        "rejected_lost": lost.rejected,
        "prompt_scored": scored[0],
        "chosen_scored": scored[1],
        "rejected_scored": scored[2],
        "highest_id": max(chain(prompt, chosen, rejected), default=0),
        "chosen_score": better,
        "rejected_score": worse,
    }
