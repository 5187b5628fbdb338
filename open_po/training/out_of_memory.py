"""A step in which memory ran out: what is put back before it is done again, in smaller packs, and what is said of it.

How a step is cut into packs does not change its value, so nothing about the run does but its memory and speed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from open_po.distributed.engine import Engine
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError, first_line
from open_po.model.memory import free_memory_bytes
from open_po.packing import PackingStats, Planner
from open_po.training.checkpoint import RandomState, RunningMean, TrainingState


@dataclass(frozen=True, kw_only=True)
class StepStart:
    """What a step changes before its update: the random state, and what is counted and noted of its packs."""

    random: RandomState
    packing: PackingStats
    running_means: list[RunningMean]
    sums: dict[str, Tensor]  # of the window's metrics; adding to one makes another tensor

    @staticmethod
    def of(state: TrainingState) -> StepStart:
        """As a step begins."""
        progress = state.progress
        return StepStart(
            random=RandomState.take(),
            packing=progress.packing,
            running_means=copy.deepcopy(progress.running_means),
            sums=dict(state.window.meter.sums),
        )

    def put_back(self, state: TrainingState) -> None:
        """As if the step had not begun, but for gradients."""
        state.progress.packing, state.progress.running_means = self.packing, self.running_means
        state.window.meter.sums = self.sums
        self.random.put_back()


class Shortage:
    """Memory that ran out while a pack of a step was computed."""

    def __init__(
        self,
        error: RuntimeError,
        pack: Sequence[int],
        planner: Planner,
        engine: Engine,
        step: int,
        runtime: Runtime,
        before: Shortage | None = None,
    ) -> None:
        """`before` is that of the same step, if it has been done again."""
        self.said = first_line(error)
        self.pairs = len(pack)
        self.tokens = planner.stats([pack]).computed
        self.smaller = max(1, self.tokens // 2)
        self._step, self._budget = step, planner.max_tokens
        self._origin = planner.dataset.origins[pack[0]]
        self._free = free_memory_bytes(runtime.device, runtime.local_world_size)
        self._engine, self._again = engine, before is not None
        # Bytes that its gradients take in several packs, all of them, and in one pack did not.
        self._added_up: int = engine.spared_gradients if before is None else before._added_up

    def refuse_unless_divided(self) -> None:
        """Raises UserError if the pack cannot be cut, or the step not be done again."""
        engine = self._engine
        if engine.weights_changed:
            raise UserError(
                f"{self._what()} ({self.said}), when optimizer_in_backward had changed weights already; set "
                f"gradient_checkpointing, or lower max_tokens_per_batch to {self.smaller}{self._of_several()}, and go "
                "on with --resume_from_checkpoint auto"
            )
        if self.pairs == 1 or not (engine.can_retry and engine.can_discard):
            raise self.final()

    def describe(self) -> str:
        """What happens now, in one line."""
        return (
            f"{self._what()}: the step is done again, and the run goes on, with at most {self.smaller:,} tokens at a "
            f"time{self._of_several()}; its values are the same"
        )

    def final(self) -> UserError:
        """The error where nothing more is tried."""
        if self._again and self._added_up:  # smaller packs, which would be tried next, need that too
            return UserError(
                f"{self._what()} ({self.said}){self._of_several()}; lower per_device_train_batch_size or "
                "gradient_accumulation_steps until a step is one pack that fits, or set gradient_checkpointing"
            )
        if self.pairs == 1:
            return UserError(
                f"{self._what()}, the pair {self._origin} alone ({self.said}); lower max_seq_length, or set "
                "gradient_checkpointing"
            )
        return UserError(
            f"{self._what()} ({self.said}); lower max_tokens_per_batch to {self.smaller}, or set gradient_checkpointing"
        )

    def _of_several(self) -> str:
        """What a step of several packs takes that one of one pack did not, if anything."""
        if not self._added_up:
            return ""
        return f", in several packs, whose gradients add up in {self._added_up / 1e9:.1f} GB that one pack spares"

    def _what(self) -> str:
        return (
            f"Step {self._step}: out of memory in a pack of {self.tokens:,} tokens (max_tokens_per_batch "
            f"{self._budget}, {self._free / 1e9:.1f} GB were free)"
        )
