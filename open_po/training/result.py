"""What a run has found, in numbers."""

from __future__ import annotations

from open_po.data.run_data import Data
from open_po.output.estimate import Groups
from open_po.output.metrics import STEP, Metrics
from open_po.output.summary import RunFacts, RunResult, TrainTotals, versions
from open_po.reference import FilledStore
from open_po.training.trainer import Trainer


def run_result(
    trainer: Trainer,
    data: Data,
    reference: FilledStore | None,
    held_out: list[Metrics],
    peak: int,
    groups: Groups | None = None,
) -> RunResult:
    """What the run has found up to now; `held_out` are its evaluations so far, `peak` its peak memory in bytes.

    `groups` are the last evaluation's figures with their intervals.
    """
    done, train = trainer.state.progress, data.train
    return RunResult(
        reference=None if reference is None else reference.totals,
        train=TrainTotals(
            seconds=done.seconds,
            steps=done.step,
            pairs=done.pairs,
            tokens=done.tokens,
            response_tokens=done.response_tokens,
            layout=trainer.scorer.layout,
            max_tokens_per_batch=done.max_tokens,
            packing=done.packing.summary(),
        ),
        eval=held_out[-1] if held_out else None,
        eval_before=next((record for record in held_out if record[STEP] == 0), None),
        data=train.totals(),
        run=RunFacts(
            model_name_or_path=trainer.config.model.model_name_or_path,
            loss_type=trainer.config.loss.names,
            processes=trainer.runtime.world_size,
            device=str(trainer.runtime.device),
        ),
        numerics=trainer.scorer.numerics.key(),
        peak_memory_bytes=peak,
        predicted_memory_bytes=None if trainer.plan is None else round(trainer.plan.allocated),
        versions=versions(),
        held_out=groups,
    )
