"""From a configuration to a store that holds the reference log-probs of all its pairs, whatever was there before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from open_po.config import RunConfig
from open_po.data import PairDataset
from open_po.data.run_data import Data
from open_po.data.tokenizer import refuse_other_vocabulary
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.model.logprobs import response_sums
from open_po.model.memory import release_memory
from open_po.model.numerics import Numerics, reference_numerics
from open_po.model.prepare import load_reference
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource, agreed_identity, reference_source
from open_po.output.summary import ReferenceTotals
from open_po.packing import Group, PackingStats, pack_responses
from open_po.reference.fill import ReferencePass
from open_po.reference.lockstep import LockstepPass
from open_po.reference.pass_budget import settle_pass_tokens
from open_po.reference.store import ReferenceStore, StoreKey, read_manifest

T = TypeVar("T")

# How far a recomputed log-prob may be from the stored one: other packs, libraries or devices round differently.
_SUM_TOLERANCE = 1e-4  # float32, times the sum, if that is larger than 1 nat
_TOKEN_TOLERANCE = 0.05  # bfloat16, nats a token


@dataclass(frozen=True, kw_only=True)
class FilledStore:
    """A store that holds all that a run needs, and what filling it took."""

    store: ReferenceStore
    totals: ReferenceTotals


class Sample(NamedTuple):
    """A stored response that is computed once more."""

    part: int
    pair: int
    side: int


def open_cache(config: RunConfig) -> None:
    """Make the cache's folder, if need be.

    Raises UserError, before anything takes long, if that cannot be, or the reference model is not to be had.
    """
    source = reference_source(config)
    if source is not None:
        source.refuse_missing("reference_model_name_or_path")
        source.folder()
    path = Path(config.reference.reference_cache_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file" if path.is_file() else f"no folder can be made there ({error.strerror})"
        raise UserError(f"reference_cache_dir {path}: {what}") from error
    for folder in config.reference.reference_cache_read_only or ():
        if not Path(folder).is_dir():
            raise UserError(f"reference_cache_read_only: {folder} is no folder")


def separate_reference(config: RunConfig, runtime: Runtime, data: Data) -> FilledStore | None:
    """Log-probs of the reference model, if it is another than the policy's starting weights. It is gone afterwards.

    Raises UserError if its tokenizer gives other tokens the ids of the data.
    """
    source = reference_source(config)
    if source is None:
        return None
    runtime.on_main(_check_vocabulary, source, data)
    numerics = runtime.from_main(reference_numerics, config, runtime.device, runtime.parallelism)
    return log_probs_of(source, numerics, config, runtime, data, label="Reference model")


def _check_vocabulary(source: ModelSource, data: Data) -> None:
    refuse_other_vocabulary(source, data.tokenizer, data.token_ids())


def log_probs_of(
    source: ModelSource,
    numerics: Numerics,
    config: RunConfig,
    runtime: Runtime,
    data: Data,
    *,
    label: str,
) -> FilledStore:
    """Log-probs of a model that is loaded for nothing else, and gone when this returns."""

    def load() -> Scorer:
        return load_reference(source, numerics, config, runtime, data, label=label)

    identity = agreed_identity(source, Path(config.reference.reference_cache_dir), runtime)
    reference = ensure_reference(load, source, identity, numerics, config, runtime, data)
    release_memory()
    return reference


def ensure_reference(
    load: Callable[[], Scorer],
    source: ModelSource,
    identity: dict[str, str],
    numerics: Numerics,
    config: RunConfig,
    runtime: Runtime,
    data: Data,
) -> FilledStore:
    """The store of the model `identity` with all of `data`'s pairs in it.

    `load` gives the model, on all ranks alike; it is called only if rows are missing or are to be verified. Raises
    UserError if a row that is stored differs from what the model gives now.
    """
    start = time.monotonic()
    key = StoreKey(model=identity, numerics=numerics.key())
    store = runtime.main_first(_open_store, key, config, runtime)  # rank 0 alone sets damaged files aside
    # Of all ranks, since each machine may have a folder of its own.
    missing = max(runtime.gather(sum(_missing_pairs(store, part) for part in data.parts)))
    pairs = sum(map(len, data.parts))
    if missing < pairs:
        runtime.say(f"Reference log-probs: {pairs - missing:,} pairs from the cache {store.folders()}")
    samples = runtime.from_main(_samples, store, data, config.reference.verify_reference_rows)
    done, computed = PackingStats(), 0
    max_tokens: int | None = None
    if missing or samples:
        scorer = load()
        runtime.on_every_rank(_verify, samples, store, scorer, source, data)
        if missing:
            max_tokens = settle_pass_tokens(config, runtime, scorer, store, data)
            for part in data.parts:
                work = runtime.on_every_rank(_pass, store, scorer, part, runtime, max_tokens, data.pad)
                runtime.on_every_rank(store.prepare, key, {"model": source.name, "revision": source.revision})
                runtime.on_every_rank(work.run)
                done, computed = done + work.stats, computed + work.computed
    totals = ReferenceTotals(
        seconds=time.monotonic() - start,
        pairs_computed=missing,
        pairs_reused=pairs - missing,
        responses_computed=sum(runtime.gather(computed)),
        rows_verified=len(samples),
        max_tokens_per_batch=max_tokens,
        packing=done.summary() if done.packs else None,
    )
    return FilledStore(store=store, totals=totals)


def _pass(
    store: ReferenceStore, scorer: Scorer, part: PairDataset, runtime: Runtime, max_tokens: int, pad: int
) -> ReferencePass:
    team = scorer.placement.team
    kind = ReferencePass if team is None else LockstepPass
    return kind(store, scorer, part, team or runtime, max_tokens=max_tokens, pad=pad)


def _open_store(key: StoreKey, config: RunConfig, runtime: Runtime) -> ReferenceStore:
    reference = config.reference
    caches = [Path(reference.reference_cache_dir), *map(Path, reference.reference_cache_read_only or ())]
    folder, *beneath = (cache / key.digest for cache in caches)
    for each in (folder, *beneath):
        read_manifest(each)
    level = reference.reference_cache_level
    by_token = level == "token" or (level == "auto" and config.loss.mix().ld_alpha != 1.0)
    return ReferenceStore(folder, beneath=beneath, by_token=by_token, warn=runtime.say_here)


def _missing_pairs(store: ReferenceStore, part: PairDataset) -> int:
    known = store.find(part.response_keys.ravel()).reshape(-1, 2) >= 0
    return int((~known.all(axis=1)).sum())


def _samples(store: ReferenceStore, data: Data, count: int) -> list[Sample]:
    """Up to `count` stored responses, spread over the data."""
    found: list[Sample] = []
    for number, part in enumerate(data.parts):
        stored = np.flatnonzero(store.find(part.response_keys.ravel()) >= 0).tolist()
        found += [Sample(number, place // 2, place % 2) for place in _spread(stored, count)]
    return _spread(found, count)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of `items`, evenly spread."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _verify(samples: Sequence[Sample], store: ReferenceStore, scorer: Scorer, source: ModelSource, data: Data) -> None:
    """Compute stored responses once more. Raises UserError for the first that differs."""
    # All of them first: ranks that divide a model must run equally many passes, whatever each finds in its store.
    for sample, got in [(sample, _scored_once_more(sample, scorer, data)) for sample in samples]:
        part, side = data.parts[sample.part], ("chosen", "rejected")[sample.side]
        (row,) = store.find(part.response_keys[sample.pair, sample.side : sample.side + 1])
        if row < 0:  # not visible on this machine yet
            continue
        stored, tokens, shard = store.row(int(row))
        exact = scorer.numerics.compute_dtype == torch.float32
        tolerance = _SUM_TOLERANCE * max(1.0, abs(stored)) if exact else _TOKEN_TOLERANCE * tokens
        if not abs(got - stored) <= tolerance:
            raise UserError(
                f"{part.origins[sample.pair]}: the reference log-prob of the {side} response is {stored:.4f} in "
                f"{shard.path} ({shard.describe()}), but {source.name} now gives {got:.4f}; they may differ by "
                f"{tolerance:.2g}. Remove the cached ones (python -m open_po cache prune --key {store.folder.name} "
                f"--dir {shard.path.parent.parent}), or take them as they are (verify_reference_rows 0)"
            )


def _scored_once_more(sample: Sample, scorer: Scorer, data: Data) -> float:
    pair = data.parts[sample.part][sample.pair]
    group = Group(pair.prompt_ids, [(pair.chosen_ids, pair.rejected_ids)[sample.side]])
    batch = pack_responses([group], layout=scorer.layout, pad_token_id=data.pad)
    with scorer.as_reference():
        return float(response_sums(scorer.token_logprobs(batch), batch))
