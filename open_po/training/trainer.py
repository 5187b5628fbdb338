"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from open_po.config import RunConfig
from open_po.distributed.gathering import gather_logps
from open_po.distributed.runtime import Runtime
from open_po.errors import Preempted, UserError
from open_po.evaluation.preferences import HeldOut, evaluate
from open_po.losses import Counts, LossMix, PairLogps
from open_po.model.memory import peak_memory_bytes
from open_po.model.scorer import Scorer, Scores
from open_po.output.metrics import (
    EPOCH,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    PAIRS_PER_SECOND,
    PEAK_MEMORY_GB,
    STEP,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    Metrics,
    short_figures,
)
from open_po.output.observers import RunObserver
from open_po.output.progress import Progress
from open_po.output.run_folder import RunFolder
from open_po.output.tables import samples_table
from open_po.packing import PackedBatch, Planner, Sampler
from open_po.reference import select_pairs
from open_po.training.checkpoint import RandomState, TrainingState, UnfinishedCheckpoint, Window
from open_po.training.checkpoint_folders import prune
from open_po.training.coupled_loss import GlobalLoss, global_loss


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """One optimizer step over all ranks."""

    pairs: int
    tokens: int
    response_tokens: int
    counts: Counts


class Trainer:
    """Runs the optimizer steps of one run, from wherever its state stands to the end."""

    def __init__(
        self,
        *,
        config: RunConfig,
        runtime: Runtime,
        scorer: Scorer,
        state: TrainingState,
        loss: LossMix,
        planner: Planner,
        sampler: Sampler,
        steps: int,
        reference: PairLogps | None,
        held_out: HeldOut | None,
        pad: int,
        folder: RunFolder,
        observers: RunObserver,
    ) -> None:
        # What is trained
        self.scorer, self.engine, self.state = scorer, state.engine, state
        # On what
        self.loss, self.planner, self.sampler, self.steps = loss, planner, sampler, steps
        self.reference, self.held_out, self.pad = reference, held_out, pad
        self._stop_reason: str | None = None  # that ranks agree on, of any of them
        self._checkpoint: UnfinishedCheckpoint | None = None  # that is being written
        self._newest_checkpoint: Path | None = None
        # And around it
        self.config, self.runtime, self.folder, self.observers = config, runtime, folder, observers
        # Writes the model as of a step into the folder of its checkpoint, if it is wanted there; all ranks call it.
        self.write_model: Callable[[Path], object] | None = None

    def train(self) -> None:
        """Run to the last step, with the evaluations and checkpoints that fall due.

        Raises UserError if a loss or gradient is not finite (before the update) or a checkpoint cannot be written, and
        Preempted after a step in which a rank was asked to stop, with a checkpoint of that step on disk.
        """
        progress = self.state.progress
        self._evaluate_if_due()
        self.scorer.train()
        console, memory = self.runtime.console, peak_memory_bytes
        with Progress(console, "Training", total=self.steps, unit="steps", done=progress.step, memory=memory) as bar:
            while progress.step < self.steps:
                size, metrics = self.train_step()
                bar.advance(1, tokens=size.tokens, note=short_figures(metrics))
                if self._stop_reason is not None and progress.step < self.steps:
                    self._save(wait=True)  # and evaluate when the run goes on: there may be seconds left
                    raise Preempted(
                        f"{self._stop_reason}, after step {progress.step} of {self.steps}; saved "
                        f"{self._newest_checkpoint}, and the same command goes on from there with "
                        "--resume_from_checkpoint auto"
                    )
                self._evaluate_if_due()
                if _due(progress.step, self.config.output.checkpointing_steps):
                    self._save(wait=not self.config.output.async_checkpointing)
        self._finish_checkpoint()

    def _save(self, *, wait: bool) -> None:
        self._finish_checkpoint()  # one at a time
        self._checkpoint = self.state.begin_save(self.folder.checkpoints, self.config, self.runtime, self.write_model)
        if wait:
            self._finish_checkpoint()

    def _finish_checkpoint(self) -> None:
        if self._checkpoint is not None:
            unfinished, self._checkpoint = self._checkpoint, None
            self._newest_checkpoint = unfinished.finish()
            self.observers.checkpoint_written(self._newest_checkpoint)
            keep = self.config.output.keep_last_n_checkpoints
            self.runtime.on_main(prune, self.folder.checkpoints, keep, self.observers.needs)

    def train_step(self) -> tuple[StepSize, Metrics]:
        """One optimizer step; returns its size and the metrics written after it, if any were due."""
        start = time.monotonic()
        progress = self.state.progress
        indices = self.sampler.step_pairs(progress.step)
        size = self._size(indices)
        self._stop_if_not_finite(self._backward(indices, size))
        learning_rate = float(self.state.schedule.get_last_lr()[0])
        grad_norm = self.engine.update()
        if not math.isfinite(grad_norm):
            raise self._not_finite("gradient", indices)
        self.state.schedule.step()
        progress.step += 1
        progress.pairs += size.pairs
        progress.tokens += size.tokens
        progress.response_tokens += size.response_tokens
        self._count(size, time.monotonic() - start)
        if not (_due(progress.step, self.config.train.logging_steps) or progress.step == self.steps):
            return size, {}
        return size, self._log(learning_rate, grad_norm)

    def _size(self, indices: list[int]) -> StepSize:
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

    def _backward(self, indices: list[int], size: StepSize) -> dict[int, Tensor]:
        """Gradients of the step's loss: every pack adds its losses over the step's global counts.

        Returns whether each of this rank's pairs has a loss that is not finite; nothing here waits for the device.
        """
        counts = size.counts
        packs = self.planner.packs(indices, rank=self.runtime.replica, world_size=self.runtime.replicas)
        whole = self._whole_step(indices, packs, counts) if self.loss.batch_coupled else None
        self.state.progress.packing += self.planner.stats(packs)
        bad: dict[int, Tensor] = {}
        idle = self._idle_packs(indices, packs, least=1)
        with self.engine.step():
            for position, pack in enumerate([*packs, *idle]):
                counted = position < len(packs)
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
            scored = [(pack, self._score(self.planner.batch(pack, self.pad)).logps) for pack in packs]
            if self.scorer.lockstep:
                for pack in self._idle_packs(indices, packs, least=0):
                    self._score(self.planner.batch(pack, self.pad))
        random.put_back()
        policy = gather_logps(scored, indices, self.runtime)
        reference = select_pairs(self.reference, indices, policy)
        self.state.update_running_means(self.loss, policy, reference)
        whole = global_loss(self.loss, indices, policy, reference, counts, self.running_means())
        if self.runtime.is_main:  # every rank has the whole step now; one counts it
            self.state.window.meter.add(policy, whole.losses, counts)
        return whole

    def running_means(self) -> list[Tensor | None]:
        """The running mean of each part of the loss that keeps one."""
        means = self.state.progress.running_means
        return [torch.tensor(mean.mean, device=self.runtime.device) if mean.count else None for mean in means]

    def _stop_if_not_finite(self, not_finite: dict[int, Tensor]) -> None:
        flags = torch.stack(list(not_finite.values())).tolist() if not_finite else []
        bad = [index for index, flag in zip(not_finite, flags, strict=True) if flag]
        written = self._checkpoint is not None and self._checkpoint.saving.done()
        ranks = self.runtime.gather((bad, self.runtime.stop.reason, written))
        self._stop_reason = next((reason for _, reason, _ in ranks if reason is not None), None)
        if all(written for _, _, written in ranks):
            self._finish_checkpoint()
        if bad := list(chain.from_iterable(bad for bad, _, _ in ranks)):
            raise self._not_finite("loss", bad)

    def _not_finite(self, what: str, indices: list[int]) -> UserError:
        origins = self.planner.dataset.origins
        named = "; ".join(origins[index] for index in sorted(set(indices))[:8])
        more = len(set(indices)) - 8
        return UserError(
            f"step {self.state.progress.step + 1}: the {what} is not finite, stopped before the update; pairs: "
            f"{named}{f' and {more} more' if more > 0 else ''}; checkpoints, if any, are kept",
            shared=True,
        )

    def _count(self, size: StepSize, seconds: float) -> None:
        self.state.progress.seconds += seconds
        window = self.state.window
        window.steps += 1
        window.pairs += size.pairs
        window.tokens += size.tokens
        window.seconds += seconds

    def _log(self, learning_rate: float, grad_norm: float) -> Metrics:
        window, self.state.window = self.state.window, Window()
        means = window.meter.means(self.runtime, window.steps)
        metrics = {
            STEP: self.state.progress.step,
            EPOCH: self.sampler.epochs(self.state.progress.step),
            LEARNING_RATE: learning_rate,
            TRAIN_LOSS: means.pop(LOSS),
            **means,
            GRAD_NORM: grad_norm,
            TOKENS_PER_SECOND: window.tokens / window.seconds,
            PAIRS_PER_SECOND: window.pairs / window.seconds,
            PEAK_MEMORY_GB: peak_memory_bytes() / 1e9,
        }
        self.observers.metrics_written(metrics)
        return metrics

    def _evaluate_if_due(self) -> None:
        """Held-out metrics before the first step, every `eval_steps` and after the last, once each."""
        done = self.state.progress.step
        due = done in (0, self.steps) or _due(done, self.config.train.eval_steps)
        if due and self.state.progress.evaluated != done:
            self.evaluate()

    def evaluate(self) -> None:
        """Held-out metrics, if there is held-out data."""
        self.state.progress.evaluated = self.state.progress.step
        if self.held_out is None:
            return
        metrics = evaluate(self.scorer, self.held_out, self.loss, self.running_means(), self.runtime, pad=self.pad)
        self.observers.metrics_written({STEP: self.state.progress.step, **metrics})
        self.runtime.say(f"Held out, step {self.state.progress.step}: {short_figures(metrics)}")
        if self.held_out.sampler is not None:
            samples = self.held_out.sampler.sample(self.scorer, self.state.progress.step, self.runtime)
            self.observers.samples_written(samples)
            if self.runtime.is_main:
                self.runtime.console.print(samples_table(samples))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
