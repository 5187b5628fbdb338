"""One run from configuration to model: data, reference log-probs, training, output."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from open_po.config import RunConfig
from open_po.data import PairDataset
from open_po.data.run_data import Data, prepare_data
from open_po.distributed.runtime import Runtime
from open_po.evaluation.preferences import HeldOut
from open_po.losses import PairLogps
from open_po.model.export import save_model
from open_po.model.memory import peak_memory_bytes
from open_po.model.numerics import Numerics
from open_po.model.prepare import load_alike, load_policy
from open_po.model.scorer import Scorer, trainable_parameters
from open_po.model_files import agreed_identity, policy_source
from open_po.output.curves import plot_curves
from open_po.output.hub import create_repository, upload
from open_po.output.metrics import Metrics, evaluations, read_metrics
from open_po.output.run_folder import RunFolder
from open_po.output.summary import versions
from open_po.output.tables import packing_line, summary_table
from open_po.output.trackers import JsonlTracker, Tracker, Trackers, WandbTracker
from open_po.packing import Planner, Sampler
from open_po.reference import Reference, ensure_reference, open_cache, separate_reference
from open_po.training.checkpoint import latest_checkpoint, prune
from open_po.training.optimizer import make_optimizer, make_schedule, total_steps
from open_po.training.state import RunningMean, TrainingProgress, TrainingState
from open_po.training.trainer import Trainer


def run(config: RunConfig, runtime: Runtime) -> None:
    """The whole job. Raises UserError for whatever a user can cause."""
    folder = RunFolder(Path(config.output.output_dir or ""))
    numerics = runtime.on_main(
        lambda: Numerics.choose(config.model, runtime.device, trainable_weights=not config.model.use_lora)
    )
    try:
        _run_in(folder, config, numerics, runtime)
    finally:
        folder.release()


def _run_in(folder: RunFolder, config: RunConfig, numerics: Numerics, runtime: Runtime) -> None:
    """The job in a folder that is claimed first."""
    if not runtime.on_main(lambda: folder.claim(config)):
        due = config.output.push_to_hub and runtime.on_main(lambda: "uploaded_to" not in folder.recorded())
        runtime.say(f"The run in {folder.path} is complete{'' if due else '; nothing to do'}.")
        if due:
            _upload(folder, _repository(config, runtime), config, runtime)
        return
    with folder.recording_failure(runtime.is_main):
        # Before training, so that a bad token is found early.
        repository = _repository(config, runtime) if config.output.push_to_hub else None
        _train(folder, config, numerics, runtime)
    if repository is not None:
        _upload(folder, repository, config, runtime)


def _train(folder: RunFolder, config: RunConfig, numerics: Numerics, runtime: Runtime) -> None:
    """Everything from the data to the saved model."""
    needs_reference = config.loss.mix().needs_reference
    source = policy_source(config)
    if needs_reference:
        runtime.on_main(lambda: open_cache(config))
    data = prepare_data(config, runtime)
    reference = separate_reference(config, runtime, data) if needs_reference else None
    identity = agreed_identity(source, Path(config.reference.reference_cache_dir), runtime)
    policy = load_alike(lambda: load_policy(config, numerics, runtime, data), runtime)
    if needs_reference and reference is None:
        reference = ensure_reference(lambda: policy, source, identity, numerics, config, runtime, data)
    if reference is not None and reference.summary.packing is not None:
        runtime.say(f"Reference packing: {packing_line(reference.summary.packing)}")
    trainer = make_trainer(config, runtime, data, policy, identity, reference, folder)
    trainer.train()
    trainer.trackers.close()
    runtime.on_main(lambda: finish(config, runtime, trainer, data, reference))


def _repository(config: RunConfig, runtime: Runtime) -> str:
    return runtime.on_main(lambda: create_repository(config.output))


def _upload(folder: RunFolder, repository: str, config: RunConfig, runtime: Runtime) -> None:
    """Upload a completed run's model, and note that in its summary."""
    runtime.on_main(lambda: upload(folder.path, repository, config.output.hf_repo_revision))
    runtime.on_main(lambda: folder.record(uploaded_to=repository))
    runtime.say(f"Uploaded to the Hub: {repository}")


def make_trainer(
    config: RunConfig,
    runtime: Runtime,
    data: Data,
    scorer: Scorer,
    identity: dict[str, str],
    reference: Reference | None,
    folder: RunFolder,
) -> Trainer:
    """The trainer, resumed from a checkpoint if the configuration says so."""
    train = config.train
    loss = config.loss.mix()
    sampler = Sampler(
        num_pairs=len(data.train),
        global_batch=train.per_device_train_batch_size * train.gradient_accumulation_steps * runtime.world_size,
        seed=train.seed,
        prompt_numbers=data.train.prompt_numbers if train.group_pairs_by_prompt else None,
    )
    steps = total_steps(train, sampler.steps_per_epoch)
    optimizer = make_optimizer(trainable_parameters(scorer), train)
    state = TrainingState(
        scorer=scorer,
        started_from=identity,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, steps),
        progress=TrainingProgress(running_means=[RunningMean() for _ in loss.parts]),
    )
    resumed = _resume(config, runtime, state, folder)
    trackers = Trackers([])
    # What a tracker refuses is raised on all ranks; the trackers themselves stay with rank 0.
    runtime.on_main(lambda: trackers.trackers.extend(_make_trackers(config, state.progress, folder, resumed)))
    held_out = None
    if data.held_out is not None:
        held_out = HeldOut(
            planner=Planner(
                dataset=data.held_out,
                layout=scorer.layout,
                max_tokens=train.max_tokens_per_batch or 0,
                with_prompt="prompt" in loss.extras,
            ),
            reference=_lookup(reference, data.held_out, loss.ld_alpha, runtime),
        )
    return Trainer(
        config=config,
        runtime=runtime,
        state=state,
        loss=loss,
        planner=Planner(
            dataset=data.train,
            layout=scorer.layout,
            max_tokens=train.max_tokens_per_batch or 0,
            with_rejected=loss.needs_rejected,
            with_prompt="prompt" in loss.extras,
        ),
        sampler=sampler,
        steps=steps,
        reference=_lookup(reference, data.train, loss.ld_alpha, runtime),
        held_out=held_out,
        pad=data.pad,
        folder=folder,
        trackers=trackers,
    )


def _lookup(reference: Reference | None, dataset: PairDataset, ld_alpha: float, runtime: Runtime) -> PairLogps | None:
    return None if reference is None else runtime.on_all(lambda: reference.store.lookup(dataset, ld_alpha))


def _resume(config: RunConfig, runtime: Runtime, state: TrainingState, folder: RunFolder) -> bool:
    wanted = config.output.resume_from_checkpoint
    if wanted is None:
        return False
    checkpoint = latest_checkpoint(folder.checkpoints) if wanted == "auto" else Path(wanted)
    if checkpoint is None:
        runtime.say(f"No checkpoint in {folder.checkpoints} yet: starting from the beginning.")
        return False
    runtime.on_all(lambda: state.restore(checkpoint, config, runtime))
    if wanted == "auto":  # a run killed between writing its last checkpoint and pruning would keep one too many
        runtime.on_main(lambda: prune(folder.checkpoints, config.output.keep_last_n_checkpoints))
    runtime.say(f"Resuming from {checkpoint}")
    return True


def _make_trackers(config: RunConfig, progress: TrainingProgress, folder: RunFolder, resumed: bool) -> list[Tracker]:
    trackers: list[Tracker] = [JsonlTracker(folder.metrics, progress.step if resumed else -1)]
    if config.output.with_tracking:
        wandb = WandbTracker(config, folder.path, progress.wandb_run_id)
        progress.wandb_run_id = wandb.run.id
        trackers.append(wandb)
    return trackers


def finish(config: RunConfig, runtime: Runtime, trainer: Trainer, data: Data, reference: Reference | None) -> None:
    """Write the model, the curves and the summary, and print the summary's table."""
    folder, scorer = trainer.folder, trainer.state.scorer
    wanted = config.output.save_dtype
    dtype = scorer.numerics.compute_dtype if wanted == "auto" else getattr(torch, wanted)
    with folder.staging() as staged:
        save_model(scorer, data.tokenizer, staged, dtype)
    records = read_metrics(folder.metrics)
    plot_curves(records, folder.curves, f"{config.output.exp_name}: {' + '.join(config.loss.names)}")
    summary = _summary(trainer, data, reference, evaluations(records))
    folder.write_summary(summary)
    runtime.console.print(summary_table(summary, folder.path))


def _summary(trainer: Trainer, data: Data, reference: Reference | None, held_out: list[Metrics]) -> dict[str, Any]:
    done = trainer.state.progress
    return {
        "status": "completed",
        "reference": None if reference is None else asdict(reference.summary),
        "train": {
            "seconds": done.seconds,
            "steps": done.step,
            "pairs": done.pairs,
            "tokens": done.tokens,
            "response_tokens": done.response_tokens,
            "layout": trainer.state.scorer.layout,
            "packing": done.packing.summary(),
        },
        "eval": held_out[-1] if held_out else None,
        "eval_before": next((record for record in held_out if record["training_step"] == 0), None),
        "data": {
            "pairs": len(data.train),
            "left_out": {reason: len(origins) for reason, origins in data.train.left_out.items()},
            "truncated_prompts": data.train.truncated_prompts,
            "truncated_responses": data.train.truncated_responses,
        },
        "run": {
            "model_name_or_path": trainer.config.model.model_name_or_path,
            "loss_type": trainer.config.loss.names,
            "processes": trainer.runtime.world_size,
            "device": str(trainer.runtime.device),
        },
        "numerics": trainer.state.scorer.numerics.key(),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
    }
