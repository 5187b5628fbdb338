"""The reference pass: what a store lacks is cut into packs, and every process computes those that no other does.

All processes of a run, and other runs on the same data, make the same plan of packs. Each takes the next packs that are
neither stored nor claimed, for about a minute's work, claims them, computes them and stores them as one file. So they
share the work evenly however fast each is, and of a process that is killed one file's worth is lost. Packs hold the
same responses whoever computes them, in whatever order: a pass that was killed and goes on gives the same numbers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from open_po.data import PairDataset
from open_po.data.tokenization import KEY_DTYPE
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError, first_line, is_out_of_memory
from open_po.model.logprobs import response_sums
from open_po.model.memory import peak_memory_bytes, release_memory
from open_po.model.scorer import Scorer
from open_po.output.progress import Progress
from open_po.packing import (
    Layout,
    PackedBatch,
    PackingStats,
    PromptUnit,
    Response,
    ResponsePack,
    ResponsePlanner,
    pack_all,
)
from open_po.reference.claims import Claims
from open_po.reference.shards import Keys, Row, find, origin
from open_po.reference.store import ReferenceStore

_SHARD_SECONDS = 60.0  # so much of a pass is lost, at most, when it is killed
_SHARD_ROWS = 16_384
_CLAIM_SECONDS = 60.0  # how long a process may take that is slower than it expects, before others take over its packs
_PATIENCE_SECONDS = 10.0  # after which it is said that others are waited for
_POLL_SECONDS = 0.2  # between looks at what other processes have stored


class Responses:
    """The distinct responses of a data set by number, their keys, and which of them are stored."""

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset
        numbers = dataset.response_numbers.ravel()
        self.keys: Keys = np.zeros(int(numbers.max()) + 1, dtype=KEY_DTYPE)  # by number
        self.keys[numbers] = dataset.response_keys.ravel()
        self.stored = np.zeros(len(self.keys), dtype=bool)
        self.absent = np.zeros(len(self.keys), dtype=bool)  # beside an answer alone: there is nothing to store
        self.absent[dataset.response_numbers[dataset.rejected_lengths == 0, 1]] = True
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]

    def numbers(self, keys: Keys) -> NDArray[np.int64]:
        """The numbers of those of `keys` that belong to the data set."""
        places = find(self._sorted, keys)
        found: NDArray[np.int64] = self._order[places[places >= 0]]
        return found


@dataclass(frozen=True, kw_only=True)
class PackPlanner:
    """Cuts the responses of a data set that are not stored into packs, alike in every process."""

    responses: Responses
    layout: Layout
    budget: int  # tokens of a pack, as asked for
    pad: int

    @property
    def _planner(self) -> ResponsePlanner:
        return ResponsePlanner(dataset=self.responses.dataset, layout=self.layout)

    def plan(self, world_size: int) -> list[ResponsePack]:
        """Packs within the budget, and small enough that there is one for every rank.

        They are cut from all responses of the data set, and then lose what is stored: so a pass that goes on after a
        kill, whoever had stored which of them, computes the same packs.
        """
        packs = pack_all(self.responses.dataset, self.layout, self.budget, self.budget, world_size)
        return self.without_stored(packs)

    def without_stored(self, packs: Iterable[ResponsePack]) -> list[ResponsePack]:
        """`packs` without the responses that are stored."""
        found = []
        for pack in packs:
            stored = self.responses.stored[pack.numbers]
            if not stored.any():
                found.append(pack)
            elif not stored.all():
                rest = [item for item, known in zip(pack.items, stored.tolist(), strict=True) if not known]
                found += self.cut(rest, max(self.budget, pack.stats.computed))
        return found

    def cut(self, items: Iterable[Response], max_tokens: int) -> list[ResponsePack]:
        """Packs of at most `max_tokens`; a response that needs more goes alone."""
        return [self._pack(units) for units in self._planner.packs(self._planner.units(items), max_tokens)]

    def _pack(self, units: Sequence[PromptUnit[Response]]) -> ResponsePack:
        responses = np.array([item for unit in units for item in unit.items], dtype=np.int64)
        return ResponsePack(
            responses=responses,
            numbers=self.responses.dataset.response_numbers[responses[:, 0], responses[:, 1]],
            ends=np.cumsum([len(unit.items) for unit in units]),
            stats=self._planner.stats(units, self.budget),
        )

    def batch(self, pack: ResponsePack) -> PackedBatch:
        """The tensors of a pack."""
        return self._planner.batch([self._planner.unit(items) for items in pack.by_prompt], self.pad)


class ReferencePass:
    """This process's part in computing what a store lacks of a data set."""

    def __init__(
        self,
        store: ReferenceStore,
        scorer: Scorer,
        dataset: PairDataset,
        runtime: Runtime,
        *,
        max_tokens: int,
        pad: int,
    ) -> None:
        self.store, self.scorer, self.dataset, self.runtime = store, scorer, dataset, runtime
        self.max_tokens = max_tokens
        self.workers = runtime.world_size  # of this run, each with claims of its own
        self.at_once = 1  # packs that a worker computes at the same time
        self.responses = Responses(dataset)
        self.planner = PackPlanner(responses=self.responses, layout=scorer.layout, budget=max_tokens, pad=pad)
        self.responses.stored[:] = (store.find(self.responses.keys) >= 0) | self.responses.absent
        self.claims = Claims(store.folder)
        self.stats = PackingStats()
        self.computed = 0  # responses, by this process
        self._made = origin(runtime.device)
        self._rate: float | None = None  # tokens a second, as far as is known
        self._waited = 0.0  # seconds, for other processes

    def run(self) -> None:
        """Compute and store packs until nothing is missing, whoever computed it.

        Raises UserError naming the pair if a log-prob is not finite, which is never stored, or if a single response
        does not fit in memory.
        """
        lacking = int((~self.responses.stored).sum())
        if not lacking:
            return
        try:
            self._announce()
            left = self.planner.plan(self.runtime.world_size)
            label, unit = "Reference log-probs", "distinct responses"
            progress = Progress(self.runtime.console, label, total=lacking, unit=unit, memory=peak_memory_bytes)
            with progress, self.scorer.as_reference():
                self._fill(left, progress)
        finally:
            self.claims.release()

    def _announce(self) -> None:
        """Say that the store is in use: planning takes time."""
        self._claim_keys(self.responses.keys[:0], _CLAIM_SECONDS)

    def _fill(self, left: list[ResponsePack], progress: Progress) -> None:
        while window := self._claim(left, progress):
            self._compute(window, progress)

    # ------------------------------------------------------------------------------------------------ who computes what

    def _claim(self, left: list[ResponsePack], progress: Progress) -> list[ResponsePack]:
        """The next packs for this process, claimed; empty when nothing is left. Waits for what others are computing."""
        pause = 0.0
        while True:
            time.sleep(pause)
            self._take_note(progress)
            left[:] = self.planner.without_stored(left)
            if not left:
                return []
            claimed, others = self._claimed()
            free = [pack for pack in left if not claimed[pack.numbers].any()]
            if not free:
                pause = _POLL_SECONDS
                self._waited += pause
                if self._waited > _PATIENCE_SECONDS:
                    self.runtime.say("Reference log-probs: waiting for those that other processes are computing")
                    self._waited = -math.inf  # said once
                continue
            window = self._window(free, others)
            self._write_claim(window)
            theirs, _ = self._claimed()
            if any(theirs[pack.numbers].any() for pack in window):  # chosen at the same moment: both let go
                self.claims.release()
                pause = random.uniform(0, _POLL_SECONDS)
                continue
            self._take_note(progress)  # of what was stored between the first look and the claim
            if window := self.planner.without_stored(window):
                return window
            pause = 0.0

    def _take_note(self, progress: Progress) -> None:
        """Learn what other processes have stored since the last look."""
        fresh = self.responses.numbers(self.store.refresh())
        progress.done_elsewhere(int((~self.responses.stored[np.unique(fresh)]).sum()))
        self.responses.stored[fresh] = True

    def _claimed(self) -> tuple[NDArray[np.bool_], int]:
        """By number, which responses other processes are computing; and how many processes."""
        found, others = np.zeros(len(self.responses.keys), dtype=bool), 0
        for keys in self.claims.others():
            mine = self.responses.numbers(keys)
            found[mine] = True
            others += bool(len(mine))
        return found, others

    def _window(self, free: Sequence[ResponsePack], others: int) -> list[ResponsePack]:
        """The first of `free`: one file's worth, less towards the end so that all processes end together."""
        workers = max(self.workers, 1 + others)
        most = len(free) if workers == 1 else max(self.at_once, len(free) // (2 * workers))
        window: list[ResponsePack] = []
        tokens = rows = 0
        for pack in free[:most]:
            tokens += pack.stats.computed
            rows += len(pack.numbers)
            enough = self._rate is None or tokens > self._rate * _SHARD_SECONDS or rows > _SHARD_ROWS
            if enough and len(window) >= self.at_once:
                break
            window.append(pack)
        return window

    def _write_claim(self, window: Sequence[ResponsePack]) -> None:
        keys = self.responses.keys[np.concatenate([pack.numbers for pack in window])]
        tokens = sum(pack.stats.computed for pack in window)
        expected = 0.0 if self._rate is None else tokens / self._rate
        self._claim_keys(keys, _CLAIM_SECONDS + 5 * expected)

    def _claim_keys(self, keys: Keys, seconds: float) -> None:
        try:
            self.claims.take(keys, seconds)
        except OSError as error:
            raise self.store.unwritable(error) from error

    # -------------------------------------------------------------------------------------------------------- computing

    def _compute(self, window: Sequence[ResponsePack], progress: Progress) -> None:
        """Score packs and store their rows in one file; what was scored before an error is stored too."""
        rows: dict[bytes, Row] = {}
        start, tokens = time.monotonic(), 0
        try:
            for pack in window:
                fits = pack.stats.computed <= self.max_tokens  # memory may have run out since it was cut
                for part in [pack] if fits else self.planner.cut(pack.items, self.max_tokens):
                    tokens += self._score(part, rows, progress)
        finally:
            self._store(rows)
        self._rate = tokens / max(time.monotonic() - start, 1e-3)

    def _store(self, rows: dict[bytes, Row]) -> None:
        if rows:
            self.store.append(rows, self._made)
            self.responses.stored[self.responses.numbers(np.frombuffer(b"".join(rows), dtype=KEY_DTYPE))] = True

    def _score(self, pack: ResponsePack, rows: dict[bytes, Row], progress: Progress) -> int:
        """Add a pack's rows; returns the tokens computed. Where memory runs out the budget is halved."""
        batch = self.planner.batch(pack)
        try:
            found = self._rows(self.scorer.token_logprobs(batch), batch, pack.items)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(pack.numbers) == 1:
                tokens, where = len(batch.input_ids), self.dataset.origin(pack.items[0].pair)
                raise UserError(
                    f"{where}: out of memory in the reference pass, with one response of {tokens:,} tokens, its "
                    f"prompt included ({first_line(error)}); lower max_seq_length"
                ) from error
        else:
            self._count(found, pack, rows, progress)
            return pack.stats.computed
        # Outside the handler, whose error would keep the failed pass's tensors alive.
        del batch
        self.max_tokens = min(self.max_tokens, pack.stats.computed) // 2
        release_memory()
        self.runtime.say_here(f"Reference log-probs: out of memory, on with {self.max_tokens:,} tokens at a time")
        return sum(self._score(part, rows, progress) for part in self.planner.cut(pack.items, self.max_tokens))

    def _count(self, found: dict[bytes, Row], pack: ResponsePack, rows: dict[bytes, Row], progress: Progress) -> None:
        rows |= found
        self.stats += pack.stats
        self.computed += len(found)
        progress.advance(len(found), tokens=pack.stats.computed)

    def _rows(self, token_logps: Tensor, batch: PackedBatch, responses: Sequence[Response]) -> dict[bytes, Row]:
        """The rows of a pack: `token_logps` [N], cut into its responses."""
        dataset = self.dataset
        sums = response_sums(token_logps, batch).tolist()
        rows: dict[bytes, Row] = {}
        parts = token_logps.split(batch.response_tokens.tolist())
        for response, logp, part in zip(responses, sums, parts, strict=True):
            if not math.isfinite(logp):
                side = ("chosen", "rejected")[response.side]
                raise UserError(
                    f"{dataset.origin(response.pair)}: the reference model's log-prob of the {side} response is "
                    f"{logp}; check the reference model, or use dtype float32"
                )
            key = dataset.response_keys[response].item()
            rows[key] = Row(logp, len(part), part.tolist() if self.store.by_token else None)
        return rows
