"""The run's configuration: YAML files merged left to right, then command-line flags, checked as a whole.

A field's name is unique over all sections, so YAML and flags are flat. A field that is None was left to its default;
`resolve` replaces it where the default depends on other fields, and what it writes parses again to the same run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from yaml.constructor import ConstructorError

from open_po.errors import ConfigError
from open_po.losses import Loss, loss_spec


def option(default: Any, text: str, *, shapes_result: bool = True) -> Any:
    """A field with its help text. `shapes_result=False`: changing it between a run and its resumption is allowed."""
    metadata = {"help": text, "shapes_result": shapes_result}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy, its tokenizer and how it computes."""

    model_name_or_path: str = option("", "policy: a local folder or a Hub name")
    model_revision: str | None = option(None, "Hub branch, tag or commit of the policy")
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the policy's")
    chat_template_name: str | None = option(
        None, "chat template to use and save: 'tulu' or a .jinja file; default: the tokenizer's own"
    )
    trust_remote_code: bool = option(False, "run model code that comes with a Hub repository")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute precision; auto: bfloat16 on CUDA, else float32. Trained weights are always float32"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    use_liger_kernel: bool | None = option(
        None, "Liger's Triton kernels for head, RMSNorm, RoPE and SwiGLU; default: on CUDA"
    )
    use_lora: bool = option(False, "train LoRA adapters instead of all weights")
    lora_rank: int | None = option(None, "LoRA rank; default 64")
    lora_alpha: float | None = option(None, "LoRA alpha; default 16")
    lora_dropout: float | None = option(None, "LoRA dropout; default 0")
    lora_target_modules: list[str] | None = option(
        None, "module names that get an adapter; default all-linear (all but the head)"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs are trained and evaluated on, and how they become tokens."""

    mixer_list: list[str] | None = option(
        None, "training data: NAME AMOUNT [NAME AMOUNT ...]; an amount is a fraction (0.5) or a count of rows (1000)"
    )
    dataset_mixer: dict[str, str] | None = option(None, "the same as a YAML mapping NAME: AMOUNT")
    mixer_list_splits: list[str] = option(["train"], "one split for all datasets, or one for each: train, train[:90%]")
    eval_mixer_list: list[str] | None = option(None, "held-out data, written as mixer_list", shapes_result=False)
    eval_mixer_list_splits: list[str] = option(["train"], "splits of the held-out data", shapes_result=False)
    max_train_samples: int | None = option(None, "use at most so many training rows")
    max_seq_length: int = option(2048, "longest prompt + response, in tokens; longer responses lose their newest")
    max_prompt_length: int | None = option(
        None,
        "longest prompt, in tokens; longer ones lose their oldest. "
        "Default: max_seq_length // 2, for pairs that do not fit max_seq_length",
    )
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise; default: the CPUs at hand", shapes_result=False
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference model and the cache of its log-probs."""

    reference_model_name_or_path: str | None = option(None, "reference model; default: the policy's initial weights")
    reference_model_revision: str | None = option(None, "Hub branch, tag or commit of the reference model")
    reference_cache_dir: str = option(
        "~/.cache/open_po/reference", "where reference log-probs are kept", shapes_result=False
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The preference loss. A parameter left out takes the loss's default; one it does not take is an error."""

    loss_type: str = option("dpo", "dpo, dpo_norm, dpo_gamma, slic_dpo or sft")
    beta: float | None = option(None, "strength of the pull to the reference; default 0.1, dpo_norm 5")
    gamma: float | None = option(None, "dpo_gamma: margin, in reward units; default 0.5")
    delta: float | None = option(None, "slic_dpo: hinge margin, in reward units; default 1")
    label_smoothing: float | None = option(None, "share of labels taken to be wrong; default 0")

    def given(self) -> dict[str, float]:
        """The loss parameters that were set."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "loss_type" and value is not None}

    def loss(self) -> Loss:
        """The loss with its parameters filled in. Raises ValueError as `loss_spec` and `LossSpec.resolve` do."""
        spec = loss_spec(self.loss_type)
        return Loss(spec, spec.resolve(self.given()))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer steps. The global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks pairs."""

    per_device_train_batch_size: int = option(4, "pairs, see gradient_accumulation_steps")
    gradient_accumulation_steps: int = option(
        8, "the global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks, in pairs"
    )
    max_tokens_per_batch: int | None = option(
        None,
        "tokens of one forward pass, padding included; default 2 x per_device_train_batch_size x max_seq_length. "
        "Changes memory and speed, never a step's value",
    )
    optimizer: Literal["adamw", "rmsprop"] = option("adamw", "adamw or rmsprop")
    learning_rate: float = option(5e-7, "peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "linear, cosine, constant or constant_with_warmup"
    )
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.0, "decoupled weight decay of adamw; not on norms and biases")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    num_epochs: int = option(1, "passes over the training data")
    max_train_steps: int | None = option(None, "stop after so many optimizer steps")
    seed: int = option(42, "seed of the data order, dropout and new adapters")
    eval_steps: int | None = option(
        None, "evaluate every so many steps, besides before the first and after the last", shapes_result=False
    )
    logging_steps: int = option(1, "write metrics every so many steps", shapes_result=False)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    exp_name: str = option("dpo_tune_cache", "name of the run", shapes_result=False)
    output_dir: str | None = option(
        None, "folder of the model, metrics and checkpoints; default output/EXP_NAME", shapes_result=False
    )
    checkpointing_steps: int | None = option(None, "write a checkpoint every so many steps", shapes_result=False)
    keep_last_n_checkpoints: int = option(3, "older checkpoints are removed", shapes_result=False)
    resume_from_checkpoint: str | None = option(
        None, "auto: continue from output_dir's last checkpoint, if any; or a checkpoint's folder", shapes_result=False
    )
    save_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "precision of the saved model; auto: that of dtype. Checkpoints are always exact", shapes_result=False
    )
    with_tracking: bool = option(False, "log to Weights & Biases", shapes_result=False)
    wandb_project_name: str | None = option(None, "W&B project; default open_po", shapes_result=False)
    wandb_entity: str | None = option(None, "W&B team or user", shapes_result=False)
    push_to_hub: bool = option(False, "upload the final model to the Hugging Face Hub", shapes_result=False)
    hf_repo_id: str | None = option(None, "Hub repository, USER/NAME; default USER/EXP_NAME", shapes_result=False)
    hf_repo_revision: str | None = option(None, "Hub branch to upload to; default main", shapes_result=False)
    hf_private: bool | None = option(None, "make a new Hub repository private; default true", shapes_result=False)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reference": ReferenceConfig,
    "loss": LossConfig,
    "train": TrainConfig,
    "output": OutputConfig,
}
FIELDS: dict[str, tuple[str, dataclasses.Field[Any], Any]] = {
    f.name: (section, f, typing.get_type_hints(cls)[f.name])
    for section, cls in SECTIONS.items()
    for f in dataclasses.fields(cls)
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A checked and resolved configuration."""

    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig
    loss: LossConfig
    train: TrainConfig
    output: OutputConfig

    def flat(self) -> dict[str, Any]:
        """Every field's value by name."""
        return {name: getattr(getattr(self, section), name) for name, (section, _, _) in FIELDS.items()}

    def to_yaml(self) -> str:
        """The fields that have a value, as YAML that parses to this configuration."""
        return yaml.safe_dump({k: v for k, v in self.flat().items() if v is not None}, sort_keys=False)

    def result_fields(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run it continues."""
        return {name: value for name, value in self.flat().items() if FIELDS[name][1].metadata["shapes_result"]}

    def digest(self) -> str:
        """Hash of `result_fields`."""
        return hashlib.sha256(json.dumps(self.result_fields(), sort_keys=True).encode()).hexdigest()[:16]


def mixture(items: Sequence[str]) -> list[tuple[str, int | float]]:
    """`["a", "0.5", "b", "1000"]` as `[("a", 0.5), ("b", 1000)]`. Raises ValueError with one line."""
    if not items or len(items) % 2:
        raise ValueError(f"needs NAME AMOUNT pairs, got {' '.join(items) or 'nothing'}")
    parts: list[tuple[str, int | float]] = []
    for name, text in zip(items[::2], items[1::2], strict=True):
        try:
            amount: int | float = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise ValueError(f"amount {text!r} of {name} is neither a fraction (0.5) nor a count (1000)") from None
        if isinstance(amount, float) and not 0 < amount <= 1:
            raise ValueError(f"fraction {text} of {name} must lie in (0, 1]; a count of rows has no decimal point")
        if amount == 0:
            raise ValueError(f"amount 0 of {name} takes no rows")
        parts.append((name, amount))
    return parts


# ----------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML in which numbers and dates stay text, since a field's type says what they are; a repeated key is an error.

    So `1e-7` is a number, and a commit `0123456` or a version `1.10` is kept as it is written.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ConstructorError(None, None, f"{name} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Words(list[str]):
    """The words behind a flag, not yet read as its field's type."""


def load_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a command line `CONFIG.yaml [MORE.yaml ...] [--field value ...]`.

    Raises ConfigError with every problem found.
    """
    values, problems = _read_arguments(arguments)
    typed: dict[str, Any] = {}
    mistyped: set[str] = set()
    for name, value in values.items():
        if name not in FIELDS:
            problems.append(_unknown_field(name))
            continue
        try:
            typed[name] = _convert(value, FIELDS[name][2])
        except ValueError as error:
            mistyped.add(name)
            problems.append(f"{name}: {error}")
    sections = {
        section: cls(**{k: v for k, v in typed.items() if FIELDS[k][0] == section}) for section, cls in SECTIONS.items()
    }
    config = RunConfig(**sections)
    # A mistyped field has its default here: what that contradicts is no problem of the user's.
    problems += [problem for problem in _contradictions(config) if not _names(problem) & mistyped]
    if problems:
        raise ConfigError(problems)
    return _resolve(config)


def _names(problem: str) -> set[str]:
    """The fields that a line speaks of before its advice."""
    return set(re.findall(r"\w+", problem.split(";")[0]))


def _read_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Raw values by name (later ones win) and the problems met while reading them."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    position = 0
    while position < len(arguments) and not arguments[position].startswith("--"):
        values |= _read_yaml(Path(arguments[position]), problems)
        position += 1
    while position < len(arguments):
        name, equals, inline = arguments[position][2:].partition("=")
        position += 1
        words = _Words([inline] if equals else [])
        while position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        values[name] = words
    return values, problems


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); configuration files come before the --flags")
        return {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        problems.append(f"{path}{line}: is not valid YAML ({error.problem})")
        return {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a tag such as !!int before other text
        problems.append(f"{path}: is not valid YAML ({' '.join(str(error).split())})")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        problems.append(f"{path}: must be a mapping of field names to values")
        return {}
    return content


def _unknown_field(name: str) -> str:
    close = get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    return f"{name}: unknown field" + (f"; did you mean {close[0]}?" if close else "; --help lists all fields")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return any(kind in (alternative, typing.get_origin(alternative)) for alternative in _alternatives(hint))


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; raises ValueError saying what is expected and what came."""
    if isinstance(value, _Words):
        value = _read_words(value, hint)
    if value is None and _accepts(hint, type(None)):
        return None
    for alternative in _alternatives(hint):
        converted = _convert_one(value, alternative)
        if converted is not None:
            return converted
    raise ValueError(f"expects {_describe(hint)}, got {value!r}")


def _read_words(words: _Words, hint: Any) -> Any:
    """What YAML would have given in place of a flag's words; raises ValueError if there are too few or too many."""
    if not words:
        if _accepts(hint, bool):
            return True
        raise ValueError("no value follows the flag")
    if words == ["null"]:
        return None
    if _accepts(hint, list):
        return list(words)
    if len(words) > 1:
        raise ValueError(f"takes one value, got {' '.join(words)}")
    if _accepts(hint, bool) or _accepts(hint, dict):
        try:
            return yaml.load(words[0], _Loader)
        except (yaml.YAMLError, ValueError):
            pass  # _convert says what is expected
    return words[0]


def _convert_one(value: Any, hint: Any) -> Any:
    """`value` (text, true, false, null, a list or a mapping) as one plain type; None if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value if value in arguments else None
    if origin is list:
        items = value.split() if isinstance(value, str) else value
        return items if isinstance(items, list) and items and all(map(_is_word, items)) else None
    if origin is dict:
        fits = isinstance(value, dict) and value and all(map(_is_word, [*value, *value.values()]))
        return value if fits else None
    if hint is bool:
        return value if isinstance(value, bool) else None
    if hint is type(None) or not _is_word(value):
        return None
    try:
        return hint(value)  # str, int or float
    except ValueError:
        return None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    parts = []
    for alternative in _alternatives(hint):
        if typing.get_origin(alternative) is Literal:
            parts.append("one of " + ", ".join(map(str, typing.get_args(alternative))))
        elif typing.get_origin(alternative) is list:
            parts.append("a list of words")
        elif typing.get_origin(alternative) is dict:
            parts.append("a mapping of names to numbers")
        elif alternative is not type(None):
            parts.append(names[alternative])
    return " or ".join(parts)


# ---------------------------------------------------------------------------------------------------------- checking


def _contradictions(config: RunConfig) -> Iterator[str]:
    """One line per value out of range or at odds with another."""
    yield from _range_problems(config.flat())
    yield from _model_problems(config.model)
    yield from _data_problems(config.data)
    yield from _loss_problems(config)
    train, output = config.train, config.output
    if train.eval_steps is not None and config.data.eval_mixer_list is None:
        yield "eval_steps: needs eval_mixer_list, the held-out data"
    if train.seed >= 2**32:
        yield f"seed: must be below {2**32}, got {train.seed}"
    if train.weight_decay and train.optimizer != "adamw":
        yield f"weight_decay: is not applied by optimizer {train.optimizer}; set it to 0 or use adamw"
    if train.lr_scheduler_type == "constant" and train.warmup_ratio not in (0.0, TrainConfig.warmup_ratio):
        yield "warmup_ratio: lr_scheduler_type constant has no warm-up; use constant_with_warmup"
    for name in ("wandb_project_name", "wandb_entity"):
        if getattr(output, name) is not None and not output.with_tracking:
            yield f"{name}: needs with_tracking"
    for name in ("hf_repo_id", "hf_repo_revision", "hf_private"):
        if getattr(output, name) is not None and not output.push_to_hub:
            yield f"{name}: needs push_to_hub"


_POSITIVE = (
    "max_train_samples",
    "max_seq_length",
    "max_prompt_length",
    "preprocessing_num_workers",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_batch",
    "learning_rate",
    "num_epochs",
    "max_train_steps",
    "eval_steps",
    "logging_steps",
    "checkpointing_steps",
    "keep_last_n_checkpoints",
    "lora_rank",
    "lora_alpha",
)
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "seed", "lora_dropout", "warmup_ratio")


def _range_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name in _POSITIVE:
        if values[name] is not None and not 0 < values[name] < float("inf"):
            yield f"{name}: must be above 0, got {values[name]}"
    for name in _NOT_NEGATIVE:
        if values[name] is not None and not 0 <= values[name] < float("inf"):
            yield f"{name}: must not be negative, got {values[name]}"
    for name in ("lora_dropout", "warmup_ratio"):
        if values[name] is not None and values[name] >= 1:
            yield f"{name}: must be below 1, got {values[name]}"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if not model.model_name_or_path:
        yield "model_name_or_path: is required, a local folder or a Hub name"
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"):
        if getattr(model, name) is not None and not model.use_lora:
            yield f"{name}: needs use_lora"


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.mixer_list is not None and data.dataset_mixer is not None:
        yield "dataset_mixer: contradicts mixer_list; give the training data once"
    if data.mixer_list is None and not data.dataset_mixer:
        yield "mixer_list: is required, the training data (or dataset_mixer in YAML)"
    if data.max_seq_length == 1:
        yield "max_seq_length: must be at least 2, a token of the prompt and one of the response"
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_seq_length:
        yield (
            f"max_prompt_length: {data.max_prompt_length} leaves no room for a response in "
            f"max_seq_length {data.max_seq_length}"
        )
    if data.eval_mixer_list is None and data.eval_mixer_list_splits != DataConfig().eval_mixer_list_splits:
        yield "eval_mixer_list_splits: needs eval_mixer_list, the held-out data"
    mixers = {"mixer_list": _training_items(data), "eval_mixer_list": data.eval_mixer_list}
    for name, items in mixers.items():
        if items is None:
            continue
        try:
            parts = mixture(items)
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        splits = getattr(data, f"{name}_splits")
        if len(splits) not in (1, len(parts)):
            yield f"{name}_splits: gives {len(splits)} splits for {len(parts)} datasets; give one, or one for each"


def _training_items(data: DataConfig) -> list[str] | None:
    """The training mixture as a flat list, whichever of the two fields gave it."""
    if data.mixer_list is None and data.dataset_mixer:
        return [word for name, amount in data.dataset_mixer.items() for word in (name, amount)]
    return data.mixer_list


def _loss_problems(config: RunConfig) -> Iterator[str]:
    reference = config.reference
    if reference.reference_model_revision is not None and reference.reference_model_name_or_path is None:
        yield "reference_model_revision: needs reference_model_name_or_path"
    try:
        spec = config.loss.loss().spec
    except ValueError as error:
        for line in str(error).splitlines():
            yield line if line.startswith("loss_type") else f"loss_type {config.loss.loss_type}: {line}"
        return
    if reference.reference_model_name_or_path is not None and not spec.needs_reference:
        yield f"reference_model_name_or_path: loss_type {spec.name} uses no reference model"


def _resolve(config: RunConfig) -> RunConfig:
    """Defaults that depend on other fields, filled in."""
    model, data, train, output = config.model, config.data, config.train, config.output
    lora = {"lora_rank": 64, "lora_alpha": 16.0, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
    if model.use_lora:
        unset = {k: v for k, v in lora.items() if getattr(model, k) is None}
        model = dataclasses.replace(model, **unset)  # type: ignore[arg-type]
    data = dataclasses.replace(data, mixer_list=_training_items(data), dataset_mixer=None)
    if train.max_tokens_per_batch is None:
        tokens = 2 * train.per_device_train_batch_size * data.max_seq_length
        train = dataclasses.replace(train, max_tokens_per_batch=tokens)
    if output.output_dir is None:
        output = dataclasses.replace(output, output_dir=f"output/{output.exp_name}")
    loss = LossConfig(loss_type=config.loss.loss_type, **config.loss.loss().parameters)
    return dataclasses.replace(config, model=model, data=data, loss=loss, train=train, output=output)


def help_text() -> str:
    """Every field with its type, default and meaning, by section."""
    lines = ["usage: dpo_tune_cache.py CONFIG.yaml [MORE.yaml ...] [--field value ...]", ""]
    lines += ["YAML files merge left to right, flags win.", ""]
    for section, cls in SECTIONS.items():
        lines.append(f"{section}: {(cls.__doc__ or '').splitlines()[0]}")
        for f in dataclasses.fields(cls):
            hint = typing.get_type_hints(cls)[f.name]
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            shown = "" if default in (None, "") else f" (default {default})"
            lines.append(f"  --{f.name}: {_describe(hint)}{shown}\n      {f.metadata['help']}")
        lines.append("")
    return "\n".join(lines)
