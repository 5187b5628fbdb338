"""What makes a configuration wrong as a whole, and the defaults that depend on other fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from open_po.config.fields import DataConfig, ModelConfig, OutputConfig, ReferenceConfig, RunConfig, TrainConfig
from open_po.config.mixture import mixture

Section = TypeVar("Section", ModelConfig, DataConfig, OutputConfig, ReferenceConfig)


def contradictions(config: RunConfig) -> Iterator[str]:
    """One line per value out of range or at odds with another."""
    yield from _range_problems(config.flat())
    yield from _model_problems(config.model)
    yield from _data_problems(config.data)
    yield from _loss_problems(config)
    train, output = config.train, config.output
    if config.loss.load_balancing_weight is not None and not config.loss.load_balancing_loss:
        yield "load_balancing_weight: needs load_balancing_loss"
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
    "reference_max_tokens_per_batch",
    "learning_rate",
    "num_epochs",
    "max_train_steps",
    "eval_steps",
    "logging_steps",
    "checkpointing_steps",
    "keep_last_n_checkpoints",
    "lora_rank",
    "lora_alpha",
    "load_balancing_weight",
)
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "seed", "lora_dropout", "warmup_ratio", "verify_reference_rows")


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
        mix = config.loss.mix()
    except ValueError as error:
        yield from str(error).splitlines()
        return
    if reference.reference_model_name_or_path is not None and not mix.needs_reference:
        yield f"reference_model_name_or_path: loss_type {', '.join(config.loss.names)} uses no reference model"
    if reference.reference_cache_level == "sum" and mix.ld_alpha != 1.0:
        yield "reference_cache_level: ld_alpha needs token, got sum"


def resolve(config: RunConfig) -> RunConfig:
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
    model, data, output = _expand_home(model), _expand_home(data), _expand_home(output)
    reference = _expand_home(config.reference)
    loss = config.loss.resolved()
    return dataclasses.replace(
        config, model=model, data=data, reference=reference, loss=loss, train=train, output=output
    )


def _expand_home(section: Section) -> Section:
    """A leading `~` of any path in a section, replaced; nothing else that is text can begin with `~/`."""

    def expand(value: Any) -> Any:
        if isinstance(value, list):
            return [expand(item) for item in value]
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value

    values = {f.name: expand(getattr(section, f.name)) for f in dataclasses.fields(section)}
    return dataclasses.replace(section, **values)
