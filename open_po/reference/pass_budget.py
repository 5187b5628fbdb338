"""How many tokens a forward pass of the reference has: as the run says, or by what is found for `auto`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from open_po.config import RunConfig
from open_po.data import PairDataset
from open_po.data.run_data import Data
from open_po.distributed.runtime import Runtime
from open_po.errors import is_out_of_memory
from open_po.model.memory import free_memory_bytes, release_memory
from open_po.model.run_plan import planned_pass_tokens
from open_po.model.scorer import Scorer
from open_po.model.token_budget import (
    Demand,
    Timing,
    budget_book,
    filling_budget,
    measured_budget,
    roughly_filling,
)
from open_po.packing import PromptUnit, Response, ResponsePlanner
from open_po.reference.store import ReferenceStore

_TRIED = 256  # pairs of the data that a measurement may take


def settle_pass_tokens(config: RunConfig, runtime: Runtime, scorer: Scorer, store: ReferenceStore, data: Data) -> int:
    """`reference_max_tokens_per_batch` as a number; all ranks call this.

    A pass that was killed and goes on must get the same, so that its packs are cut alike: what was found is kept with
    the cache.
    """
    asked = config.reference.reference_max_tokens_per_batch
    if asked != "auto":
        return asked
    workers = runtime.world_size
    tokens = [_tokens(part) for part in data.parts]
    pairs = np.concatenate(tokens)
    demand = Demand(
        together=math.ceil(pairs.sum() / workers),
        total=max(runtime.gather(_missing_tokens(store, data, tokens))) // workers,
        pair=math.ceil(pairs.mean()),
        longest=max(part.longest_row for part in data.parts),
    )
    fits = planned_pass_tokens(config, runtime, data, scorer)
    if fits is None:  # on a CPU, or of a model or engine that no plan is made for
        room = free_memory_bytes(runtime.device, runtime.local_world_size)
        fits = roughly_filling(room, scorer, trains=False)
    book = budget_book(Path(config.reference.reference_cache_dir), "reference", scorer, demand, runtime)
    if runtime.device.type == "cuda":
        found = filling_budget(demand, fits, runtime)
        found = found._replace(tokens=runtime.from_main(book.keep, found.tokens))
    else:
        trial = None if scorer.lockstep else PassTrial(scorer, data.train, runtime, data.pad)
        found = measured_budget(demand, trial, fits, book, runtime)
    runtime.say(found.describe("reference_max_tokens_per_batch"))
    return found.tokens


def _tokens(part: PairDataset) -> np.ndarray:
    """Of each pair, a prompt counted once: what there is to compute at most."""
    return part.prompt_lengths + part.chosen_lengths + part.rejected_lengths


def _missing_tokens(store: ReferenceStore, data: Data, tokens: Sequence[np.ndarray]) -> int:
    """Of pairs with a response that is not stored."""
    found = 0
    for part, each in zip(data.parts, tokens, strict=True):
        known = store.find(part.response_keys.ravel()).reshape(-1, 2) >= 0
        found += int(each[~known.all(axis=1)].sum())
    return found


class PassTrial:
    """Times the forward passes of the first responses."""

    def __init__(self, scorer: Scorer, dataset: PairDataset, runtime: Runtime, pad: int) -> None:
        self._scorer, self._runtime, self._pad = scorer, runtime, pad
        self._planner = ResponsePlanner(dataset=dataset, layout=scorer.layout)
        pairs = range(min(len(dataset), _TRIED))
        self._units = self._planner.units(Response(pair, side) for pair in pairs for side in (0, 1))

    def __call__(self, budget: int, tokens: int) -> Timing:
        """The time of the first responses that come to so many tokens, in packs of `budget`, on the slowest rank."""
        ends = np.cumsum([unit.tokens(self._scorer.layout) for unit in self._units])
        count = max(1, int(np.searchsorted(ends, tokens, side="right")))
        packs = self._planner.packs(self._units[:count], budget)
        try:
            seconds = self._seconds(packs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            seconds = math.inf
            release_memory()
        computed = sum(self._planner.stats(pack, budget).computed for pack in packs)
        return Timing(max(self._runtime.gather(seconds)), computed)

    def _seconds(self, packs: Sequence[Sequence[PromptUnit[Response]]]) -> float:
        begin = time.perf_counter()
        with self._scorer.as_reference():
            for pack in packs:
                self._scorer.token_logprobs(self._planner.batch(pack, self._pad))
        return time.perf_counter() - begin
