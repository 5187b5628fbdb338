"""Where training starts: at the first step, or where a checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from open_po.config import RunConfig
from open_po.data import PairDataset
from open_po.distributed.engine import Engine
from open_po.distributed.runtime import Runtime
from open_po.output.run_folder import RunFolder
from open_po.packing import Sampler
from open_po.training.checkpoint import RunningMean, SavedState, TrainingProgress, TrainingState
from open_po.training.checkpoint_folders import latest_checkpoint, prune
from open_po.training.optimizer import long_warmup, make_schedule, total_steps


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run trains from."""

    state: TrainingState
    sampler: Sampler
    steps: int  # of the whole run
    resumed: bool


def start_or_resume(
    config: RunConfig,
    runtime: Runtime,
    dataset: PairDataset,
    engine: Engine,
    identity: dict[str, str],
    folder: RunFolder,
    needed: Callable[[Path], bool],
) -> Start:
    """The first step, or the one after a checkpoint if the configuration says so; all ranks call this.

    A run that goes on with another number of ranks keeps its global batch, so its steps stay the same. Old checkpoints
    that are not `needed` are removed. Raises UserError if the checkpoint is damaged or another run's.
    """
    train = config.train
    saved = _saved_state(config, runtime, identity, folder)
    batch = train.pairs_of_rank * runtime.replicas
    sampler = Sampler(
        num_pairs=len(dataset),
        global_batch=batch if saved is None else saved.global_batch,
        seed=train.seed,
        prompt_numbers=dataset.prompt_numbers if train.group_pairs_by_prompt else None,
    )
    steps = total_steps(train, sampler.steps_per_epoch)
    if line := long_warmup(train, steps):
        runtime.say(line)
    state = TrainingState(
        engine=engine,
        started_from=identity,
        data=dataset.identity(),
        global_batch=sampler.global_batch,
        schedule=make_schedule(engine.optimizer, train, steps),
        progress=TrainingProgress(running_means=[RunningMean() for _ in config.loss.mix().parts]),
    )
    if saved is not None:
        state.restore(saved, runtime)
        # A run killed between writing its last checkpoint and pruning would keep one too many.
        if config.output.resume_from_checkpoint in ("auto", "hub"):
            runtime.on_main(prune, folder.checkpoints, config.output.keep_last_n_checkpoints, needed)
        runtime.say(f"Resuming from {saved.folder}")
        if saved.global_batch != batch:
            runtime.say(
                f"The run keeps its global batch of {saved.global_batch} pairs; its ranks are {runtime.world_size} "
                f"now, {saved.ranks} before"
            )
    return Start(state=state, sampler=sampler, steps=steps, resumed=saved is not None)


def refuse_other_run(config: RunConfig, runtime: Runtime, dataset: PairDataset, folder: RunFolder) -> None:
    """Raises UserError if the checkpoint to continue from is of another configuration or of other data.

    All ranks call this, before anything takes long.
    """
    if (checkpoint := _checkpoint(config, runtime, folder)) is not None:
        saved = runtime.on_every_rank(SavedState.read, checkpoint)
        runtime.on_every_rank(saved.refuse_other_run, config, dataset.identity())


def _saved_state(config: RunConfig, runtime: Runtime, identity: dict[str, str], folder: RunFolder) -> SavedState | None:
    """The checkpoint to continue from, if any, after a check that this run may."""
    checkpoint = _checkpoint(config, runtime, folder)
    if checkpoint is None:
        if config.output.resume_from_checkpoint is not None:
            runtime.say(f"No checkpoint in {folder.checkpoints} yet: starting from the beginning.")
        return None
    saved = runtime.on_every_rank(SavedState.read, checkpoint)
    runtime.on_every_rank(saved.refuse_unless_continued_by, config, identity, runtime)
    return saved


def _checkpoint(config: RunConfig, runtime: Runtime, folder: RunFolder) -> Path | None:
    """The one that the configuration names, on rank 0's disk."""
    wanted = config.output.resume_from_checkpoint
    if wanted is None:
        return None
    found = latest_checkpoint(folder.checkpoints) if wanted in ("auto", "hub") else Path(wanted)
    return runtime.from_main(lambda: found)
