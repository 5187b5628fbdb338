"""The reference pass of a model whose weights are divided among ranks: they go in step, and are one worker.

Their first one claims packs and tells the others. Each takes its part of them, all run the same number of forward
passes, and the first stores what they found. In a pass where memory runs out on one rank the others wait for it, so it
is not tried again with less, as a rank with a whole model does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from open_po.output.progress import Progress
from open_po.packing import PackedBatch, ResponsePack
from open_po.reference.fill import ReferencePass
from open_po.reference.shards import Row


class LockstepPass(ReferencePass):
    """This rank's part in computing what a store lacks, together with the ranks that hold the other weights.

    `runtime` is of these ranks, a node's or all.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self.workers, self.at_once = self.runtime.teams, self.runtime.world_size

    def run(self) -> None:
        # Of what is stored the ranks may see different things: the first one's view counts.
        self.responses.stored = self.runtime.from_main(lambda: self.responses.stored)
        super().run()

    def _announce(self) -> None:
        self.runtime.on_main(super()._announce)

    def _fill(self, left: list[ResponsePack], progress: Progress) -> None:
        while window := self.runtime.from_main(self._claim, left, progress):
            self._compute(window, progress)
        self._take_note(progress)

    def _compute(self, window: Sequence[ResponsePack], progress: Progress) -> None:
        start = time.monotonic()
        rows: dict[bytes, Row] = {}
        smallest = min(window, key=lambda pack: pack.stats.computed)
        for first in range(0, len(window), self.runtime.world_size):
            place = first + self.runtime.rank
            mine = window[place] if place < len(window) else None
            # One that has nothing to compute goes along: the others need its weights all the same.
            batch = self.planner.batch(smallest if mine is None else mine)
            logps = self.scorer.token_logprobs(batch)
            try:
                self.runtime.on_every_rank(self._take, logps, batch, mine, rows, progress)
            except Exception:  # which all ranks know of: what was scored before it is stored
                self._store_together(rows, progress)
                raise
        self._store_together(rows, progress)
        self._rate = sum(pack.stats.computed for pack in window) / max(time.monotonic() - start, 1e-3)

    def _take(
        self,
        logps: Tensor,
        batch: PackedBatch,
        mine: ResponsePack | None,
        rows: dict[bytes, Row],
        progress: Progress,
    ) -> None:
        if mine is not None:
            self._count(self._rows(logps, batch, mine.items), mine, rows, progress)

    def _store_together(self, rows: dict[bytes, Row], progress: Progress) -> None:
        found = self.runtime.gather(rows)
        together = {key: row for part in found for key, row in part.items()}
        progress.done_elsewhere(len(together) - len(rows))
        self.runtime.on_main(self._store, together)
