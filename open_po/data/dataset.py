"""All pairs of a mixture, tokenised once, in parallel, and kept on disk by `datasets`."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from open_po.config import MixturePart
from open_po.config.data import ScoredTurns
from open_po.data.formats import RowError, parse_row
from open_po.data.rows_bar import rows_bar
from open_po.data.sources import SourceRows, load_mixture, row_fields
from open_po.data.tokenization import (
    KEY_DTYPE,
    LeftOut,
    Lost,
    PreferencePair,
    Truncation,
    response_key,
    tokenise,
    tokenizer_digest,
)
from open_po.data.turns import Turns
from open_po.errors import UserError
from open_po.output.summary import DataTotals

# Part of the name under which tokenised rows are kept: raise it when the same row gives other ids, or columns, than
# before.
_TOKENISATION_VERSION = 6
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_ROWS_PER_WORKER = 500  # below, starting another process costs more than it saves


@dataclass(frozen=True, kw_only=True)
class Source:
    """What came of one part of a mixture."""

    dataset: str  # its name in the mixture
    name: str  # for messages
    available: int  # rows that there are
    rows: int  # that the mixture takes
    pairs: int  # that train


@dataclass(frozen=True, kw_only=True)
class PairDataset:
    """Tokenised pairs by index, their lengths, and what was left out.

    Lengths are arrays [P] of token counts. Numbers, from 0 on, name equal prompts, and equal responses to equal
    prompts; what is scored of them is equal then too.
    """

    rows: Dataset  # with prompt_ids, chosen_ids, rejected_ids and turns
    origins: Sequence[str]  # where each pair came from, for messages
    prompt_lengths: NDArray[np.int64]
    chosen_lengths: NDArray[np.int64]
    rejected_lengths: NDArray[np.int64]
    scored: NDArray[np.int64]  # [P, 3] tokens of prompt, chosen and rejected that are scored
    response_keys: NDArray[np.void]  # [P, 2] `response_key` of chosen and rejected, 16 bytes each
    prompt_numbers: NDArray[np.int64]  # [P]
    response_numbers: NDArray[np.int64]  # [P, 2], chosen and rejected
    highest_id: int  # of all tokens
    left_out: Mapping[str, Sequence[str]]  # origins of the rows that cannot train, by reason
    lost: NDArray[np.int64]  # [P, 3] tokens that truncation took from prompt, chosen and rejected
    sources: Sequence[Source]  # the pairs of the first come first, and so on

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: int) -> PreferencePair:
        row = self.rows[int(index)]
        return PreferencePair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], Turns.of(row["turns"]))

    @property
    def by_source(self) -> dict[str, int]:
        """Pairs from each data set, by its name in the mixture."""
        counts = dict.fromkeys((source.dataset for source in self.sources), 0)
        for source in self.sources:
            counts[source.dataset] += source.pairs
        return counts

    @property
    def truncated_prompts(self) -> int:
        """How many pairs lost tokens of the prompt."""
        return int((self.lost[:, 0] > 0).sum())

    @property
    def truncated_responses(self) -> int:
        """How many pairs lost tokens of a response."""
        return int((self.lost[:, 1:] > 0).any(1).sum())

    def token_ids(self) -> set[int]:
        """Every token id that occurs."""
        found: set[int] = set()
        for rows in self.rows.with_format("arrow").iter(10_000):
            for name in _IDS:
                found.update(rows[name].combine_chunks().flatten().unique().to_pylist())
        return found

    @property
    def longest_pair(self) -> int:
        """Index of the pair with the longest row."""
        return int(self._row_lengths.argmax())

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with one of its responses."""
        return int(self._row_lengths.max())

    @property
    def _row_lengths(self) -> NDArray[np.int64]:
        longer: NDArray[np.int64] = self.prompt_lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)
        return longer

    def totals(self) -> DataTotals:
        """What became of the rows, in numbers."""
        return DataTotals(
            pairs=len(self),
            by_source=self.by_source,
            left_out={reason: len(origins) for reason, origins in self.left_out.items()},
            truncated_prompts=self.truncated_prompts,
            truncated_responses=self.truncated_responses,
        )

    def describe(self) -> list[str]:
        """Lines for the console: how many pairs, how long, and every row that was left out, by reason."""
        tokens = int(2 * self.prompt_lengths.sum() + self.chosen_lengths.sum() + self.rejected_lengths.sum())
        lines = [f"{len(self):,} pairs, {tokens:,} tokens (prompts counted with each response)"]
        if self.truncated_prompts or self.truncated_responses:
            lines.append(f"truncated: {self.truncated_prompts} prompts, responses of {self.truncated_responses} pairs")
        if earlier := int(self.scored[:, 0].sum()):
            count = int((self.scored[:, 0] > 0).sum())
            lines.append(f"scored turns: {earlier:,} tokens of the assistant's in the prompts of {count:,} pairs")
        for reason, origins in self.left_out.items():
            shown = "; ".join(origins[:3]) + ("; ..." if len(origins) > 3 else "")
            lines.append(f"left out: {len(origins)} rows, {reason} ({shown})")
        return lines


def load_pairs(
    mixture: Sequence[MixturePart],
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    *,
    scored_turns: ScoredTurns = "last",
    max_rows: int | None = None,
    num_workers: int | None = None,
    console: Console | None = None,
) -> PairDataset:
    """The pairs of a mixture; on `console`, if there is one, with a bar for each part.

    Raises UserError naming the first rows that cannot be read, or if no row can train.
    """
    all_parts = load_mixture(mixture, max_rows)
    parts = [part for part in all_parts if part.row_numbers]
    console = console or Console(quiet=True)
    tokenised = [_tokenise_part(part, tokenizer, truncation, scored_turns, num_workers, console) for part in parts]
    origins = [f"{part.name} row {number}" for part in parts for number in part.row_numbers]
    rows = datasets.concatenate_datasets(tokenised) if len(tokenised) > 1 else tokenised[0]
    _stop_at_errors(rows["error"][:], origins)
    reasons = rows["left_out"][:]
    left_out = _left_out(reasons, origins)
    kept = [index for index, reason in enumerate(reasons) if not reason]
    if not kept:
        words = " ".join(f"{part.dataset} {part.amount}" for part in mixture)
        counts = ", ".join(f"{len(where)} {reason}" for reason, where in left_out.items())
        raise UserError(f"{words}: none of {len(origins)} rows can train ({counts})")
    trainable = rows.select(kept)
    columns = trainable.with_format("numpy", columns=["lengths", "lost", "scored"])[:]
    lengths, lost, scored = (columns[name].astype(np.int64) for name in ("lengths", "lost", "scored"))
    chosen_keys, rejected_keys = trainable["chosen_key"][:], trainable["rejected_key"][:]
    by_side = np.frombuffer(b"".join(chain(chosen_keys, rejected_keys)), dtype=KEY_DTYPE).reshape(2, -1)
    return PairDataset(
        rows=trainable.select_columns([*_IDS, "turns"]),
        origins=[origins[index] for index in kept],
        prompt_lengths=lengths[:, 0],
        chosen_lengths=lengths[:, 1],
        rejected_lengths=lengths[:, 2],
        scored=scored,
        response_keys=np.ascontiguousarray(by_side.T),
        prompt_numbers=_numbers(trainable["prompt_key"][:]),
        response_numbers=_numbers([*chosen_keys, *rejected_keys]).reshape(2, -1).T,
        highest_id=max(trainable["highest_id"][:]),
        left_out=left_out,
        lost=lost,
        sources=list(_sources(all_parts, reasons)),
    )


def _left_out(reasons: Sequence[str], origins: Sequence[str]) -> dict[str, list[str]]:
    """The origins of rows that have a reason to be left out, by reason."""
    found: dict[str, list[str]] = {}
    for origin, reason in zip(origins, reasons, strict=True):
        if reason:
            found.setdefault(reason, []).append(origin)
    return found


def _sources(parts: Sequence[SourceRows], reasons: Sequence[str]) -> Iterator[Source]:
    """What came of each part; `reasons` of all their rows, empty for one that trains."""
    start = 0
    for part in parts:
        end = start + len(part.rows)
        pairs = sum(not reason for reason in reasons[start:end])
        yield Source(dataset=part.source, name=part.name, available=part.available, rows=end - start, pairs=pairs)
        start = end


def _numbers(keys: Sequence[bytes]) -> NDArray[np.int64]:
    """Small numbers, equal where the keys are."""
    found: dict[bytes, int] = {}
    return np.fromiter((found.setdefault(key, len(found)) for key in keys), dtype=np.int64, count=len(keys))


def _stop_at_errors(errors: Sequence[str], origins: Sequence[str]) -> None:
    bad = [(origin, error) for origin, error in zip(origins, errors, strict=True) if error]
    if bad:
        origin, error = bad[0]
        more = Counter(error for _, error in bad)[error] - 1
        others = len(bad) - 1 - more
        rest = [f"{more} more like it"] * bool(more) + [f"{others} with other faults"] * bool(others)
        raise UserError(f"{origin}: {error}" + (f" (rows: {', '.join(rest)})" if rest else ""))


def _tokenise_part(
    part: SourceRows,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    scored_turns: ScoredTurns,
    num_workers: int | None,
    console: Console,
) -> Dataset:
    workers = num_workers or len(os.sched_getaffinity(0))
    workers = min(workers, math.ceil(len(part.rows) / _ROWS_PER_WORKER))
    # `datasets` would hash the tokenizer's pickle, which changes between processes: name the result by its content.
    named = [tokenizer_digest(tokenizer), str(truncation), scored_turns, str(_TOKENISATION_VERSION)]
    key = [part.rows._fingerprint, *named]
    with rows_bar(console, f"Tokenising {part.name}"):
        return part.rows.map(
            _tokenise_row,
            fn_kwargs={"tokenizer": tokenizer, "truncation": truncation, "scored_turns": scored_turns},
            remove_columns=part.rows.column_names,
            features=_FEATURES,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=hashlib.sha256("\0".join(key).encode()).hexdigest()[:32],
        )


_FEATURES = datasets.Features(
    {
        "prompt_ids": datasets.List(datasets.Value("int32")),
        "chosen_ids": datasets.List(datasets.Value("int32")),
        "rejected_ids": datasets.List(datasets.Value("int32")),
        "prompt_key": datasets.Value("binary"),
        "chosen_key": datasets.Value("binary"),
        "rejected_key": datasets.Value("binary"),
        "turns": datasets.List(datasets.List(datasets.Value("int32"))),
        "lengths": datasets.List(datasets.Value("int64"), length=3),
        "scored": datasets.List(datasets.Value("int64"), length=3),
        "highest_id": datasets.Value("int64"),
        "lost": datasets.List(datasets.Value("int64"), length=3),
        "error": datasets.Value("string"),
        "left_out": datasets.Value("string"),
    }
)


def _tokenise_row(
    row: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerBase, truncation: Truncation, scored_turns: ScoredTurns
) -> dict[str, Any]:
    """One row of `_FEATURES`. Faults are returned rather than raised, so that all of them can be reported."""
    pair, lost, error, left_out = PreferencePair([], [], []), Lost(0, 0, 0), "", ""
    try:
        pair, lost = tokenise(parse_row(row_fields(row)), tokenizer, truncation, scored_turns)
    except RowError as fault:
        error = str(fault)
    except LeftOut as reason:
        left_out = str(reason)
    parts, turns = [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids], pair.turns
    return {
        "prompt_ids": parts[0],
        "chosen_ids": parts[1],
        "rejected_ids": parts[2],
        "turns": turns.flat(),
        "prompt_key": response_key(parts[0], [], turns.prompt),
        "chosen_key": response_key(parts[0], parts[1], turns.prompt, turns.chosen),
        "rejected_key": response_key(parts[0], parts[2], turns.prompt, turns.rejected),
        "lengths": [len(part) for part in parts],
        "scored": list(pair.scored_tokens),
        "highest_id": max(chain(*parts), default=0),
        "lost": list(lost),
        "error": error,
        "left_out": left_out,
    }
