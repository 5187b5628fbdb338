"""Training state on disk: written whole or not at all, and restored exactly."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from open_po.config import RunConfig
from open_po.distributed.engine import Engine, Saving
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.evaluation.meter import PreferenceMeter
from open_po.losses import LossMix, PairLogps
from open_po.output.files import disk_faults, open_to_others
from open_po.output.run_folder import changed_fields
from open_po.packing import PackingStats
from open_po.training.checkpoint_folders import remove, sync_all

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
_STATE = "trainer_state.json"
_TRAINING = "training.pt"


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The generators that dropout draws from."""

    cpu: Tensor
    gpu: Tensor | None

    @staticmethod
    def take() -> RandomState:
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return RandomState(cpu=torch.get_rng_state(), gpu=gpu)

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.gpu)


@dataclass(kw_only=True)
class RunningMean:
    """Mean of all numbers so far, e.g. BCO's shift."""

    count: int = 0
    mean: float = 0.0

    def add(self, values: Tensor) -> None:
        self.count += values.numel()
        self.mean += float((values.double() - self.mean).sum()) / self.count


@dataclass(kw_only=True)
class TrainingProgress:
    """How far training has come; the data order follows from the step alone."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # the step after which held-out pairs were last scored
    pairs: int = 0
    tokens: int = 0  # prompt and response tokens, prompts counted with each response
    response_tokens: int = 0  # scored tokens
    seconds: float = 0.0  # spent in training steps
    packing: PackingStats = field(default_factory=PackingStats)  # of this rank's packs
    max_tokens: int = 0  # of a pack, as settled at the start, or since memory ran out; 0: not yet
    max_tokens_asked: int | str | None = None  # what the configuration said when it was settled
    tracker_ids: dict[str, str] = field(default_factory=dict)  # of this run in its trackers, by the tracker's name
    running_means: list[RunningMean] = field(default_factory=list)  # one for each part of the loss


@dataclass(kw_only=True)
class Window:
    """What happened since metrics were last written."""

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    meter: PreferenceMeter = field(default_factory=PreferenceMeter)  # this rank's sums; the rest counts all ranks


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a checkpoint says of itself."""

    folder: Path
    progress: TrainingProgress
    config: dict[str, Any]
    started_from: dict[str, str]
    kind: str  # the engine that wrote it
    ranks: int
    global_batch: int  # pairs of a step, whatever the number of ranks
    data: list[dict[str, str | int]] | None = None  # `PairDataset.identity`; None in what earlier versions wrote

    @staticmethod
    def read(folder: Path) -> SavedState:
        """The small part of a checkpoint. Raises UserError if it is damaged."""
        try:
            state = json.loads((folder / _STATE).read_text())
            content = state.pop("progress")
            if old := content.pop("wandb_run_id", None):  # as versions before trackers other than W&B wrote it
                content["tracker_ids"] = {"wandb": old}
            progress = TrainingProgress(**content)
            progress.packing = PackingStats(**_object(progress.packing))
            progress.running_means = [RunningMean(**_object(mean)) for mean in progress.running_means]
            return SavedState(folder=folder, progress=progress, **state)
        except Exception as error:
            raise _damaged(folder, error) from error

    def refuse_other_run(self, config: RunConfig, data: list[dict[str, str | int]]) -> None:
        """Raises UserError if a run of this configuration on these data is not the one that wrote it.

        `data` are `PairDataset.identity`.
        """
        if changed := changed_fields(self.config, config):
            raise UserError(
                f"{self._said}was written under another configuration ({changed}); resume with the one it was started "
                "with"
            )
        if self.data is not None and (changed := _changed_data(self.data, data)):
            raise UserError(
                f"{self._said}the training data have changed ({changed}); put them back, or start a new run"
            )

    def refuse_unless_continued_by(self, config: RunConfig, started_from: dict[str, str], runtime: Runtime) -> None:
        """Raises UserError if the same run would not go on from it, with these weights and this engine."""
        if self.started_from != started_from:
            raise UserError(
                f"{self._said}the run started from other weights than {config.model.model_name_or_path} holds now; put "
                "them back, or start a new run"
            )
        kind = runtime.parallelism.kind
        if _format(self.kind) != _format(kind):
            raise UserError(f"{self._said}was written under parallel {self.kind}, this run is {kind}; use {self.kind}")

    @property
    def _said(self) -> str:
        return f"resume_from_checkpoint {self.folder}: "


def _changed_data(theirs: list[dict[str, str | int]], ours: list[dict[str, str | int]]) -> str:
    """Which parts of the data give other pairs now than they gave; empty if none does."""
    nothing: dict[str, str | int] = {"name": "", "pairs": 0, "digest": ""}
    changed = []
    for old, new in zip_longest(theirs, ours, fillvalue=nothing):
        if old["digest"] != new["digest"]:
            counts = f"{old['pairs']:,} before, {new['pairs']:,} now"
            changed.append(f"{new['name'] or old['name']}: other pairs, {counts}")
    return "; ".join(changed)


def _object(value: Any) -> dict[str, Any]:
    """A part of a saved state that must be a JSON object. Raises TypeError."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def _format(kind: str) -> str:
    """Engines of one format read one another's checkpoints."""
    return "whole" if kind in ("single", "ddp") else kind


def _damaged(folder: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"resume_from_checkpoint {folder}: is no whole checkpoint ({reason})")


class UnfinishedCheckpoint:
    """A checkpoint that is being written, under a name that nobody takes for a whole one."""

    def __init__(self, target: Path, temporary: Path, runtime: Runtime) -> None:
        self.target, self.temporary, self._runtime = target, temporary, runtime
        self.saving = Saving()

    def finish(self) -> Path:
        """Wait until all of it is on disk and give it its name; all ranks call this.

        Raises UserError if the disk refuses.
        """
        with self.removed_on_error():
            self.refusing(self.saving.wait)
            self._runtime.on_main(self.refusing, self._complete)
        return self.target

    def _complete(self) -> None:
        open_to_others(self.temporary)
        sync_all(self.temporary)
        remove(self.target)
        self.temporary.rename(self.target)
        sync_all(self.target.parent, recursive=False)

    def refusing(self, write: Callable[Arguments, T], *args: Arguments.args, **named: Arguments.kwargs) -> T:
        """`write`, and a full disk told as a user's error."""
        with disk_faults(f"{self.target}: the checkpoint", "older ones are kept"):
            return write(*args, **named)

    @contextmanager
    def removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._runtime.is_main:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise


def _begin(temporary: Path, state: dict[str, Any], training: dict[str, Any]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / _TRAINING, "wb") as file:
        torch.save(training, file)
    (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n")


@dataclass(kw_only=True)
class TrainingState:
    """Everything a resumed run needs besides its configuration, its data and the weights it started from."""

    engine: Engine
    started_from: dict[str, str]  # `model_identity` of the weights before the first step
    data: list[dict[str, str | int]]  # `PairDataset.identity` of the training data
    global_batch: int  # pairs
    schedule: LRScheduler
    progress: TrainingProgress
    window: Window = field(default_factory=Window)

    def begin_save(
        self, folder: Path, config: RunConfig, runtime: Runtime, write_more: Callable[[Path], object] | None
    ) -> UnfinishedCheckpoint:
        """Begin to write `folder/step_N`, of the state that there is now; all ranks call this.

        `write_more` writes what goes with it into the folder that it is told; all ranks call that too. Without
        `async_checkpointing` only the checkpoint's name is then left to do. Raises UserError if the disk refuses; older
        checkpoints are then still there.
        """
        target = folder / f"step_{self.progress.step:06d}"
        temporary = target.with_name(f".{target.name}.partial")
        ranks = runtime.gather({"random": vars(RandomState.take()), "window": self._window()})

        state = {
            "progress": dataclasses.asdict(self.progress),
            "config": config.result_fields(),
            "started_from": self.started_from,
            "data": self.data,
            "kind": runtime.parallelism.kind,
            "ranks": runtime.world_size,
            "global_batch": self.global_batch,
        }
        training = {"schedule": copy.deepcopy(self.schedule.state_dict()), "ranks": ranks}
        unfinished = UnfinishedCheckpoint(target, temporary, runtime)
        begin = self.engine.begin_save if config.output.async_checkpointing else self.engine.save
        with unfinished.removed_on_error():
            runtime.on_main(unfinished.refusing, _begin, temporary, state, training)
            if self.engine.files_together:  # a rank that fails cannot be waited for: it ends, and so do the others
                unfinished.saving = unfinished.refusing(begin, temporary) or Saving()
            else:
                unfinished.saving = runtime.on_every_rank(unfinished.refusing, begin, temporary) or Saving()
            if write_more is not None:
                runtime.on_every_rank(unfinished.refusing, write_more, temporary)
        return unfinished

    def _window(self) -> dict[str, Any]:
        return {**vars(self.window), "meter": {name: float(value) for name, value in self.window.meter.sums.items()}}

    def update_running_means(self, loss: LossMix, policy: PairLogps, reference: PairLogps | None) -> None:
        """Take a step's rewards into the running mean of each part of the loss that keeps one."""
        for part, mean in zip(loss.parts, self.progress.running_means, strict=True):
            if part.keeps_running_mean:
                losses = part(policy, reference)
                mean.add(torch.cat([losses.chosen_rewards, losses.rejected_rewards]))

    def running_means(self, device: torch.device) -> list[Tensor | None]:
        """The running mean of each part of the loss that keeps one."""
        means = self.progress.running_means
        return [torch.tensor(mean.mean, device=device) if mean.count else None for mean in means]

    def restore(self, saved: SavedState, runtime: Runtime) -> None:
        """Take over the state of a checkpoint; all ranks call this. Raises UserError if it is damaged."""
        if saved.ranks != runtime.world_size and not self.engine.portable:
            raise UserError(
                f"resume_from_checkpoint {saved.folder}: DeepSpeed's checkpoints need the number of ranks that wrote "
                f"them, {saved.ranks}, this run has {runtime.world_size}; start {saved.ranks}"
            )
        training = runtime.on_every_rank(_read_training, saved.folder)
        if self.engine.files_together:
            _load(self.engine, saved.folder)
        else:
            runtime.on_every_rank(_load, self.engine, saved.folder)
        self.schedule.load_state_dict(training["schedule"])
        vars(self.progress).update(vars(saved.progress))
        ranks = training["ranks"]
        mine = ranks[runtime.rank % len(ranks)]
        self.window = Window(**mine["window"] | {"meter": PreferenceMeter()})
        for number, rank in enumerate(ranks):  # of a rank that is no more, the sums go to one that is
            if number % runtime.world_size == runtime.rank:
                for name, value in rank["window"]["meter"].items():
                    self.window.meter.sums[name] = self.window.meter.sums.get(name, 0) + torch.tensor(
                        value, dtype=torch.float64
                    )
        RandomState(**mine["random"]).put_back()


def _read_training(folder: Path) -> Any:
    try:
        return torch.load(folder / _TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has error types of its own
        raise _damaged(folder, error) from error


def _load(engine: Engine, folder: Path) -> None:
    try:
        engine.load(folder)
    except UserError:
        raise
    except Exception as error:
        raise _damaged(folder, error) from error
