"""The gradients of one optimizer step: its pairs in packs, their losses over the whole step's counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from open_po.config import RunConfig
from open_po.distributed.gathering import gather_logps
from open_po.distributed.runtime import Runtime
from open_po.errors import is_out_of_memory
from open_po.losses import Counts, LossMix, PairLogps
from open_po.model.memory import release_memory
from open_po.model.scorer import Scorer, Scores
from open_po.packing import PackedBatch, Planner
from open_po.reference import select_pairs
from open_po.training.checkpoint import RandomState, TrainingState
from open_po.training.coupled_loss import GlobalLoss, global_loss
from open_po.training.out_of_memory import Shortage, StepStart


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """One optimizer step over all ranks."""

    pairs: int
    tokens: int
    response_tokens: int
    counts: Counts


class StepGradients:
    """Adds up the gradients of a step's packs, and notes their figures in the state's window."""

    def __init__(
        self,
        *,
        config: RunConfig,
        runtime: Runtime,
        scorer: Scorer,
        state: TrainingState,
        loss: LossMix,
        planner: Planner,
        reference: PairLogps | None,
        pad: int,
    ) -> None:
        self.config, self.runtime, self.scorer, self.state = config, runtime, scorer, state
        self.engine = state.engine
        self.loss, self.planner, self.reference, self.pad = loss, planner, reference, pad
        self._at_work: list[int] = []  # the pack that is being computed

    def size(self, indices: list[int]) -> StepSize:
        data = self.planner.dataset
        prompt, chosen = int(data.prompt_lengths[indices].sum()), int(data.chosen_lengths[indices].sum())
        rejected = int(data.rejected_lengths[indices].sum()) if self.planner.with_rejected else 0
        prompts = prompt * (2 if self.planner.with_rejected else 1)
        return StepSize(
            pairs=len(indices),
            tokens=prompts + chosen + rejected,
            response_tokens=chosen + rejected,
            counts=self.planner.counts(indices),
        )

    def backward(self, indices: list[int], size: StepSize) -> dict[int, Tensor]:
        """Gradients of the step's loss: every pack adds its losses over the step's global counts.

        Returns whether each of this rank's pairs has a loss that is not finite; nothing here waits for the device.
        Where memory runs out the step is done once more in smaller packs, if the engine can; raises UserError else.
        """
        before = StepStart.of(self.state)
        try:
            return self._backward(indices, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            shortage = self._shortage(error)
            shortage.refuse_unless_divided()
        # Outside the handler, whose error would keep the failed pass's tensors alive.
        self.engine.discard()
        before.put_back(self.state)
        release_memory()
        self.state.progress.max_tokens = shortage.smaller
        self.planner = dataclasses.replace(self.planner, max_tokens=shortage.smaller)
        self.runtime.say_here(shortage.describe())
        try:
            return self._backward(indices, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._shortage(error, shortage).final() from error

    def _shortage(self, error: RuntimeError, before: Shortage | None = None) -> Shortage:
        step = self.state.progress.step + 1
        return Shortage(error, self._at_work, self.planner, self.engine, step, self.runtime, before)

    def _backward(self, indices: list[int], size: StepSize) -> dict[int, Tensor]:
        counts = size.counts
        packs = self.planner.packs(indices, rank=self.runtime.replica, world_size=self.runtime.replicas)
        whole = self._whole_step(indices, packs, counts) if self.loss.batch_coupled else None
        self.state.progress.packing += self.planner.stats(packs)
        bad: dict[int, Tensor] = {}
        idle = self._idle_packs(indices, packs, least=1)
        with self.engine.step(packs=len(packs) + len(idle)):
            for position, pack in enumerate([*packs, *idle]):
                counted, self._at_work = position < len(packs), pack
                with self.engine.pack(last=position == len(packs) + len(idle) - 1):
                    batch = self.planner.batch(pack, self.pad)
                    scores = self._score(batch)
                    policy = scores.logps
                    if whole is not None:
                        value = whole.surrogate(pack, policy)
                    else:
                        losses = self.loss(policy, select_pairs(self.reference, pack, policy))
                        value = losses.value(counts)
                    aux = None
                    if scores.load_balancing is not None:  # by the pack's share of the step's tokens
                        aux = batch.tokens / size.tokens * scores.load_balancing
                        value = value + self.config.loss.load_balancing_weight * aux
                    self.engine.backward(value * float(counted))
                noted = counted and self.runtime.counts
                if aux is not None and noted:
                    self.state.window.meter.add_aux(aux)
                if whole is None and noted:
                    self.state.window.meter.add(policy, losses, counts)
                if whole is None and counted:
                    bad |= zip(pack, losses.not_finite(), strict=True)
        return bad if whole is None else dict(zip(indices, whole.losses.not_finite(), strict=True))

    def _idle_packs(self, indices: list[int], packs: list[list[int]], *, least: int) -> list[list[int]]:
        """Packs that this rank computes, to no effect, because others have more than it, or it has fewer than `least`.

        A step may have fewer pairs than ranks; and where weights or gradients are divided, all must go in step.
        """
        rounds = least
        if self.engine.lockstep_packs:
            rounds = max(rounds, self.planner.rounds(indices, self.runtime.replicas))
        return self.planner.smallest(indices, rounds - len(packs))

    def _score(self, batch: PackedBatch) -> Scores:
        return self.scorer.score(batch, extras=self.loss.extras, ld_alpha=self.loss.ld_alpha)

    def _whole_step(self, indices: list[int], packs: list[list[int]], counts: Counts) -> GlobalLoss:
        """The loss of a step whose pairs depend on one another: one more forward pass over its packs.

        It runs under the random state that the passes with a graph will have, so that dropout is the same in both.
        """
        random = RandomState.take()
        with torch.no_grad():
            scored = []
            for pack in packs:
                self._at_work = pack
                scored.append((pack, self._score(self.planner.batch(pack, self.pad)).logps))
            if self.scorer.lockstep:
                for pack in self._idle_packs(indices, packs, least=0):
                    self._score(self.planner.batch(pack, self.pad))
        random.put_back()
        policy = gather_logps(scored, indices, self.runtime)
        reference = select_pairs(self.reference, indices, policy)
        self.state.update_running_means(self.loss, policy, reference)
        whole = global_loss(
            self.loss, indices, policy, reference, counts, self.state.running_means(self.runtime.device)
        )
        if self.runtime.is_main:  # every rank has the whole step now; one counts it
            self.state.window.meter.add(policy, whole.losses, counts)
        return whole
