"""The reference log-probs of one model under one numerics: rows by response, found in the files of several folders.

A store is a folder `CACHE_DIR/KEY`. The key is the hash of what decides its numbers, which `manifest.json` repeats: the
content of the model's files and its numerics. Beside it lie files of rows (`shards.py`), each complete from the moment
it has its name, and the claims of processes that are computing more (`claims.py`). Nothing about the data set, the
loss, beta, packing, ranks or seed is in the key. Folders of the same key under other cache directories can lie beneath,
to be read only.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from open_po.data import PairDataset
from open_po.data.tokenization import KEY_DTYPE
from open_po.errors import UserError
from open_po.losses import PairLogps
from open_po.output.files import write_atomically
from open_po.reference.shards import (
    DamagedShard,
    Keys,
    Row,
    Shard,
    find,
    read_shard,
    set_aside,
    shard_files,
    write_shard,
)

MANIFEST = "manifest.json"
FORMAT = 2  # of the store's files; 1 was Parquet
_VISIBLE_SECONDS = 60.0  # how late a shared file system may show what another machine has written
_LEFTOVER_SECONDS = 3600.0  # an unfinished file older than this was left by a process that was killed


@dataclass(frozen=True, kw_only=True)
class StoreKey:
    """What decides the numbers of a store."""

    model: dict[str, str]  # see `model_identity`
    numerics: dict[str, str | int]  # see `Numerics.key`

    @property
    def digest(self) -> str:
        """Name of the store's folder."""
        text = json.dumps(vars(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class ReferenceStore:
    """The rows of one key: those on disk, and those added by this process, each response once.

    `folder` takes new files; `beneath` are only read. `by_token`: only rows with the log-prob of each token count.
    `warn` gets a line for files that are damaged; these are set aside and their rows count as missing.
    """

    def __init__(
        self, folder: Path, *, beneath: Sequence[Path] = (), by_token: bool = False, warn: Callable[[str], object]
    ) -> None:
        self.folder, self.beneath, self.by_token, self._warn = folder, tuple(beneath), by_token, warn
        self.shards: list[Shard] = []
        self._names: set[str] = set()  # of files that are open, wherever they lie
        self._damaged: set[Path] = set()
        self._unreadable: set[Path] = set()  # so far: a network file system may lose a file for a moment
        # Rows are numbered through all shards. Here: each shard's first number, and the one after the last.
        self._starts = np.zeros(1, dtype=np.int64)
        self._sorted: tuple[Keys, NDArray[np.int64]] | None = None  # all keys and their numbers; None: out of date
        self.refresh()

    # ----------------------------------------------------------------------------------------------------- what is here

    def refresh(self) -> Keys:
        """Open files that have appeared since the last time; returns the keys in them."""
        fresh, damaged = [], []
        for folder in (self.folder, *self.beneath):
            for path in shard_files(folder):
                if path.name in self._names or path in self._damaged:
                    continue
                try:
                    shard = read_shard(path)
                except FileNotFoundError:  # pruned meanwhile
                    continue
                except OSError as error:
                    if path not in self._unreadable:
                        self._unreadable.add(path)
                        self._warn(f"{path}: cannot be read ({error.strerror}), its rows count as missing")
                    continue
                except DamagedShard as fault:
                    damaged.append(f"{path}: {fault}")
                    self._damaged.add(path)
                    if folder == self.folder:  # the others are not ours to change
                        set_aside(path)
                    continue
                self._names.add(path.name)
                if shard.token_logps is not None or not self.by_token:
                    fresh.append(shard)
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            self._warn(f"Damaged reference log-probs are set aside and computed again: {damaged[0]}{more}")
        for shard in fresh:
            self._add(shard)
        return np.concatenate([shard.keys for shard in fresh]) if fresh else np.empty(0, KEY_DTYPE)

    def folders(self) -> str:
        """Where the rows are, in words."""
        return " and ".join(sorted({str(shard.path.parent) for shard in self.shards}))

    def _add(self, shard: Shard) -> None:
        self._names.add(shard.path.name)
        self.shards.append(shard)
        self._starts = np.append(self._starts, self._starts[-1] + len(shard))
        self._sorted = None

    def _index(self) -> tuple[Keys, NDArray[np.int64]]:
        if self._sorted is None:
            keys = np.concatenate([np.empty(0, KEY_DTYPE), *(shard.keys for shard in self.shards)])
            # Of rows that were computed twice the oldest counts, so that files which others add change no run.
            rank = sorted(range(len(self.shards)), key=lambda number: self.shards[number].age_key)
            rows = np.concatenate(
                [np.empty(0, np.int64), *(np.arange(self._starts[i], self._starts[i + 1]) for i in rank)]
            )
            rows = rows[np.argsort(keys[rows], kind="stable")]
            self._sorted = keys[rows], rows
        return self._sorted

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Number of each key's row; -1 where there is none."""
        known, rows = self._index()
        places = find(known, keys)
        return np.where(places < 0, -1, rows[places] if len(rows) else -1)

    def row(self, number: int) -> tuple[float, int, Shard]:
        """A row's summed log-prob, its scored tokens, and the file it stands in."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        shard, inside = self.shards[place], number - int(self._starts[place])
        return float(shard.logps[inside]), int(shard.tokens[inside]), shard

    # ------------------------------------------------------------------------------------------------------- reading it

    def logps_of(self, dataset: PairDataset, ld_alpha: float = 1.0) -> PairLogps:
        """The log-probs of every pair of `dataset`: P is the data set's length. `ld_alpha` as in `pair_logps`.

        Rows that another machine has just written may take a while to be seen; raises UserError if they never are.
        """
        keys = dataset.response_keys  # [P, 2]
        rows = self.find(keys.ravel())
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while (rows < 0).any():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder}: reference log-probs of {(rows < 0).sum():,} responses, written by other "
                    f"processes, have not appeared for {_VISIBLE_SECONDS:.0f} seconds; let all of them see one folder"
                )
            time.sleep(0.2)
            self.refresh()
            rows = self.find(keys.ravel())
        logps, tokens = self._values(rows)
        tokens = tokens.reshape(keys.shape)
        if ld_alpha != 1.0:
            shorter = np.repeat(tokens.min(axis=1), 2)
            logps = self._discounted(rows, shorter, ld_alpha)
        chosen, rejected = torch.from_numpy(logps.astype(np.float32).reshape(keys.shape)).unbind(1)
        chosen_tokens, rejected_tokens = torch.from_numpy(tokens.astype(np.float32)).unbind(1)
        return PairLogps(
            chosen=chosen.contiguous(),
            rejected=rejected.contiguous(),
            chosen_tokens=chosen_tokens.contiguous(),
            rejected_tokens=rejected_tokens.contiguous(),
        )

    def _values(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Summed log-prob and scored tokens of each of `rows`."""
        logps, tokens = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)
        for shard, start, mine in self._by_shard(rows):
            logps[mine] = shard.logps[rows[mine] - start]
            tokens[mine] = shard.tokens[rows[mine] - start]
        return logps, tokens

    def _discounted(self, rows: NDArray[np.int64], lengths: NDArray[np.int64], ld_alpha: float) -> NDArray[np.float64]:
        """The sums with every token beyond `lengths` weighted by `ld_alpha`."""
        sums = np.empty(len(rows))
        for shard, start, mine in self._by_shard(rows):
            assert shard.token_logps is not None  # a shard without them is not opened by token
            ends = np.cumsum(shard.tokens, dtype=np.int64)
            for number in mine.tolist():
                row = rows[number] - start
                logps = shard.token_logps[ends[row] - shard.tokens[row] : ends[row]].astype(np.float64)
                cut = lengths[number]
                sums[number] = logps[:cut].sum() + ld_alpha * logps[cut:].sum()
        return sums

    def _by_shard(self, rows: NDArray[np.int64]) -> list[tuple[Shard, int, NDArray[np.int64]]]:
        """Each shard that holds some of `rows`, with the number of its first row and where in `rows` its own stand."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        present, firsts = np.unique(numbers[order], return_index=True)
        parts = np.split(order, firsts[1:])
        return [
            (self.shards[number], int(self._starts[number]), part)
            for number, part in zip(present.tolist(), parts, strict=True)
        ]

    # ----------------------------------------------------------------------------------------------------- adding to it

    def prepare(self, key: StoreKey, about: dict[str, Any]) -> None:
        """Make the folder, say in its manifest what it holds, and clear what killed processes left unfinished.

        `about` is for people and decides nothing. Raises UserError if the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / MANIFEST).exists():
                created = datetime.now(UTC).isoformat(timespec="seconds")
                content = {"format": FORMAT, **vars(key), "about": about | {"created": created}}
                text = json.dumps(content, indent=2) + "\n"
                write_atomically(self.folder / MANIFEST, lambda path: path.write_text(text))
            for leftover in (*self.folder.glob(".*.partial"), *self.folder.glob("claim-*.now")):
                with suppress(OSError):  # of another user, or gone
                    if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                        leftover.unlink()
        except OSError as error:
            raise self.unwritable(error) from error

    def append(self, rows: dict[bytes, Row], made: dict[str, str]) -> None:
        """Store rows in a new file; `made` as in `origin`. Raises UserError if the disk refuses; earlier rows stay."""
        try:
            self._add(write_shard(self.folder, rows, made))
        except OSError as error:
            raise self.unwritable(error) from error

    def unwritable(self, error: OSError) -> UserError:
        """What to say when the disk refuses."""
        return UserError(
            f"reference_cache_dir {self.folder.parent}: reference log-probs cannot be written ({error.strerror}); "
            "those written before are kept"
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a store's manifest says; None if there is none that can be read. Raises UserError for a newer format."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    found = content.get("format", 1)
    if not isinstance(found, int) or found > FORMAT:
        raise UserError(
            f"{folder}: was written by a newer open_po (format {found}, this one reads up to {FORMAT}); update "
            "open_po, or choose another reference_cache_dir"
        )
    return content


def select_pairs(reference: PairLogps | None, indices: Sequence[int], policy: PairLogps) -> PairLogps | None:
    """The reference log-probs of the pairs `indices`, on the device of their policy log-probs; None without any."""
    return None if reference is None else reference.select(indices, policy.chosen.device)
