"""Preference metrics on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_po.distributed.gathering import gather_logps
from open_po.distributed.runtime import Runtime
from open_po.evaluation.meter import PreferenceMeter
from open_po.evaluation.samples import AnswerSampler
from open_po.losses import LossMix, PairLogps
from open_po.model.memory import peak_memory_bytes
from open_po.model.scorer import Scorer
from open_po.output.metrics import HELD_OUT, Metrics
from open_po.output.progress import Progress
from open_po.packing import Planner
from open_po.reference import select_pairs


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pairs to evaluate on, with their reference log-probs if the loss needs them."""

    planner: Planner
    reference: PairLogps | None
    sampler: AnswerSampler | None = None  # of its prompts, if answers are asked for


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    held_out: HeldOut,
    loss: LossMix,
    running_means: Sequence[Tensor | None],
    runtime: Runtime,
    *,
    pad: int,
) -> Metrics:
    """The training metrics on held-out pairs taken as one batch, under `eval/`.

    Both responses are scored whatever the loss needs.
    """
    planner = held_out.planner
    training = scorer.training
    scorer.eval()
    order = range(len(planner.dataset))

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
    meter = PreferenceMeter()
    if runtime.is_main:  # every rank has all pairs now; one counts them
        losses = loss(policy, select_pairs(held_out.reference, order, policy), running_means)
        meter.add(policy, losses, planner.counts(order))
    return {HELD_OUT + name: value for name, value in meter.means(runtime).items()}
