"""Reference log-probs: computed once per response and model, kept on disk, looked up by pair.

A store is a folder `CACHE_DIR/KEY`. The key is the hash of `manifest.json` beside the rows: the content of the model's
files and the numerics it ran with. Rows are Parquet files of (`response_key`, summed log-prob in nats, scored tokens,
log-prob of each token or null), one row per response, each file complete from the moment it has its name. Nothing about
the data set, the loss, beta, packing, ranks or seed is in the key.
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
from open_po.errors import UserError, first_line
from open_po.logprobs import response_sums
from open_po.losses import PairLogps
from open_po.model import Scorer, release_memory
from open_po.output import write_atomically
from open_po.packing import PackedBatch, PackingStats, Response, ResponsePlanner, Unit
from open_po.runtime import Runtime, is_out_of_memory
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
    pairs_computed: int  # with a response that was not stored
    pairs_reused: int
    packing: dict[str, float] | None  # of the first rank's packs, see `PackingStats.summary`; None if there were none


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

    def missing(self, dataset: PairDataset, *, by_token: bool) -> list[Response]:
        """The responses that are not stored, or not `by_token`; equal ones as often as they occur."""

        def lacks(key: bytes) -> bool:
            return key not in self.rows or (by_token and self.rows[key].token_logps is None)

        sides = (dataset.chosen_keys, dataset.rejected_keys)
        return [Response(pair, side) for pair in range(len(dataset)) for side in (0, 1) if lacks(sides[side][pair])]


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
) -> PackingStats:
    """Compute what `store` lacks of `dataset`, each distinct response once, shared among the ranks; read it back.

    Returns what this rank's packs computed. Raises UserError naming the pair if a log-prob is not finite; it is
    never stored.
    """
    # Rank 0 says what is missing: another rank's reading may already hold rows that a faster rank has just written.
    missing = runtime.on_main(lambda: store.missing(dataset, by_token=by_token))
    planner = ResponsePlanner(dataset=dataset, layout=scorer.layout)
    units = planner.units(missing, rank=runtime.rank, world_size=runtime.world_size)
    work = Pass(store, scorer, planner, runtime, by_token=by_token, max_tokens=max_tokens, pad=pad)
    if missing:
        label = "Reference log-probs" + (f" (one of {runtime.world_size} ranks)" if runtime.world_size > 1 else "")
        total = sum(len(unit.items) for unit in units)
        with Progress(runtime.console, label, total=total, unit="distinct responses") as progress:
            runtime.on_all(lambda: work.run(units, progress))
    if runtime.world_size > 1:
        store.reload()
    return work.stats


class Pass:
    """One rank's forward passes over the responses that a store lacks."""

    def __init__(
        self,
        store: ReferenceStore,
        scorer: Scorer,
        planner: ResponsePlanner,
        runtime: Runtime,
        *,
        by_token: bool,
        max_tokens: int,
        pad: int,
    ) -> None:
        self.store, self.scorer, self.planner, self.runtime = store, scorer, planner, runtime
        self.by_token, self.max_tokens, self.pad = by_token, max_tokens, pad
        self.stats = PackingStats()
        self._fresh: dict[bytes, Row] = {}
        self._flushed = time.monotonic()

    def run(self, units: Sequence[Unit[Response]], progress: Progress) -> None:
        """Compute and store `units`, the longest first. When memory runs out the token budget is halved."""
        try:
            with self.scorer.as_reference():
                while units:
                    units = self._until_memory_ends(units, progress)
        finally:
            self._flush()

    def _until_memory_ends(self, units: Sequence[Unit[Response]], progress: Progress) -> list[Unit[Response]]:
        """Compute `units` pack by pack; returns those that are left when memory ends, to be cut smaller."""
        packs = self.planner.packs(units, self.max_tokens)
        for number, pack in enumerate(packs):
            stats = self.planner.stats(pack, self.max_tokens)
            if not self._compute(pack):
                self.max_tokens = min(self.max_tokens, stats.computed) // 2
                release_memory()
                self.runtime.say_here(
                    f"Reference log-probs: out of memory, on with {self.max_tokens:,} tokens at a time"
                )
                return [unit for rest in packs[number:] for unit in rest]
            self.stats += stats
            progress.advance(sum(len(unit.items) for unit in pack), tokens=stats.computed)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flush()
        return []

    def _compute(self, pack: Sequence[Unit[Response]]) -> bool:
        """Score a pack. False if memory does not suffice, but may for a smaller one."""
        responses = [response for unit in pack for response in unit.items]
        batch = self.planner.batch(pack, self.pad)
        try:
            token_logps = self.scorer.token_logprobs(batch)
            self._fresh |= self._rows(token_logps, batch, responses)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(responses) == 1:
                tokens, origin = len(batch.input_ids), self.planner.dataset.origins[responses[0].pair]
                raise UserError(
                    f"{origin}: out of memory in the reference pass, with one response of {tokens:,} tokens, its "
                    f"prompt included ({first_line(error)}); lower max_seq_length"
                ) from error
            return False
        return True

    def _rows(self, token_logps: Tensor, batch: PackedBatch, responses: Sequence[Response]) -> dict[bytes, Row]:
        """The rows of a pack: `token_logps` [N], cut into its responses."""
        dataset = self.planner.dataset
        sums = response_sums(token_logps, batch).tolist()
        rows: dict[bytes, Row] = {}
        parts = token_logps.split(batch.response_tokens.tolist())
        for response, logp, part in zip(responses, sums, parts, strict=True):
            name, keys = (("chosen", dataset.chosen_keys), ("rejected", dataset.rejected_keys))[response.side]
            if not math.isfinite(logp):
                raise UserError(
                    f"{dataset.origins[response.pair]}: the reference model's log-prob of the {name} response is "
                    f"{logp}; check the reference model, or use dtype float32"
                )
            rows[keys[response.pair]] = Row(logp, len(part), part.tolist() if self.by_token else None)
        return rows

    def _flush(self) -> None:
        self.store.append(self._fresh)
        self._fresh, self._flushed = {}, time.monotonic()
