"""The stages of a pipeline: what each runs, from which words, in which folder, and what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from open_po.commands.grid import flags
from open_po.commands.pipeline_evaluation import Flags, evaluation_flags
from open_po.commands.pipeline_overlays import Overlays
from open_po.config import HELD_OUT_FIELDS, RunConfig, load_config
from open_po.errors import ConfigError
from open_po.output.run_folder import RunFolder, changed_fields

SFT, EVALUATION = "sft", "evaluation"  # stages, and folders of the pipeline's
_OF_SFT, _OF_EVALUATION = "sft.", "evaluate."  # begin the flags that go to those stages
# Files of a model's folder that its tokenizer is read from; a run's folder has others, which may change.
_OF_TOKENIZERS = (
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "additional_chat_templates/*"),
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a stage is made from, as the user says it: of each the names, of which some may lie on this machine."""

    models: Sequence[str]
    tokenizers: Sequence[str]
    data: Sequence[str]
    files: Sequence[str] = ()
    functions: Sequence[str] = ()  # formats or metrics, some of which are MODULE:FUNCTION

    def hashes(self, memo: Path) -> dict[str, str]:
        """A hash of each that lies on this machine, by name. `memo`: where hashes of models are remembered.

        Raises UserError, OSError.
        """
        from open_po.data.content import file_digest, folder_digest  # which import large libraries
        from open_po.model_files import FileHashes, ModelSource, model_identity

        found = {}
        for name in self.models:
            if Path(name).is_dir():
                identity = json.dumps(model_identity(ModelSource(name=name), memo), sort_keys=True)
                found[name] = hashlib.sha256(identity.encode()).hexdigest()
        for name in self.tokenizers:
            files = {path for pattern in _OF_TOKENIZERS for path in Path(name).glob(pattern) if path.is_file()}
            if files:
                identity = json.dumps({path.name: file_digest(path) for path in sorted(files)})
                found[f"the tokenizer in {name}"] = hashlib.sha256(identity.encode()).hexdigest()
        hashes = FileHashes(memo)
        for name in (*self.data, *self.files):
            path = Path(name).expanduser()
            if path.is_file():
                found[name] = hashes.of(path)
            elif name in self.data and path.is_dir():
                found[name] = folder_digest(path)
        hashes.save()
        for name in self.functions:
            if (module := _module(name)) is not None:
                found[f"the module of {name}"] = file_digest(module)
        return found


def _module(function: str) -> Path | None:
    """The file of a function of the user's own, MODULE:FUNCTION; None if it is none, or cannot be found."""
    name, colon, _ = function.partition(":")
    with suppress(ImportError, ValueError, AttributeError):
        spec = find_spec(name) if colon else None
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            return Path(spec.origin)
    return None


def _given(*names: str | None) -> list[str]:
    return [name for name in names if name is not None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A stage that trains: a run of its own."""

    name: str
    words: list[str]  # of dpo_tune_cache.py
    config: RunConfig
    folder: RunFolder

    def changed(self) -> str:
        """The settings that differ from those of the run that is there, with both values; empty if none do."""
        theirs = self.folder.earlier_config()
        return "" if theirs is None else changed_fields(theirs, self.config, more=HELD_OUT_FIELDS)

    def inputs(self) -> dict[str, str]:
        """A hash of every local file or model that it is made from, by name. Raises UserError, OSError."""
        config = self.config
        memo = Path(config.reference.reference_cache_dir).expanduser()
        model, parts = config.model, [*config.data.training_mixture, *config.data.held_out_mixture]
        inputs = Inputs(
            models=_given(model.model_name_or_path, config.reference.reference_model_name_or_path),
            tokenizers=_given(model.tokenizer_name or model.model_name_or_path),
            data=[part.dataset for part in parts],
            files=_given(model.chat_template_name),
            functions=_given(*(part.format or config.data.format for part in parts)),
        )
        return inputs.hashes(memo)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """All stages, and the folder that they lie in."""

    name: str
    folder: Path
    prepare: Path | None
    sft: Training | None
    losses: list[Training]
    evaluate: Flags | None  # flags of `evaluate` by name

    @property
    def trainings(self) -> list[Training]:
        """The stages that train, in order."""
        return [*([self.sft] if self.sft is not None else []), *self.losses]

    @property
    def models(self) -> list[str]:
        """The models to compare, the one that preferences start from first."""
        return [self.losses[0].config.model.model_name_or_path, *(str(stage.folder.path) for stage in self.losses)]

    @property
    def evaluation_folder(self) -> Path:
        """What evaluation leaves."""
        return self.folder / EVALUATION

    def evaluation_words(self) -> list[str]:
        """The words of `python -m open_po evaluate`."""
        given = self.evaluate or {}
        words = ["--model", *self.models]
        for name, values in given.items():
            words += [f"--{name}", *values]
        return [*words, "--out", str(self.evaluation_folder)]

    def evaluation_inputs(self) -> dict[str, str]:
        """A hash of all that evaluation reads on this machine, by name. Raises UserError, OSError."""
        given = dict(self.evaluate or {})
        data, own = given.pop("data", []), [given.pop(name, []) for name in ("tokenizer_name", "format", "metrics")]
        inputs = Inputs(
            models=self.models,
            tokenizers=own[0] or self.models,
            data=data,
            files=[value for values in given.values() for value in values],
            functions=own[1] + own[2],
        )
        return inputs.hashes(Path(self.losses[0].config.reference.reference_cache_dir).expanduser())

    def log(self, stage: str, node: int = 0) -> Path:
        """Where a stage's process writes what it says."""
        return self.folder / "logs" / (f"{stage}.log" if node == 0 else f"{stage}.node{node}.log")


def read_pipeline(overlays: Overlays, words: Sequence[str], *, skip_sft: bool) -> Pipeline:
    """The pipeline of some overlays and `[--field value ...]`. Raises ConfigError with every problem of any stage."""
    own, shared = _split(words)
    name = (shared.pop("exp_name", None) or [overlays.name])[-1]
    folder = Path((shared.pop("output_dir", None) or [f"output/{name}"])[-1])
    has_sft = overlays.sft_file.is_file() and not skip_sft
    problems = dict.fromkeys(_misplaced(own[_OF_SFT], own[_OF_EVALUATION], shared, has_sft))
    shared.pop("loss_type", None)  # which would make other mistakes of the losses' own
    sft = None
    if has_sft:
        sft = _training(SFT, [overlays.model, overlays.sft_file], own[_OF_SFT], (name, folder), problems)
        shared = {**shared, "model_name_or_path": [str(folder / SFT)], "model_revision": ["null"]}
    found = []
    for loss in overlays.losses:
        found.append(_training(loss, overlays.preference(loss), shared, (name, folder), problems))
    losses = [stage for stage in found if stage is not None]
    evaluate = overlays.evaluation()
    if own[_OF_EVALUATION]:
        evaluate = (evaluate or {}) | own[_OF_EVALUATION]
    if evaluate is not None and losses:
        evaluate = evaluation_flags(losses[0].config, evaluate, problems)
    problems |= dict.fromkeys(_clashes([*([sft] if sft is not None else []), *losses]))
    if problems:
        raise ConfigError(list(problems))
    return Pipeline(
        name=name, folder=folder, prepare=overlays.prepare, sft=sft, losses=_sharing(losses), evaluate=evaluate
    )


def _split(words: Sequence[str]) -> tuple[dict[str, Flags], Flags]:
    """The flags of the SFT stage and of evaluation, by how they begin, and those of the preference stages."""
    own: dict[str, Flags] = {_OF_SFT: {}, _OF_EVALUATION: {}}
    shared: Flags = {}
    values: list[str] = []
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        name, equals, inline = word[2:].partition("=")
        values = [inline] if equals else []
        stage = next((start for start in own if name.startswith(start)), None)
        target = shared if stage is None else own[stage]
        target[name if stage is None else name.removeprefix(stage)] = values
    return own, shared


def _misplaced(sft: Flags, evaluation: Flags, shared: Flags, has_sft: bool) -> Iterator[str]:
    """Flags that the pipeline sets itself."""
    for name in sorted({"model", "out"} & set(evaluation)):
        yield f"evaluate.{name}: is set by the pipeline itself"
    if sft and not has_sft:
        yield f"sft.{next(iter(sft))}: there is no SFT stage to set it for; leave it out"
    for name in sorted({"exp_name", "output_dir", "resume_from_checkpoint"} & set(sft)):
        yield f"sft.{name}: is set by the pipeline itself"
    if "resume_from_checkpoint" in shared:
        yield "resume_from_checkpoint: is set by the pipeline itself, every stage goes on"
    if "loss_type" in shared:
        yield "loss_type: is what LOSS names; name its file there"
    if "model_name_or_path" in shared and has_sft:
        yield (
            "model_name_or_path: is the SFT stage's model; give --sft.model_name_or_path, or --skip-sft to start from "
            "another"
        )


def _training(
    name: str,
    files: Sequence[Path],
    given: Flags,
    pipeline: tuple[str, Path],
    problems: dict[str, None],
) -> Training | None:
    folder = pipeline[1] / name
    words = [str(path) for path in files]
    for field, values in given.items():
        words += [f"--{field}", *values]
    words += flags({"exp_name": f"{pipeline[0]}_{name}", "output_dir": str(folder), "resume_from_checkpoint": "auto"})
    try:
        return Training(name=name, words=words, config=load_config(words), folder=RunFolder(folder))
    except ConfigError as error:
        problems |= dict.fromkeys(f"{name}: {problem}" for problem in error.problems)
        return None


def _clashes(trainings: Sequence[Training]) -> Iterator[str]:
    """What several stages cannot have at once."""
    outputs = [stage.config.output for stage in trainings if stage.config.output.push_to_hub]
    if len(outputs) > 1 and any(output.hf_repo_revision is not None for output in outputs):
        yield "hf_repo_revision: stages would overwrite one another's branch; leave it out, each has its own then"


def _sharing(losses: list[Training]) -> list[Training]:
    """The stages with one reference pass for all: if one needs log-probs by token, they are kept so at once."""
    if not any(stage.config.loss.mix().ld_alpha != 1.0 for stage in losses):
        return losses
    words = ["--reference_cache_level", "token"]
    return [
        Training(
            name=stage.name,
            words=[*stage.words, *words],
            config=load_config([*stage.words, *words]),
            folder=stage.folder,
        )
        for stage in losses
    ]
