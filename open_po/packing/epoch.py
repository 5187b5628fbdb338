"""What an epoch comes to, before any model is there to train."""

from __future__ import annotations

from dataclasses import dataclass

from open_po.packing.planner import Planner
from open_po.packing.sampler import Sampler
from open_po.packing.units import PackingStats


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The packs of the first epoch."""

    packing: PackingStats  # over all ranks
    forward_passes: int  # of the rank that has the most in each step, added up
    tokens_otherwise: int  # to compute, were each response a row of its own with its prompt and without padding


def plan_epoch(planner: Planner, sampler: Sampler, ranks: int) -> EpochPlan:
    """Draw the first epoch's steps and cut them into packs as a run does."""
    data = planner.dataset
    rows = data.prompt_lengths + data.chosen_lengths
    if planner.with_rejected:
        rows = rows + data.rejected_lengths + data.prompt_lengths * (data.rejected_lengths > 0)
    packing, passes, tokens = PackingStats(), 0, 0
    for step in range(sampler.steps_per_epoch):
        pairs = sampler.step_pairs(step)
        stats, rounds = planner.loads(pairs, ranks)
        packing += stats
        passes += rounds
        tokens += int(rows[pairs].sum())
    return EpochPlan(packing=packing, forward_passes=passes, tokens_otherwise=tokens)
