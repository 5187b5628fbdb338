"""How many tokens a step's packs have: as the run says, as it had before, or by what is found for `auto`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from open_po.config import RunConfig
from open_po.data.run_data import Data
from open_po.distributed.engine import Engine
from open_po.distributed.runtime import Runtime
from open_po.errors import is_out_of_memory
from open_po.losses import LossMix
from open_po.memory_plan import EngineName, rank_bytes
from open_po.model.memory import card_bytes, free_memory_bytes, release_memory
from open_po.model.model_bytes import model_bytes
from open_po.model.planning import training_shape
from open_po.model.run_plan import planned_tokens
from open_po.model.scorer import Scorer
from open_po.model.token_budget import (
    Demand,
    Timing,
    TokenBudget,
    budget_book,
    filling_budget,
    measured_budget,
    roughly_filling,
    usual,
)
from open_po.packing import Planner
from open_po.training.checkpoint import RandomState
from open_po.training.start import Start


def settle_budget(
    config: RunConfig, runtime: Runtime, scorer: Scorer, planner: Planner, loss: LossMix, start: Start, data: Data
) -> int:
    """`max_tokens_per_batch` of the run, as a number; all ranks call this.

    A run that goes on keeps what its checkpoint had come to, unless another number is asked for than at its beginning.
    """
    tokens = _settled(config, runtime, scorer, planner, loss, start, data)
    if runtime.device.type == "cuda":  # memory is planned for
        line = oversized(planner, tokens)
    elif tokens == config.train.max_tokens_per_batch and config.train.pairs_of_rank > 1:
        line = too_small(planner, tokens)
    else:
        line = None
    if line is not None:
        runtime.say(line)
    return tokens


def oversized(planner: Planner, tokens: int) -> str | None:
    """A line about pairs that need more than a pack has, if there are any."""
    lengths = planner.pair_tokens()
    over, longest = int((lengths > tokens).sum()), int(lengths.argmax())
    if not over:
        return None
    return (
        f"max_tokens_per_batch: {over:,} {'pair needs' if over == 1 else 'pairs need'} more than {tokens:,} tokens, "
        f"alone in packs that are larger than planned: the longest has {lengths[longest]:,} "
        f"({planner.dataset.origin(longest)}); max_seq_length shortens it"
    )


def too_small(planner: Planner, tokens: int) -> str | None:
    """A line about a budget that most pairs are larger than."""
    lengths = planner.pair_tokens()
    over = int((lengths > tokens).sum())
    if 2 * over <= len(lengths):
        return None
    return (
        f"max_tokens_per_batch: {over:,} of {len(lengths):,} pairs need more than {tokens:,} tokens, each alone in a "
        f"pack; {usual(math.ceil(lengths.mean())):,} would hold a few, auto finds what is fastest"
    )


def _settled(
    config: RunConfig, runtime: Runtime, scorer: Scorer, planner: Planner, loss: LossMix, start: Start, data: Data
) -> int:
    asked, progress = config.train.max_tokens_per_batch, start.state.progress
    if start.resumed and progress.max_tokens and progress.max_tokens_asked == asked:
        if progress.max_tokens != asked:
            runtime.say(f"max_tokens_per_batch: {progress.max_tokens:,} tokens, as before")
        return progress.max_tokens
    tokens = asked
    if tokens == "auto":
        found = _find(config, runtime, scorer, planner, loss, start, data)
        runtime.say(found.describe("max_tokens_per_batch"))
        tokens = found.tokens
    progress.max_tokens, progress.max_tokens_asked = tokens, asked
    return tokens


def _find(
    config: RunConfig, runtime: Runtime, scorer: Scorer, planner: Planner, loss: LossMix, start: Start, data: Data
) -> TokenBudget:
    engine, lengths = start.state.engine, planner.pair_tokens()
    demand = _demand(lengths, planner, start, runtime)
    planned = planned_tokens(config, runtime, data)
    if planned is not None:
        return filling_budget(demand, planned, runtime)
    room = free_memory_bytes(runtime.device, runtime.local_world_size) - _to_come(config, scorer, runtime)
    fits = roughly_filling(room, scorer, trains=True)
    if runtime.device.type == "cuda":  # an engine, or a model, that no plan is made for
        return filling_budget(demand, fits, runtime)
    book = budget_book(Path(config.reference.reference_cache_dir), "training", scorer, demand, runtime)
    if not engine.can_discard:
        return measured_budget(demand, None, fits, book, runtime)
    steps = range(min(2, start.sampler.steps_per_epoch))
    first = [pair for step in steps for pair in start.sampler.step_pairs(step)]
    with StepTrial(scorer, engine, planner, loss, first, data.pad, runtime) as trial:
        return measured_budget(demand, trial, fits, book, runtime)


def _demand(lengths: NDArray[np.int64], planner: Planner, start: Start, runtime: Runtime) -> Demand:
    sampler, ranks = start.sampler, runtime.replicas
    steps = (int(lengths[sampler.step_pairs(step)].sum()) for step in range(min(sampler.steps_per_epoch, start.steps)))
    return Demand(
        together=math.ceil(max(steps) / ranks),
        total=int(lengths.mean() * sampler.global_batch * start.steps) // ranks,
        pair=math.ceil(lengths.mean()),
        longest=planner.dataset.longest_row,
    )


def _to_come(config: RunConfig, scorer: Scorer, runtime: Runtime) -> int:
    """Bytes on this rank that training takes besides activations: gradients and the optimizer's states."""
    kind, device = runtime.parallelism.kind, runtime.device
    shape = training_shape(config, "cuda" if device.type == "cuda" else "cpu", runtime.parallelism)
    engine: EngineName = "zero3" if kind == "tp" else kind  # which divides as much
    ranks = torch.cuda.device_count() if kind == "layers" else runtime.world_size
    card = card_bytes(device) if device.type == "cuda" else None
    found = rank_bytes(model_bytes(scorer), dataclasses.replace(shape, engine=engine, ranks=ranks), card=card)
    return int(found.gradients + found.optimizer + (found.host if device.type == "cpu" else 0.0))


class StepTrial:
    """Times the forward and backward passes of a run's first pairs, and leaves no trace of it in what is trained.

    As a context: no gradient is left behind, and the random state is as before.
    """

    def __init__(
        self,
        scorer: Scorer,
        engine: Engine,
        planner: Planner,
        loss: LossMix,
        pairs: Sequence[int],
        pad: int,
        runtime: Runtime,
    ) -> None:
        self._scorer, self._engine, self._planner, self._loss = scorer, engine, planner, loss
        self._pairs, self._pad, self._runtime = list(pairs), pad, runtime
        self._ends = np.cumsum(planner.pair_tokens()[self._pairs])

    def __enter__(self) -> StepTrial:
        self._random, self._training = RandomState.take(), self._scorer.training
        self._scorer.train()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.discard()
        self._scorer.train(self._training)
        self._random.put_back()
        release_memory()

    def __call__(self, budget: int, tokens: int) -> Timing:
        """The time of the first pairs that come to so many tokens, in packs of `budget`, on the slowest rank."""
        count = max(1, int(np.searchsorted(self._ends, tokens, side="right")))
        planner = dataclasses.replace(self._planner, max_tokens=budget)
        packs = planner.packs(self._pairs[:count])
        try:
            seconds = self._seconds(planner, packs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            seconds = math.inf
        self._engine.discard()
        return Timing(max(self._runtime.gather(seconds)), planner.stats(packs).computed)

    def _seconds(self, planner: Planner, packs: Sequence[Sequence[int]]) -> float:
        begin = time.perf_counter()
        with self._engine.step(packs=0):
            for pack in packs:
                with self._engine.pack(last=False):
                    batch = planner.batch(pack, self._pad)
                    scores = self._scorer.score(batch, extras=self._loss.extras, ld_alpha=self._loss.ld_alpha)
                    value = scores.logps.chosen.sum() - scores.logps.rejected.sum()
                    if scores.load_balancing is not None:
                        value = value + scores.load_balancing
                    self._engine.backward(value)
        return time.perf_counter() - begin
