"""Reference log-probs: computed once per response and model, kept on disk, looked up by pair.

A store is a folder `CACHE_DIR/KEY`. The key is the hash of `manifest.json` beside the rows: the content of the model's
files and the numerics it ran with. Rows are Parquet files of (`response_key`, summed log-prob in nats, scored tokens),
one row per response, each file complete from the moment it has its name. Nothing about the data set, the loss, beta,
packing, ranks or seed is in the key.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from open_po.data import PairDataset
from open_po.errors import UserError
from open_po.logprobs import pair_logps
from open_po.losses import PairLogps
from open_po.model import Scorer
from open_po.output import write_atomically
from open_po.packing import PackedBatch, Planner
from open_po.runtime import Runtime
from open_po.tracking import Progress

_SCHEMA = pa.schema(
    [
        ("response_key", pa.binary(16)),
        ("logp", pa.float32()),
        ("tokens", pa.int32()),
        ("token_logps", pa.list_(pa.float32())),  # null unless a run with ld_alpha computed the row
    ]
)
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "config.json")
_FLUSH_SECONDS = 60.0  # at most so much of a pass is lost when it is killed


def lookup(reference: PairLogps | None, indices: Sequence[int], policy: PairLogps) -> PairLogps | None:
    """The reference log-probs of the pairs `indices`, on the device of their policy log-probs; None without any."""
    return None if reference is None else reference.select(indices, policy.chosen.device)


class Row(NamedTuple):
    """A response's stored log-prob."""

    logp: float  # summed, nats
    tokens: int
    token_logps: list[float] | None  # of each token, if they were asked for

    def discounted(self, length: int, ld_alpha: float) -> float:
        """The sum with every token beyond `length` weighted by `ld_alpha`."""
        if ld_alpha == 1.0:
            return self.logp
        assert self.token_logps is not None  # a row without them counts as missing
        return math.fsum(self.token_logps[:length]) + ld_alpha * math.fsum(self.token_logps[length:])


@dataclass(frozen=True, kw_only=True)
class PassSummary:
    """What a reference pass did; the `reference` entry of run_summary.json."""

    seconds: float
    pairs_computed: int
    pairs_reused: int


class ReferenceStore:
    """The rows of one key: read whole at the start, appended to in files of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[bytes, Row] = {}
        self.reload()

    def reload(self) -> None:
        """Read all rows on disk, those of other ranks and other runs included."""
        for path in sorted(self.folder.glob("rows-*.parquet")):
            self._read(path)

    @staticmethod
    def create(cache_dir: Path, facts: dict[str, Any]) -> Path:
        """The folder of the store whose key is the hash of `facts`, made if need be. Raises UserError."""
        text = json.dumps(facts, indent=2, sort_keys=True)
        folder = cache_dir / hashlib.sha256(text.encode()).hexdigest()[:32]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "manifest.json", lambda path: path.write_text(text + "\n"))
        except OSError as error:
            raise UserError(f"reference_cache_dir {cache_dir}: cannot be written ({error.strerror})") from error
        return folder

    def _read(self, path: Path) -> None:
        try:
            table = pq.read_table(path, schema=_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: damaged reference log-probs ({str(error).splitlines()[0]}); remove the file to recompute them"
            ) from error
        keys, *columns = (table.column(name).to_pylist() for name in _SCHEMA.names)
        for key, *values in zip(keys, *columns, strict=True):
            self._take(key, Row(*values))

    def _take(self, key: bytes, row: Row) -> None:
        """Add a row, unless the one that is here holds more."""
        if key not in self.rows or self.rows[key].token_logps is None:
            self.rows[key] = row

    def append(self, rows: dict[bytes, Row]) -> None:
        """Store rows in a new file. Raises UserError if the disk refuses; rows stored before stay."""
        if not rows:
            return
        columns = [list(column) for column in zip(*rows.values(), strict=True)]
        table = pa.table([list(rows), *columns], schema=_SCHEMA)
        path = self.folder / f"rows-{uuid.uuid4().hex}.parquet"
        try:
            write_atomically(path, lambda temporary: pq.write_table(table, temporary))
        except OSError as error:
            raise UserError(
                f"{path}: reference log-probs cannot be written ({error.strerror}); those written before are kept"
            ) from error
        for key, row in rows.items():
            self._take(key, row)

    def lookup(self, dataset: PairDataset, ld_alpha: float = 1.0) -> PairLogps:
        """The rows of every pair of `dataset`, all of which must be here: P is the data set's length.

        `ld_alpha` as in `pair_logps`.
        """
        keys = zip(dataset.chosen_keys, dataset.rejected_keys, strict=True)
        pairs = [(self.rows[chosen], self.rows[rejected]) for chosen, rejected in keys]
        shorter = [min(chosen.tokens, rejected.tokens) for chosen, rejected in pairs]
        sides = [
            torch.tensor([pair[side].discounted(n, ld_alpha) for pair, n in zip(pairs, shorter, strict=True)])
            for side in (0, 1)
        ]
        tokens = [torch.tensor([float(pair[side].tokens) for pair in pairs]) for side in (0, 1)]
        return PairLogps(chosen=sides[0], rejected=sides[1], chosen_tokens=tokens[0], rejected_tokens=tokens[1])

    def missing(self, dataset: PairDataset, *, by_token: bool) -> list[int]:
        """Indices of the pairs with a response that is not stored, or not `by_token`."""

        def has(key: bytes) -> bool:
            return key in self.rows and not (by_token and self.rows[key].token_logps is None)

        keys = enumerate(zip(dataset.chosen_keys, dataset.rejected_keys, strict=True))
        return [index for index, pair in keys if not (has(pair[0]) and has(pair[1]))]


def model_identity(name: str, revision: str | None, trust_remote_code: bool) -> dict[str, str]:
    """SHA-256 of a model's configuration, weight files and, if it may run, its own code, by file name.

    `name` is a folder, or a Hub model, which is downloaded if it is not yet. Raises UserError if it cannot be reached.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(name, revision)
    patterns = [*_WEIGHT_FILES, *(["*.py"] if trust_remote_code else [])]
    identity: dict[str, str] = {}
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            identity[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return identity


def _downloaded(name: str, revision: str | None) -> Path:
    """The snapshot folder of a Hub model, with the files that transformers would load."""
    # A Hub pattern's * also matches `/`: these take neither sub-folders nor variants such as model.fp16.safetensors.
    safe, other = ["model.safetensors", "model-*.safetensors", "*.index.json"], ["pytorch_model*.bin"]
    try:
        for weights in (safe, other):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", "*.py", *weights]))
            if any(folder.glob(weights[0])) or any(folder.glob(weights[1 % len(weights)])):
                return folder
    except Exception as error:  # the client's own errors, or those of the HTTP library it is built on
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: neither a local folder nor a Hub model that can be reached ({reason})") from error
    raise UserError(f"{name}: the Hub repository holds no weights in safetensors or pytorch_model.bin")


def fill_store(
    store: ReferenceStore,
    scorer: Scorer,
    dataset: PairDataset,
    runtime: Runtime,
    *,
    by_token: bool,
    max_tokens: int,
    pad: int,
) -> None:
    """Compute what `store` lacks of `dataset`, shared among the ranks, and read it back.

    Raises UserError naming the pair if a log-prob is not finite; it is never stored.
    """

    def missing_once() -> list[int]:
        pairs = {
            (dataset.chosen_keys[i], dataset.rejected_keys[i]): i for i in store.missing(dataset, by_token=by_token)
        }
        return list(pairs.values())  # equal pairs once

    # Rank 0 says what is missing: another rank's reading may already hold rows that a faster rank has just written.
    missing = runtime.on_main(missing_once)
    planner = Planner(dataset=dataset, max_tokens=max_tokens)
    packs = planner.packs(missing, rank=runtime.rank, world_size=runtime.world_size)
    if missing:
        label = "Reference log-probs" + (f" (one of {runtime.world_size} ranks)" if runtime.world_size > 1 else "")
        with Progress(runtime.console, label, total=sum(map(len, packs)), unit="distinct pairs") as progress:
            runtime.on_all(lambda: _compute(store, scorer, planner, packs, progress, pad, by_token))
    if runtime.world_size > 1:
        store.reload()


def _compute(
    store: ReferenceStore,
    scorer: Scorer,
    planner: Planner,
    packs: list[list[int]],
    progress: Progress,
    pad: int,
    by_token: bool,
) -> None:
    fresh: dict[bytes, Row] = {}
    flushed = time.monotonic()
    try:
        with scorer.as_reference():
            for indices in packs:
                batch = planner.batch(indices, pad)
                fresh |= _rows(scorer.token_logprobs(batch), batch, indices, planner.dataset, by_token)
                progress.advance(len(indices), tokens=batch.tokens)
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    store.append(fresh)
                    fresh, flushed = {}, time.monotonic()
    finally:
        store.append(fresh)


def _rows(
    token_logps: Tensor, batch: PackedBatch, indices: Sequence[int], dataset: PairDataset, by_token: bool
) -> dict[bytes, Row]:
    """The rows of a pack: `token_logps` [N], cut into its responses."""
    logps = pair_logps(token_logps, batch.to(token_logps.device))
    of_tokens = [part.tolist() for part in token_logps.split(batch.response_id.bincount().tolist())]
    rows: dict[bytes, Row] = {}
    sides = (("chosen", dataset.chosen_keys, logps.chosen), ("rejected", dataset.rejected_keys, logps.rejected))
    for side, (name, keys, sums) in enumerate(sides):
        for position, (index, logp) in enumerate(zip(indices, sums.tolist(), strict=True)):
            if not abs(logp) < float("inf"):
                raise UserError(
                    f"{dataset.origins[index]}: the reference model's log-prob of the {name} response is {logp}; "
                    "check the reference model, or use dtype float32"
                )
            tokens = of_tokens[2 * position + side]
            rows[keys[index]] = Row(logp, len(tokens), tokens if by_token else None)
    return rows
