"""The reference pass of a model whose weights are divided among ranks: they go in step, and are one worker.

Their first one claims packs and tells the others. Each takes its part of them, all run the same number of forward
passes, and the first stores what they found. In a pass where memory runs out on one rank the others wait for it, so it
is not tried again with less, as a rank with a whole model does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from open_po.errors import UserError, first_line, is_out_of_memory
from open_po.output.progress import Progress
from open_po.reference.fill import ReferencePass, ResponsePack
from open_po.reference.shards import Row


class LockstepPass(ReferencePass):
    """This rank's part in computing what a store lacks, together with the ranks that hold the other weights.

    `runtime` is of these ranks, a node's or all.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self.workers, self.at_once = self.runtime.teams, self.runtime.world_size

    def _fill(self, left: list[ResponsePack], progress: Progress) -> None:
        while window := self.runtime.from_main(self._claim, left, progress):
            self._compute(window, progress)
        self._take_note(progress)

    def _compute(self, window: Sequence[ResponsePack], progress: Progress) -> None:
        runtime, start = self.runtime, time.monotonic()
        rows: dict[bytes, Row] = {}
        smallest = min(window, key=lambda pack: pack.stats.computed)
        try:
            for first in range(0, len(window), runtime.world_size):
                place = first + runtime.rank
                mine = window[place] if place < len(window) else None
                runtime.on_every_rank(self._score_round, mine, smallest, rows, progress)
        finally:
            # After an error, which all ranks know of, what was scored before it is stored too.
            found = runtime.gather(rows)
            together = {key: row for part in found for key, row in part.items()}
            progress.done_elsewhere(len(together) - len(rows))
            runtime.on_main(self._store, together)
        self._rate = sum(pack.stats.computed for pack in window) / max(time.monotonic() - start, 1e-3)

    def _score_round(
        self, mine: ResponsePack | None, smallest: ResponsePack, rows: dict[bytes, Row], progress: Progress
    ) -> None:
        if mine is None:  # the others need this rank's weights all the same
            self.scorer.token_logprobs(self.planner.batch(smallest))
            return
        batch = self.planner.batch(mine)
        try:
            logps = self.scorer.token_logprobs(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory in the reference pass, with {math.ceil(mine.stats.computed):,} tokens at a time on a "
                f"model that is divided among ranks ({first_line(error)}); lower reference_max_tokens_per_batch"
            ) from error
        self._count(self._rows(logps, batch, mine.items), mine, rows, progress)
