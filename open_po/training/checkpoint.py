"""Training state on disk: written whole or not at all, and restored exactly."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from open_po.config import RunConfig
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.evaluation.meter import PreferenceMeter
from open_po.losses import LossMix, PairLogps
from open_po.model.scorer import Scorer
from open_po.output.files import disk_faults
from open_po.output.run_folder import changed_fields
from open_po.packing import PackingStats
from open_po.training.checkpoint_folders import prune, remove, sync

_STATE = "trainer_state.json"


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
    pairs: int = 0
    tokens: int = 0  # prompt and response tokens, prompts counted with each response
    response_tokens: int = 0  # scored tokens
    seconds: float = 0.0  # spent in training steps
    packing: PackingStats = field(default_factory=PackingStats)  # of this rank's packs
    wandb_run_id: str | None = None
    running_means: list[RunningMean] = field(default_factory=list)  # one for each part of the loss


@dataclass(kw_only=True)
class Window:
    """What happened since metrics were last written."""

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    meter: PreferenceMeter = field(default_factory=PreferenceMeter)  # this rank's sums; the rest counts all ranks


@dataclass(kw_only=True)
class TrainingState:
    """Everything a resumed run needs besides its configuration, its data and the weights it started from."""

    scorer: Scorer
    started_from: dict[str, str]  # `model_identity` of the weights before the first step
    optimizer: Optimizer
    schedule: LRScheduler
    progress: TrainingProgress
    window: Window = field(default_factory=Window)

    def save(self, folder: Path, config: RunConfig, runtime: Runtime) -> Path:
        """Write `folder/step_N` and remove all but the newest `keep_last_n_checkpoints`.

        Raises UserError if the disk refuses; older checkpoints are then still there.
        """
        ranks = runtime.gather({"random": vars(RandomState.take()), "window": self._window()})
        target = folder / f"step_{self.progress.step:06d}"
        runtime.on_main(self._write, target, config, ranks)
        runtime.on_main(prune, folder, config.output.keep_last_n_checkpoints)
        return target

    def _window(self) -> dict[str, Any]:
        return {**vars(self.window), "meter": {name: float(value) for name, value in self.window.meter.sums.items()}}

    def _write(self, target: Path, config: RunConfig, ranks: list[Any]) -> None:
        temporary = target.with_name(f".{target.name}.partial")
        training = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        state = {
            "progress": dataclasses.asdict(self.progress),
            "config": config.result_fields(),
            "started_from": self.started_from,
        }
        try:
            with disk_faults(f"{target}: the checkpoint", "older ones are kept"):
                temporary.mkdir(parents=True)
                save_file(_trained(self.scorer), temporary / "weights.safetensors")
                with open(temporary / "training.pt", "wb") as file:
                    torch.save({**training, "ranks": ranks}, file)
                (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n")
                for path in [*temporary.iterdir(), temporary]:
                    sync(path)
                remove(target)
                temporary.rename(target)
                sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def update_running_means(self, loss: LossMix, policy: PairLogps, reference: PairLogps | None) -> None:
        """Take a step's rewards into the running mean of each part of the loss that keeps one."""
        for part, mean in zip(loss.parts, self.progress.running_means, strict=True):
            if part.keeps_running_mean:
                losses = part(policy, reference)
                mean.add(torch.cat([losses.chosen_rewards, losses.rejected_rewards]))

    def restore(self, checkpoint: Path, config: RunConfig, runtime: Runtime) -> None:
        """Take over the state in `checkpoint`. Raises UserError if it is another configuration's or is damaged."""
        try:
            state = json.loads((checkpoint / _STATE).read_text())
            progress, theirs = TrainingProgress(**state["progress"]), dict(state["config"])
            progress.packing = PackingStats(**state["progress"]["packing"])
            progress.running_means = [RunningMean(**mean) for mean in state["progress"]["running_means"]]
            weights = load_file(checkpoint / "weights.safetensors")
            training = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # each reader has error types of its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"resume_from_checkpoint {checkpoint}: is no whole checkpoint ({reason})") from error
        if changed := changed_fields(theirs, config):
            raise UserError(
                f"resume_from_checkpoint {checkpoint}: was written under another configuration ({changed}); "
                "resume with the one it was started with"
            )
        if state.get("started_from") != self.started_from:
            raise UserError(
                f"resume_from_checkpoint {checkpoint}: the run started from other weights than "
                f"{config.model.model_name_or_path} holds now; put them back, or start a new run"
            )
        if len(training["ranks"]) != runtime.world_size:
            raise UserError(
                f"resume_from_checkpoint {checkpoint}: was written by {len(training['ranks'])} processes, "
                f"this run has {runtime.world_size}"
            )
        parameters = dict(self.scorer.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(training["optimizer"])
        self.schedule.load_state_dict(training["schedule"])
        vars(self.progress).update(vars(progress))
        mine = training["ranks"][runtime.rank]
        sums = mine["window"].pop("meter")
        self.window = Window(**mine["window"])
        self.window.meter.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        RandomState(**mine["random"]).put_back()


def _trained(scorer: Scorer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().contiguous()
        for name, parameter in scorer.named_parameters()
        if parameter.requires_grad
    }
