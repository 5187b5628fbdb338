"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from open_po.config import RunConfig
from open_po.distributed.runtime import Runtime
from open_po.errors import Preempted, UserError
from open_po.evaluation.preferences import Evaluated, HeldOut, evaluate
from open_po.evaluation.samples import Samples
from open_po.losses import LossMix, PairLogps
from open_po.memory_plan import MemoryPlan
from open_po.model.memory import peak_memory_bytes
from open_po.model.scorer import Scorer
from open_po.output.estimate import Groups
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
    UPDATE_FRACTION,
    Metrics,
    short_figures,
)
from open_po.output.observers import RunObserver
from open_po.output.progress import Progress
from open_po.output.run_folder import RunFolder
from open_po.output.tables import samples_table
from open_po.packing import Planner, Sampler
from open_po.training.checkpoint import TrainingState, UnfinishedCheckpoint, Window
from open_po.training.checkpoint_folders import prune
from open_po.training.gradients import StepGradients, StepSize
from open_po.training.update_fraction import WeightSample


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
        self.held_out, self.pad = held_out, pad
        self.gradients = StepGradients(
            config=config,
            runtime=runtime,
            scorer=scorer,
            state=state,
            loss=loss,
            planner=planner,
            reference=reference,
            pad=pad,
        )
        self._stop_reason: str | None = None  # that ranks agree on, of any of them
        self._checkpoint: UnfinishedCheckpoint | None = None  # that is being written
        self._newest_checkpoint: Path | None = None
        self._evaluated: Evaluated | None = None  # the last evaluation of this process
        # And around it
        self.config, self.runtime, self.folder, self.observers = config, runtime, folder, observers
        # Writes the model as of a step into the folder of its checkpoint, if it is wanted there; all ranks call it.
        self.write_model: Callable[[Path], object] | None = None
        self.plan: MemoryPlan | None = None  # of the memory that it takes, on rank 0

    def train(self) -> None:
        """Run to the last step, with the evaluations and checkpoints that fall due.

        Raises UserError if a loss or gradient is not finite (before the update, unless it says that this had begun in
        the backward pass) or a checkpoint cannot be written, and Preempted after a step in which a rank was asked to
        stop, with a checkpoint of that step on disk.
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
        size = self.gradients.size(indices)
        number = progress.step + 1
        due = _due(number, self.config.train.logging_steps) or number == self.steps
        weights = WeightSample.take(self.engine) if due else None
        self._stop_if_not_finite(self.gradients.backward(indices, size))
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
        if weights is None:
            return size, {}
        return size, self._log(learning_rate, grad_norm, weights.changed(self.runtime))

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
        stopped, kept = "stopped before the update", "checkpoints, if any, are kept"
        if self.engine.weights_changed:
            stopped = "stopped after the update had begun in the backward pass (optimizer_in_backward)"
            kept = "go on from the last checkpoint, if any, with --resume_from_checkpoint auto"
        return UserError(
            f"step {self.state.progress.step + 1}: the {what} is not finite, {stopped}; pairs: "
            f"{named}{f' and {more} more' if more > 0 else ''}; {kept}",
            shared=True,
        )

    def _count(self, size: StepSize, seconds: float) -> None:
        self.state.progress.seconds += seconds
        window = self.state.window
        window.steps += 1
        window.pairs += size.pairs
        window.tokens += size.tokens
        window.seconds += seconds

    def _log(self, learning_rate: float, grad_norm: float, update_fraction: float) -> Metrics:
        window, self.state.window = self.state.window, Window()
        means = window.meter.means(self.runtime, window.steps)
        metrics = {
            STEP: self.state.progress.step,
            EPOCH: self.sampler.epochs(self.state.progress.step),
            LEARNING_RATE: learning_rate,
            TRAIN_LOSS: means.pop(LOSS),
            **means,
            GRAD_NORM: grad_norm,
            UPDATE_FRACTION: update_fraction,
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
        step = self.state.progress.evaluated = self.state.progress.step
        if self.held_out is None:
            return
        self._evaluated = self._score_held_out(self.held_out)
        samples, sampler = Samples(), self.held_out.sampler
        if sampler is not None:
            samples = sampler.sample(self.scorer, step, self.runtime)
        metrics = {**self._evaluated.metrics, **samples.metrics}
        self.observers.metrics_written({STEP: step, **metrics})
        self.runtime.say(f"Held out, step {step}: {short_figures(metrics)}")
        if sampler is not None:
            self.observers.samples_written(samples.samples)
            if self.runtime.is_main:
                self.runtime.console.print(samples_table(samples.samples))

    def held_out_groups(self) -> Groups | None:
        """Held-out figures of the weights as they are, with intervals, on rank 0; all ranks call this.

        None without held-out data.
        """
        if self.held_out is None:
            return None
        # A run that was stopped after its last evaluation has none in this process.
        evaluated = self._evaluated or self._score_held_out(self.held_out)
        return evaluated.groups() if self.runtime.is_main else None

    def _score_held_out(self, held_out: HeldOut) -> Evaluated:
        means = self.state.running_means(self.runtime.device)
        return evaluate(self.scorer, held_out, self.loss, means, self.runtime, pad=self.pad)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
