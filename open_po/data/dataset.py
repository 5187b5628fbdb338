"""All pairs of a mixture, tokenised once, in parallel, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from open_po.config import MixturePart
from open_po.config.data import ScoredTurns
from open_po.data.formats import row_reader
from open_po.data.keys import key_numbers
from open_po.data.part_totals import left_out_rows, part_totals
from open_po.data.selection import LeftOutRows, PartRows, Selection, apply_filters, leave_out_repeated, origin
from open_po.data.sources import SourceRows, load_mixture
from open_po.data.token_rows import IdColumn, Known, TokenRows
from open_po.data.token_shards import Tokenisation, tokenise_rows
from open_po.data.tokenization import PreferencePair, Truncation, tokenizer_digest
from open_po.data.turns import Turns
from open_po.errors import UserError
from open_po.output.summary import DataTotals, PartTotals

_CHUNK = 10_000  # pairs whose ids are read at a time
_EVERYTHING = Selection()


class StoredRows(Protocol):
    """Token ids by row, wherever they are."""

    def __getitem__(self, place: int) -> Mapping[str, Any]: ...

    def gather(self, places: NDArray[np.int64]) -> list[IdColumn]:
        """The ids of several rows: prompts, chosen and rejected responses."""


@dataclass(frozen=True, kw_only=True)
class PairDataset:
    """Tokenised pairs by index, their lengths, and what was left out. The ids stay on disk.

    Lengths are arrays [P] of token counts. Numbers, from 0 on, name equal prompts, and equal responses to equal
    prompts; what is scored of them is equal then too.
    """

    rows: StoredRows
    places: NDArray[np.int64]  # [P] of each pair among the rows: pairs that are repeated share one
    row_numbers: NDArray[np.int64]  # [P] from 1, in the part's file, or in the split of a Hub dataset
    pair_numbers: NDArray[np.int32]  # [P] from 1, of a row that gives several; else 0
    prompt_lengths: NDArray[np.int64]
    chosen_lengths: NDArray[np.int64]
    rejected_lengths: NDArray[np.int64]
    scored: NDArray[np.int64]  # [P, 3] tokens of prompt, chosen and rejected that are scored
    prompt_keys: NDArray[np.void]  # [P] `response_key` of the prompt without a response, 16 bytes
    response_keys: NDArray[np.void]  # [P, 2] `response_key` of chosen and rejected, 16 bytes each
    prompt_numbers: NDArray[np.int64]  # [P]
    response_numbers: NDArray[np.int64]  # [P, 2], chosen and rejected
    highest_id: int  # of all tokens
    left_out: Mapping[str, LeftOutRows]  # the rows that do not train, by reason
    lost: NDArray[np.int64]  # [P, 3] tokens that truncation took from prompt, chosen and rejected
    sources: Sequence[PartTotals]  # the pairs of the first come first, and so on

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> PreferencePair:
        row = self.rows[int(self.places[index])]
        return PreferencePair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], Turns.of(row["turns"]))

    def origin(self, index: int) -> str:
        """Where a pair came from, for messages."""
        ends = np.cumsum([source.pairs for source in self.sources])
        source = self.sources[int(np.searchsorted(ends, index, side="right"))]
        return origin(source.name, int(self.row_numbers[index]), int(self.pair_numbers[index]))

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

    @property
    def chosen_tokens(self) -> NDArray[np.int64]:
        """[P] tokens that are scored with the chosen response, those of its prompt included."""
        tokens: NDArray[np.int64] = self.scored[:, 0] + self.scored[:, 1]
        return tokens

    @property
    def prompt_and_chosen_tokens(self) -> NDArray[np.int64]:
        """[P] tokens of the prompt but the first, which is predicted by nothing, and of the chosen response."""
        tokens: NDArray[np.int64] = self.prompt_lengths - 1 + self.scored[:, 1]
        return tokens

    def columns(self, chunk: int = _CHUNK) -> Iterator[list[IdColumn]]:
        """The ids of prompts, chosen and rejected responses, `chunk` pairs at a time."""
        for start in range(0, len(self), chunk):
            yield self.rows.gather(self.places[start : start + chunk])

    def token_ids(self) -> set[int]:
        """Every token id that occurs."""
        found = np.zeros(self.highest_id + 1, dtype=bool)
        for columns in self.columns():
            for column in columns:
                found[column.ids] = True
        return set(np.flatnonzero(found).tolist())

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

    def identity(self) -> list[dict[str, str | int]]:
        """What the pairs of each part are, by their tokens; equal for equal pairs in equal order."""
        found: list[dict[str, str | int]] = []
        start = 0
        for source in self.sources:
            keys = self.response_keys[start : start + source.pairs]
            start += source.pairs
            digest = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
            found.append({"name": source.name, "pairs": source.pairs, "digest": digest})
        return found

    def totals(self) -> DataTotals:
        """What became of the rows, in numbers."""
        return DataTotals(
            pairs=len(self),
            by_source=self.by_source,
            left_out={reason: rows.count for reason, rows in self.left_out.items()},
            truncated_prompts=self.truncated_prompts,
            truncated_responses=self.truncated_responses,
            parts=list(self.sources),
            left_out_first={reason: rows.first for reason, rows in self.left_out.items()},
        )

    def describe(self) -> list[str]:
        """Lines for the console: how many pairs, how long, and which rows were left out, by reason."""
        sides = 1 + (self.rejected_lengths > 0)
        tokens = int((sides * self.prompt_lengths + self.chosen_lengths + self.rejected_lengths).sum())
        lines = [f"{len(self):,} pairs, {tokens:,} tokens (prompts counted with each response)"]
        if repeated := sum(source.repeated for source in self.sources):
            lines[0] += f"; rows are repeated {repeated:,} times"
        if self.truncated_prompts or self.truncated_responses:
            lines.append(f"truncated: {self.truncated_prompts} prompts, responses of {self.truncated_responses} pairs")
        if earlier := int(self.scored[:, 0].sum()):
            count = int((self.scored[:, 0] > 0).sum())
            lines.append(f"scored turns: {earlier:,} tokens of the assistant's in the prompts of {count:,} pairs")
        for reason, rows in self.left_out.items():
            shown = "; ".join(rows.first) + ("; ..." if rows.more else "")
            lines.append(f"left out: {rows.count} rows, {reason} ({shown})")
        return lines


def load_pairs(
    mixture: Sequence[MixturePart],
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    *,
    selection: Selection = _EVERYTHING,
    scored_turns: ScoredTurns = "last",
    max_rows: int | None = None,
    num_workers: int | None = None,
    console: Console | None = None,
) -> PairDataset:
    """The pairs of a mixture; on `console`, if there is one, with a bar for each part.

    Raises UserError naming the first rows that cannot be read, or if no row can train.
    """
    sources = load_mixture(mixture, max_rows)
    digest = tokenizer_digest(tokenizer)
    files, parts = [], []
    for source in sources:
        if not len(source.taken):
            continue
        work = _work(source, tokenizer, digest, truncation, scored_turns)
        check = partial(_stop_early, source) if not selection.skip_bad_rows else _look
        found = tokenise_rows(
            work,
            label=f"Tokenising {source.name}",
            num_workers=num_workers,
            console=console or Console(quiet=True),
            check=check,
        )
        files.append(found.file)
        parts.append(PartRows(source=source, known=found.known, places=found.places))
    apply_filters(parts, selection)
    return _dataset(sources, parts, TokenRows(files), selection)


def _work(
    source: SourceRows,
    tokenizer: PreTrainedTokenizerBase,
    digest: str,
    truncation: Truncation,
    scored_turns: ScoredTurns,
) -> Tokenisation:
    part = source.part
    try:
        row_reader(part.format, part.prompt_template)
    except ValueError as error:
        raise UserError(f"{part.dataset}: {error}") from error
    return Tokenisation(
        rows=source.rows,
        numbers=source.times[0],
        part=part,
        tokenizer=tokenizer,
        tokenizer_digest=digest,
        truncation=truncation,
        scored_turns=scored_turns,
    )


def _look(known: Known) -> None:
    """What stops no run."""


def _stop_early(source: SourceRows, known: Known) -> None:
    """Raises UserError if rows among the first ones cannot be read."""
    PartRows(source=source, known=known, places=np.arange(len(known))).stop_at_bad_rows()


def _dataset(
    sources: Sequence[SourceRows], parts: Sequence[PartRows], rows: TokenRows, selection: Selection
) -> PairDataset:
    """The pairs that train, each as often as its row is taken. Raises UserError if there are none."""
    if not any(part.keeps.any() for part in parts):
        _refuse(parts)
    response_keys = np.concatenate([_response_keys(part) for part in parts])
    if selection.deduplicate:
        stay = leave_out_repeated(parts, key_numbers(response_keys.T.ravel()).reshape(2, -1).T)
        response_keys = response_keys[stay]
    prompt_keys = np.concatenate([part.known.keys("prompt_key")[part.keeps] for part in parts])
    kept = [_repeated(part) for part in parts]  # places in the part's rows, in the order of training
    inner = _inner(parts, kept)  # the same among the rows that stay, of all parts

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([part.known.numbers(name)[places] for part, places in zip(parts, kept, strict=True)])

    def sides(what: str) -> NDArray[np.int64]:
        return np.concatenate([part.known.sides(what)[places] for part, places in zip(parts, kept, strict=True)])

    lengths = sides("length")
    return PairDataset(
        rows=rows,
        places=rows.numbered([part.places[places] for part, places in zip(parts, kept, strict=True)]),
        row_numbers=column("row") + 1,
        pair_numbers=column("pair"),
        prompt_lengths=np.ascontiguousarray(lengths[:, 0]),
        chosen_lengths=np.ascontiguousarray(lengths[:, 1]),
        rejected_lengths=np.ascontiguousarray(lengths[:, 2]),
        scored=sides("scored"),
        prompt_keys=prompt_keys[inner],
        response_keys=response_keys[inner],
        prompt_numbers=key_numbers(prompt_keys)[inner],
        response_numbers=key_numbers(response_keys.T.ravel()).reshape(2, -1).T[inner],
        highest_id=int(column("highest_id").max()),
        left_out=left_out_rows(parts),
        lost=sides("lost"),
        sources=list(part_totals(sources, parts, kept)),
    )


def _refuse(parts: Sequence[PartRows]) -> None:
    asked = " ".join(f"{part.source.part.dataset} {part.source.part.amount}" for part in parts)
    total = sum(len(part.known) for part in parts)
    counts = ", ".join(f"{rows.count} {reason}" for reason, rows in left_out_rows(parts).items())
    raise UserError(f"{asked}: none of {total} rows can train ({counts})")


def _response_keys(part: PartRows) -> NDArray[np.void]:
    """[K, 2] of the rows that train."""
    sides = [part.known.keys(name)[part.keeps] for name in ("chosen_key", "rejected_key")]
    return np.stack(sides, 1)


def _repeated(part: PartRows) -> NDArray[np.int64]:
    """Places of the rows that train: all in order, then those that are taken twice, and so on."""
    taken, times = part.source.times
    places = np.flatnonzero(part.keeps)
    wanted = times[np.searchsorted(taken, part.known.numbers("row")[places])]
    return np.concatenate([places[wanted > turn] for turn in range(int(times.max()))])


def _inner(parts: Sequence[PartRows], kept: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Where each of `kept` stands when the rows that do not train are gone, counted through all parts."""
    found, before = [], 0
    for part, places in zip(parts, kept, strict=True):
        found.append(np.cumsum(part.keeps)[places] - 1 + before)
        before += int(part.keeps.sum())
    return np.concatenate(found)
