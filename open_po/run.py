"""One run from configuration to model: data, reference log-probs, training, output."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from open_po.checkpoint import RunningMean, TrainingProgress, TrainingState, latest_checkpoint, prune
from open_po.config import RunConfig, Sharing, help_text, load_config
from open_po.data import PairDataset, load_pairs
from open_po.data.tokenization import Truncation
from open_po.errors import ConfigError, UserError
from open_po.evaluate import HeldOut
from open_po.hub import create_repository, upload
from open_po.layout import choose_layout
from open_po.model import (
    Numerics,
    Scorer,
    attach_lora,
    checkpoint_gradients,
    load_scorer,
    load_tokenizer,
    pad_token_id,
    release_memory,
    save_model,
    trainable_parameters,
)
from open_po.optim import make_optimizer, make_schedule, total_steps
from open_po.output import RunFolder
from open_po.packing import Layout, PackingStats, Planner, Sampler
from open_po.reference import PassSummary, ReferenceStore, fill_store, model_identity
from open_po.report import evaluations, packing_line, plot_curves, summary_table, versions
from open_po.runtime import Runtime, user_line
from open_po.tracking import (
    JsonlTracker,
    Metrics,
    Tracker,
    Trackers,
    WandbTracker,
    peak_memory_bytes,
    read_metrics,
)
from open_po.trainer import Trainer


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code. What a user can cause is told in one line."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        config = load_config(arguments)
    except ConfigError as error:
        for problem in error.problems if os.environ.get("RANK", "0") == "0" else ():
            print(f"config error: {problem}", file=sys.stderr)
        return error.exit_code
    try:
        runtime = Runtime.start(config.train.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        run(config, runtime)
    except (Exception, KeyboardInterrupt) as error:
        line = user_line(error)
        if line is None:
            raise
        told_by_main = isinstance(error, UserError) and error.shared
        if runtime.is_main or not told_by_main:
            print(f"error: {'' if runtime.is_main else f'rank {runtime.rank}: '}{line}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    runtime.close()  # after an error the others may wait in a collective: then only the process's end frees them
    return 0


@dataclass(frozen=True, kw_only=True)
class Data:
    """The run's pairs and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerBase
    pad: int
    train: PairDataset
    held_out: PairDataset | None

    @property
    def parts(self) -> list[PairDataset]:
        return [self.train] if self.held_out is None else [self.train, self.held_out]

    def prepare(self, scorer: Scorer, sharing: Sharing, name: str, runtime: Runtime) -> None:
        """Set the scorer to the best layout that it takes, and say which.

        Raises UserError if the model cannot score these pairs, or scores them differently from its own forward.
        """
        longest = max(part.longest_row for part in self.parts)
        scorer.check_ids(max(part.highest_id for part in self.parts))
        scorer.check_length(longest)
        samples = [self.train[index] for index in range(min(2, len(self.train)))]
        samples += [part[index] for part in self.parts for index in [part.longest_pair] if part.longest_row == longest]
        choice = choose_layout(scorer, samples, sharing, longest=longest, pad=self.pad)
        runtime.say(f"{name}: {choice.describe()}")


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
    data = prepare_data(config, runtime)
    needs_reference = config.loss.mix().needs_reference
    reference = separate_reference(config, runtime, data) if needs_reference and _is_separate(config) else None
    policy = _load_alike(lambda: load_policy(config, numerics, runtime, data), runtime)
    model = config.model
    identity = runtime.on_main(
        lambda: model_identity(model.model_name_or_path, model.model_revision, model.trust_remote_code)
    )
    if needs_reference and reference is None:
        reference = fill_reference(lambda: policy, identity, numerics, config, runtime, data)
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


def prepare_data(config: RunConfig, runtime: Runtime) -> Data:
    """Tokenizer and pairs. Rank 0 tokenises, the others read its cache."""

    def load() -> Data:
        tokenizer = load_tokenizer(config.model)
        data = config.data
        truncation = Truncation(data.max_seq_length, data.max_prompt_length)
        workers = data.preprocessing_num_workers
        train = load_pairs(
            data.mixer_list or [],
            data.mixer_list_splits,
            tokenizer,
            truncation,
            max_rows=data.max_train_samples,
            num_workers=workers,
        )
        held_out = None
        if data.eval_mixer_list is not None:
            held_out = load_pairs(
                data.eval_mixer_list, data.eval_mixer_list_splits, tokenizer, truncation, num_workers=workers
            )
        return Data(tokenizer=tokenizer, pad=pad_token_id(tokenizer), train=train, held_out=held_out)

    if runtime.world_size > 1:
        runtime.on_main(lambda: bool(load()))
    loaded = load()
    for label, part in (("Training data", loaded.train), ("Held-out data", loaded.held_out)):
        for line in part.describe() if part is not None else []:
            runtime.say(f"{label}: {line}")
    return loaded


# --------------------------------------------------------------------------------------------------------- reference


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A filled store and what filling it took."""

    store: ReferenceStore
    summary: PassSummary


def _is_separate(config: RunConfig) -> bool:
    reference, model = config.reference, config.model
    same = (reference.reference_model_name_or_path, reference.reference_model_revision) == (
        model.model_name_or_path,
        model.model_revision,
    )
    return reference.reference_model_name_or_path is not None and not same


def separate_reference(config: RunConfig, runtime: Runtime, data: Data) -> Reference:
    """Log-probs of a reference model that is not the policy; it is loaded only if some are missing, and freed."""
    name, revision = config.reference.reference_model_name_or_path or "", config.reference.reference_model_revision
    numerics = Numerics.choose(config.model, runtime.device, trainable_weights=False)

    def load() -> Scorer:
        scorer = load_scorer(name, revision, numerics, runtime.device, trust_remote_code=config.model.trust_remote_code)
        data.prepare(scorer, config.model.prompt_sharing, "Reference model", runtime)
        return scorer

    trust = config.model.trust_remote_code
    identity = runtime.on_main(lambda: model_identity(name, revision, trust))
    reference = fill_reference(load, identity, numerics, config, runtime, data)
    release_memory()
    return reference


def fill_reference(
    load: Callable[[], Scorer],
    identity: dict[str, str],
    numerics: Numerics,
    config: RunConfig,
    runtime: Runtime,
    data: Data,
) -> Reference:
    """The store of the model `identity` with all of `data`'s pairs in it.

    `load` is called only if some are missing.
    """
    start = time.monotonic()
    cache_dir = Path(config.reference.reference_cache_dir)
    facts = {"model": identity, "numerics": numerics.key()}

    by_token = config.loss.mix().ld_alpha != 1.0
    store: ReferenceStore | None = None

    def count() -> tuple[Path, int]:
        nonlocal store
        store = ReferenceStore(ReferenceStore.create(cache_dir, facts))
        return store.folder, sum(len({r.pair for r in store.missing(part, by_token=by_token)}) for part in data.parts)

    # Rank 0 counts and the others read the store afterwards: rows of other ranks and runs may appear at any moment.
    folder, missing = runtime.on_main(count)
    store = store or ReferenceStore(folder)
    done = PackingStats()
    usual = (4 if runtime.device.type == "cuda" else 1) * (config.train.max_tokens_per_batch or 0)
    max_tokens = config.reference.reference_max_tokens_per_batch or usual
    if missing:
        scorer = _load_alike(load, runtime)
        for part in data.parts:
            done += fill_store(store, scorer, part, runtime, by_token=by_token, max_tokens=max_tokens, pad=data.pad)
    reused = sum(map(len, data.parts)) - missing
    if reused:
        runtime.say(f"Reference log-probs: {reused:,} pairs from the cache {store.folder}")
    seconds = time.monotonic() - start
    packing = done.summary() if done.packs else None
    if packing is not None:
        runtime.say(f"Reference packing: {packing_line(packing)}")
    summary = PassSummary(seconds=seconds, pairs_computed=missing, pairs_reused=reused, packing=packing)
    return Reference(store=store, summary=summary)


def _load_alike(load: Callable[[], Scorer], runtime: Runtime) -> Scorer:
    """A model on every rank, all with the same layout, since each plans for all."""
    scorer = runtime.on_all(load)
    layouts = runtime.gather(scorer.layout)
    scorer.use_layout(max(layouts, key=get_args(Layout).index))
    if len(set(layouts)) > 1:
        runtime.say(f"The ranks found different layouts ({', '.join(layouts)}); all take {scorer.layout}")
    return scorer


# ---------------------------------------------------------------------------------------------------------- training


def load_policy(config: RunConfig, numerics: Numerics, runtime: Runtime, data: Data) -> Scorer:
    """The policy at its starting weights, checked against its own forward, with adapters if the run trains them."""
    model = config.model
    scorer = load_scorer(
        model.model_name_or_path,
        model.model_revision,
        numerics,
        runtime.device,
        trust_remote_code=model.trust_remote_code,
    )
    data.prepare(scorer, model.prompt_sharing, "Policy", runtime)
    if config.loss.load_balancing_loss:
        scorer.balance_experts()
    if model.gradient_checkpointing:
        checkpoint_gradients(scorer)
    if model.use_lora:
        attach_lora(scorer, model)
    return scorer


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
            reference=None if reference is None else reference.store.lookup(data.held_out, loss.ld_alpha),
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
        reference=None if reference is None else reference.store.lookup(data.train, loss.ld_alpha),
        held_out=held_out,
        pad=data.pad,
        folder=folder,
        trackers=trackers,
    )


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


# ------------------------------------------------------------------------------------------------------------ output


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
