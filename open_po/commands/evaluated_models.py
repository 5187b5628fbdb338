"""Which models `python -m open_po evaluate` is about, and how they are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from open_po.config import ModelConfig, load_config
from open_po.errors import ConfigError, UserError
from open_po.hub.publication import MODEL_FOLDER
from open_po.model.load import load_scorer
from open_po.model.numerics import Numerics, frozen_numerics
from open_po.model.scorer import Scorer
from open_po.model_files import FileHashes, ModelSource, adapter_base, model_identity
from open_po.output.run_folder import RunFolder
from open_po.training.checkpoint_folders import checkpoint_folders, step_of
from open_po.training.checkpoint_model import checkpoint_scorer, checkpoint_weights, refuse_divided


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is evaluated."""

    path: Path  # as it was named
    model: ModelConfig
    checkpoint: Path | None = None  # whose weights go into the model
    run: Path | None = None  # that made it
    step: int | None = None  # of that run

    @property
    def source(self) -> ModelSource:
        """Where its files come from, but for a checkpoint's weights."""
        return ModelSource(
            name=self.model.model_name_or_path,
            revision=self.model.model_revision,
            trust_remote_code=self.model.trust_remote_code,
        )

    @property
    def is_whole(self) -> bool:
        """Whether a folder holds it as it is, whole weights and not in 4 bits."""
        source = self.source
        adapters = adapter_base(source.folder(), source.trust_remote_code)
        return self.checkpoint is None and not self.model.use_qlora and adapters is None

    def numerics(self, device: torch.device) -> Numerics:
        """How it computes."""
        found = frozen_numerics(self.model, device)
        continues = self.checkpoint is not None and self.model.use_lora and self.model.lora_start == "continue"
        return dataclasses.replace(found, adapters_apart=found.adapters_apart or continues)

    def load(self, device: torch.device) -> Scorer:
        """The model, ready to answer. Raises UserError."""
        numerics = self.numerics(device)
        if self.checkpoint is None:
            return load_scorer(self.source, numerics, device)
        return checkpoint_scorer(self.checkpoint, self.source, self.model, numerics, device)

    def identity(self, memo: Path) -> dict[str, str]:
        """The hashes of all its files. Raises UserError."""
        found = model_identity(self.source, memo)
        if self.checkpoint is not None:
            hashes = FileHashes(memo)
            lora = {name: value for name, value in vars(self.model).items() if "lora" in name}
            found |= {"checkpoint": hashes.of(checkpoint_weights(self.checkpoint)), "lora": str(lora)}
            hashes.save()
        return found


def find_subjects(names: Sequence[str], model: ModelConfig, *, checkpoints: bool) -> dict[str, Subject]:
    """The models, each by a name that no other has, a run's checkpoints before what came of it.

    `model` says how they compute. Raises UserError for what is no model.
    """
    found: list[Subject] = []
    runs = 0
    for name in names:
        path = Path(name).expanduser()
        steps = checkpoint_folders(path / "checkpoints") if checkpoints else []
        runs += bool(steps)
        found += [_checkpoint(folder, model) for folder in steps]
        if step_of(path) is not None and path.is_dir():
            found.append(_checkpoint(path, model))
        elif not steps or (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            found.append(_folder(name, path, model))
    if checkpoints and not runs:
        raise UserError(f"--checkpoints: {', '.join(names)} holds none; a run writes them with checkpointing_steps")
    for subject in found:
        subject.source.refuse_missing("--model")
    return dict(zip(_names(found), found, strict=True))


def _folder(name: str, path: Path, model: ModelConfig) -> Subject:
    """A Hub model or a folder, of a run or of something else."""
    own = str(path) if path.is_dir() else name
    subject = Subject(path=path, model=dataclasses.replace(model, model_name_or_path=own))
    summary = RunFolder(path).read_summary() if path.is_dir() else None
    if summary is None or summary.result is None:
        return subject
    return dataclasses.replace(subject, run=path.resolve(), step=summary.result.train.steps)


def _checkpoint(path: Path, model: ModelConfig) -> Subject:
    """A checkpoint: the model that was written with it, or its weights in the model that its run started from."""
    run, step = path.resolve().parent.parent, step_of(path)
    if (path / MODEL_FOLDER).is_dir():
        own = dataclasses.replace(model, model_name_or_path=str(path / MODEL_FOLDER))
        return Subject(path=path, model=own, run=run, step=step)
    refuse_divided(path)
    try:
        theirs = load_config([str(run / "config.yaml")]).model
    except ConfigError as error:
        raise UserError(f"{path}: its run cannot be read ({error.problems[0]})") from error
    ours = {name: getattr(model, name) for name in ("dtype", "use_liger_kernel", "torch_compile")}
    return Subject(path=path, model=dataclasses.replace(theirs, **ours), checkpoint=path, run=run, step=step)


def _names(subjects: Sequence[Subject]) -> list[str]:
    """The last part of each path, a checkpoint's behind its run's, with as much before it as tells them apart."""
    parts: list[list[str]] = []
    for subject in subjects:
        own = [*(subject.path.absolute() if subject.path.is_dir() else subject.path).parts]
        if step_of(subject.path) is not None:  # RUN/checkpoints/step_N
            own = [*own[:-3], "-".join([own[-3], own[-1]])]
        parts.append(own)
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part for part in own[-count:] if part != "/") for own in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f"--model: names {twice} twice; leave one of them out")
