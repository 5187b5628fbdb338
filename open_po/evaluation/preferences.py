"""Preference metrics on held-out pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_po.distributed.gathering import gather_logps
from open_po.distributed.runtime import Runtime
from open_po.evaluation.bootstrap import Statistics
from open_po.evaluation.breakdown import break_down, loss_statistics, reward_statistics
from open_po.evaluation.meter import PreferenceMeter
from open_po.evaluation.samples import AnswerSampler
from open_po.losses import LossMix, PairLogps
from open_po.model.memory import peak_memory_bytes
from open_po.model.scorer import Scorer
from open_po.output.estimate import Groups
from open_po.output.metrics import CHOSEN_LENGTH, HELD_OUT, LOSS, REJECTED_LENGTH, Metrics
from open_po.output.progress import Progress
from open_po.packing import Planner
from open_po.reference import select_pairs


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pairs to evaluate on, with their reference log-probs if the loss needs them."""

    planner: Planner
    reference: PairLogps | None
    sampler: AnswerSampler | None = None  # of its prompts, if answers are asked for


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation has found."""

    metrics: Metrics  # under `eval/`
    statistics: Mapping[str, Statistics]  # of rank 0: what a figure's interval follows from, by the metric's name
    held_out: HeldOut

    def groups(self) -> Groups:
        """The figures with their intervals, on rank 0: of all pairs, by source and by length."""
        return break_down(self.statistics, self.held_out.planner.dataset)


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    held_out: HeldOut,
    loss: LossMix,
    running_means: Sequence[Tensor | None],
    runtime: Runtime,
    *,
    pad: int,
) -> Evaluated:
    """The training metrics on held-out pairs taken as one batch, and mean lengths of their responses.

    Both responses are scored whatever the loss needs; figures of two are left out where a pair has one.
    """
    planner, data = held_out.planner, held_out.planner.dataset
    training = scorer.training
    scorer.eval()
    order = range(len(data))

    def score(indices: Sequence[int]) -> PairLogps:
        return scorer.score(planner.batch(indices, pad), extras=loss.extras, ld_alpha=loss.ld_alpha).logps

    packs = planner.packs(order, rank=runtime.replica, world_size=runtime.replicas)
    scored = []
    unit, mine = "pairs" if runtime.replicas == 1 else "pairs of the first rank", sum(map(len, packs))
    console, memory = runtime.console, peak_memory_bytes
    with Progress(console, "Evaluation", total=mine, unit=unit, memory=memory, last_line=False) as bar:
        for indices in packs:
            scored.append((indices, score(indices)))
            bar.advance(len(indices))
    if scorer.lockstep:
        for indices in planner.smallest(order, planner.rounds(order, runtime.replicas) - len(packs)):
            score(indices)
    scorer.train(training)
    policy = gather_logps(scored, order, runtime)
    meter, statistics = PreferenceMeter(), dict[str, Statistics]()
    if runtime.is_main:  # every rank has all pairs now; one counts them
        losses = loss(policy, select_pairs(held_out.reference, order, policy), running_means)
        meter.add(policy, losses, planner.counts(order))
        statistics = {LOSS: loss_statistics(losses, data)}
        if data.rejected_lengths.all():
            statistics |= reward_statistics(losses.chosen_rewards, losses.rejected_rewards)
    lengths = {CHOSEN_LENGTH: data.chosen_lengths.mean()}
    if data.rejected_lengths.all():
        lengths[REJECTED_LENGTH] = data.rejected_lengths.mean()
    found = {**meter.means(runtime), **{name: float(length) for name, length in lengths.items()}}
    metrics = {HELD_OUT + name: value for name, value in found.items()}
    return Evaluated(metrics=metrics, statistics=statistics, held_out=held_out)
