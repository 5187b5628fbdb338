"""One run from configuration to model: data, reference log-probs, training, output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from open_po.config import RunConfig
from open_po.data import PairDataset
from open_po.data.run_data import Data, prepare_data
from open_po.distributed.runtime import Runtime
from open_po.errors import Preempted
from open_po.evaluation.preferences import HeldOut
from open_po.evaluation.samples import AnswerSampler
from open_po.hub.background import HubUploader
from open_po.hub.fetch import fetch_checkpoint
from open_po.losses import LossMix, PairLogps
from open_po.model.divided import HollowModel
from open_po.model.export import export_adapter, export_model
from open_po.model.memory import peak_memory_bytes
from open_po.model.numerics import Numerics, policy_numerics, reference_numerics, saved_dtype
from open_po.model.prepare import Policy, is_divided, load_policy, refuse_what_cannot_train
from open_po.model.scorer import Scorer
from open_po.model.token_budget import SMALLEST
from open_po.model_files import agreed_identity, policy_source
from open_po.output.card import write_card
from open_po.output.estimate import Groups
from open_po.output.files import disk_faults
from open_po.output.metrics import evaluations, read_metrics
from open_po.output.observers import Observers, RunObserver
from open_po.output.run_folder import RunFolder
from open_po.output.summary import RunSummary, Status
from open_po.output.tables import groups_table, packing_line, result_table
from open_po.output.trackers import make_trackers
from open_po.packing import Planner
from open_po.reference import FilledStore, ensure_reference, log_probs_of, open_cache, separate_reference
from open_po.training.card_facts import card_facts
from open_po.training.checkpoint_folders import latest_checkpoint
from open_po.training.memory import tell_plan
from open_po.training.model_of_step import ModelOfStep
from open_po.training.optimizer import lost_updates, make_optimizer
from open_po.training.result import run_result
from open_po.training.start import start_or_resume
from open_po.training.step_budget import settle_budget
from open_po.training.trainer import Trainer


def run(config: RunConfig, runtime: Runtime, words: Sequence[str] = ()) -> None:
    """The whole job; `words` are those of the command line. Raises UserError for whatever a user can cause."""
    folder = RunFolder(Path(config.output.output_dir))
    numerics = runtime.from_main(policy_numerics, config, runtime.device, runtime.parallelism)
    if runtime.parallelism.is_free and not numerics.four_bit:
        runtime = runtime.on_every_rank(HollowModel, policy_source(config), numerics, runtime).settle(config)
    try:
        mine = runtime.from_main(folder.claim, config)
        runtime.on_every_rank(folder.refuse_unless_shared, runtime.from_main(folder.config.read_text))
        if mine:
            with folder.recording_failure(runtime.is_main):
                if runtime.is_main:
                    runtime.console.board.keep_in(folder.board)
                hub = _open_hub(folder, config, runtime)  # before training, so that a bad token is found early
                observers = _train(folder, config, numerics, runtime, hub, words)
        else:
            due = config.output.push_to_hub and not runtime.from_main(folder.published_to)
            runtime.say(f"The run in {folder.path} is complete{'' if due else '; nothing to do'}.")
            observers = Observers(_open_hub(folder, config, runtime) if due else [])
        runtime.on_main(_tell_completed, observers, folder)
    finally:
        runtime.console.board.close()
        folder.release()


def _open_hub(folder: RunFolder, config: RunConfig, runtime: Runtime) -> list[HubUploader]:
    """The uploader, on rank 0, if the run is to be uploaded; with `resume_from_checkpoint` hub it fetches first."""
    if not config.output.push_to_hub:
        return []
    uploader = runtime.on_main(HubUploader, folder, config.output, runtime.console)
    if config.output.resume_from_checkpoint == "hub" and not folder.is_complete():
        newest = latest_checkpoint(folder.checkpoints)
        runtime.on_main(lambda: fetch_checkpoint(folder, cast(HubUploader, uploader).branch, newest, runtime.say))
    return [] if uploader is None else [uploader]


def _tell_completed(observers: RunObserver, folder: RunFolder) -> None:
    summary = folder.read_summary()
    assert summary is not None, "a complete run has a summary"
    observers.completed(summary)


def _train(
    folder: RunFolder,
    config: RunConfig,
    numerics: Numerics,
    runtime: Runtime,
    observers: Sequence[RunObserver],
    words: Sequence[str],
) -> RunObserver:
    """Everything from the data to the saved model; returns all observers of the run."""
    needs_reference = config.loss.mix().needs_reference
    source = policy_source(config)
    runtime.on_each_node(refuse_what_cannot_train, config, numerics, runtime)
    if needs_reference:
        runtime.on_each_node(open_cache, config)
    data = prepare_data(config, runtime)
    if needs_reference:
        _tell_of_other_numerics(config, numerics, runtime)
    plan = runtime.on_main(tell_plan, config, runtime, data)
    reference = separate_reference(config, runtime, data) if needs_reference else None
    identity = agreed_identity(source, Path(config.reference.reference_cache_dir), runtime)
    # Whole copies, where they fit, need no gathering of weights, and no rank waits for another.
    divides = needs_reference and reference is None and runtime.parallelism.divides_weights
    by_itself = runtime.parallelism.kind == "tp"  # whose forward passes are of one pack on all ranks
    if divides and (by_itself or not is_divided(source, numerics, config.reference, runtime)):
        reference = log_probs_of(source, numerics, config, runtime, data, label="Policy as reference")
    # Adapters, and weights that are updated on the host, are float32.
    exact = config.model.use_lora or runtime.parallelism.offload_optimizer
    if not exact and (line := lost_updates(config.train, numerics)):
        runtime.say(line)
    policy = load_policy(config, numerics, runtime, data, partial(make_optimizer, config=config.train))
    if needs_reference and reference is None:
        reference = ensure_reference(lambda: policy.scorer, source, identity, numerics, config, runtime, data)
    if reference is not None and reference.totals.packing is not None:
        runtime.say(f"Reference packing: {packing_line(reference.totals.packing)}")
    trainer = make_trainer(config, runtime, data, policy, identity, reference, folder, observers)
    trainer.plan = plan
    if config.output.push_to_hub and config.output.hub_strategy != "end":
        trainer.write_model = ModelOfStep(trainer=trainer, data=data, reference=reference, words=words)
    try:
        with runtime.stop.deferred():
            trainer.train()
            runtime.on_main(trainer.observers.training_ended)
            finish(config, runtime, trainer, data, reference, words)
    except Preempted as error:  # on all ranks, after the same step; none ends before what rank 0 waits for has
        runtime.on_main(trainer.observers.stopped, error)
        raise
    except BaseException as error:
        trainer.observers.stopped(error)
        raise
    return trainer.observers


def _tell_of_other_numerics(config: RunConfig, numerics: Numerics, runtime: Runtime) -> None:
    """Say so if the reference does not compute as the policy does, whose log-probs it is compared with."""
    reference = runtime.from_main(reference_numerics, config, runtime.device, runtime.parallelism)
    if reference.describe() != numerics.describe():
        runtime.say(f"Reference model: computes {reference.describe()}, the policy {numerics.describe()}")


def make_trainer(
    config: RunConfig,
    runtime: Runtime,
    data: Data,
    policy: Policy,
    identity: dict[str, str],
    reference: FilledStore | None,
    folder: RunFolder,
    observers: Sequence[RunObserver] = (),
) -> Trainer:
    """The trainer, resumed from a checkpoint if the configuration says so.

    `observers` learn of the run besides the trackers that it gets here.
    """
    scorer, loss = policy.scorer, config.loss.mix()
    start = start_or_resume(config, runtime, data.train, policy.engine, identity, folder, Observers(observers).needs)
    progress = start.state.progress
    planner = _planner(data.train, scorer, loss, SMALLEST, with_rejected=loss.needs_rejected)
    tokens = settle_budget(config, runtime, scorer, planner, loss, start, data)
    config = _settled(config, tokens, reference)
    runtime.on_main(folder.note, config)
    resumed = progress.step if start.resumed else None
    trackers = runtime.on_main(make_trackers, config, folder, resumed, progress.tracker_ids, runtime.say) or []
    return Trainer(
        config=config,
        runtime=runtime,
        scorer=scorer,
        state=start.state,
        loss=loss,
        planner=dataclasses.replace(planner, max_tokens=tokens),
        sampler=start.sampler,
        steps=start.steps,
        reference=_reference_logps(reference, data.train, loss.ld_alpha, runtime),
        held_out=_held_out(config, runtime, data, scorer, reference),
        pad=data.pad,
        folder=folder,
        observers=Observers([*trackers, *observers]),
    )


def _settled(config: RunConfig, tokens: int, reference: FilledStore | None) -> RunConfig:
    """The configuration with the numbers that `auto` has become."""
    train = dataclasses.replace(config.train, max_tokens_per_batch=tokens)
    found = None if reference is None else reference.totals.max_tokens_per_batch
    if found is None:
        return dataclasses.replace(config, train=train)
    of_reference = dataclasses.replace(config.reference, reference_max_tokens_per_batch=found)
    return dataclasses.replace(config, train=train, reference=of_reference)


def _held_out(
    config: RunConfig, runtime: Runtime, data: Data, scorer: Scorer, reference: FilledStore | None
) -> HeldOut | None:
    if data.held_out is None:
        return None
    loss = config.loss.mix()
    return HeldOut(
        planner=_planner(
            data.held_out, scorer, loss, config.train.token_budget
        ),  # both responses, whatever the loss needs
        reference=_reference_logps(reference, data.held_out, loss.ld_alpha, runtime),
        sampler=AnswerSampler(data.held_out, data.tokenizer, config.train) if config.train.sample_during_eval else None,
    )


def _planner(
    dataset: PairDataset, scorer: Scorer, loss: LossMix, max_tokens: int, *, with_rejected: bool = True
) -> Planner:
    return Planner(
        dataset=dataset,
        layout=scorer.layout,
        max_tokens=max_tokens,
        with_rejected=with_rejected,
        with_prompt="prompt" in loss.extras,
    )


def _reference_logps(
    reference: FilledStore | None, dataset: PairDataset, ld_alpha: float, runtime: Runtime
) -> PairLogps | None:
    return None if reference is None else runtime.on_every_rank(reference.store.logps_of, dataset, ld_alpha)


def finish(
    config: RunConfig,
    runtime: Runtime,
    trainer: Trainer,
    data: Data,
    reference: FilledStore | None,
    words: Sequence[str],
) -> None:
    """Write the model, its card, the curves and the summary, and print the summary's table; all ranks call this."""
    dtype = saved_dtype(config.output, trainer.scorer.numerics)
    peak = peak_memory_bytes()  # of training, not of the copies that an export makes
    runtime.on_every_rank(_save_model, trainer, data.tokenizer, dtype, runtime.is_main)
    groups = trainer.held_out_groups()
    runtime.on_main(_write_results, runtime, trainer, data, reference, words, peak, groups)


def _save_model(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, mine: bool) -> None:
    """The model into the run's folder; all ranks call this, and the one whose folder is `mine` writes."""
    with trainer.folder.staging() if mine else nullcontext() as staged:
        if trainer.config.output.merge_on_save:
            export_model(trainer.scorer, dtype, tokenizer, staged)
        else:
            export_adapter(trainer.scorer, tokenizer, staged)


def _write_results(
    runtime: Runtime,
    trainer: Trainer,
    data: Data,
    reference: FilledStore | None,
    words: Sequence[str],
    peak: int,
    groups: Groups | None,
) -> None:
    folder = trainer.folder
    records = read_metrics(folder.metrics)
    result = run_result(trainer, data, reference, evaluations(records), peak, groups)
    with disk_faults(f"{folder.path}: the model's card", "the model is written"):
        write_card(folder.path, card_facts(trainer, data, reference, result, words), records)
    folder.write_summary(RunSummary(status=Status.COMPLETED, result=result))
    runtime.console.print(result_table(result, folder.path))
    if groups is not None:
        runtime.console.print(groups_table(groups, "Held out"))
