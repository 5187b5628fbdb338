"""What makes a configuration wrong as a whole, and the defaults that depend on other fields."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from open_po.config.data import DataConfig
from open_po.config.model import ModelConfig
from open_po.config.output import OutputConfig, Tracker
from open_po.config.reference import ReferenceConfig
from open_po.config.run_config import FIELDS, RunConfig
from open_po.config.train import TrainConfig
from open_po.optimizers import OPTIMIZERS

Section = TypeVar("Section", ModelConfig, DataConfig, OutputConfig, ReferenceConfig)


def contradictions(config: RunConfig) -> Iterator[str]:
    """One line per value out of range or at odds with another."""
    config = _with_implied(config)
    values = config.flat()
    for field in FIELDS.values():
        yield from field.out_of_range(values[field.name])
    if not config.model.model_name_or_path:
        yield "model_name_or_path: is required, a local folder or a Hub name"
    if config.model.torch_compile and config.model.mlp_tile_tokens is not None:
        yield "mlp_tile_tokens: contradicts torch_compile, which makes new code for every number of tiles; use one"
    yield from _data_problems(config.data)
    yield from _lacking(values, "model", "data", "reference")
    yield from _lora_problems(config)
    yield from _loss_problems(config)
    yield from _lacking(values, "loss", "train", "output")
    yield from _hub_problems(config)
    yield from _tracker_problems(config.output)
    yield from _optimizer_problems(config)
    train = config.train
    if train.optimizer_in_backward == "on" and train.max_grad_norm:
        yield (
            f"optimizer_in_backward: on cannot clip, which needs all gradients first; set max_grad_norm to 0, got "
            f"{train.max_grad_norm}"
        )
    no_warmup = {"warmup_ratio": (0.0, TrainConfig.warmup_ratio), "warmup_steps": (None, 0)}
    for name, left_out in no_warmup.items():
        if train.lr_scheduler_type == "constant" and getattr(train, name) not in left_out:
            yield f"{name}: lr_scheduler_type constant has no warm-up; use constant_with_warmup"


def _with_implied(config: RunConfig) -> RunConfig:
    """The fields that others switch on: 4-bit weights do not train, so what trains are adapters."""
    if not config.model.use_qlora:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, use_lora=True))


def _lora_problems(config: RunConfig) -> Iterator[str]:
    model, output = config.model, config.output
    if model.use_qlora and importlib.util.find_spec("bitsandbytes") is None:
        yield "use_qlora: bitsandbytes is not installed; pip install 'bitsandbytes>=0.50', or use_lora alone"
    if model.lora_start == "continue":
        own = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
        for name in own:
            if getattr(model, name) is not None and getattr(model, name) is not False:
                yield f"{name}: comes with the adapters that lora_start continue trains on; leave it out"
    if not output.merge_on_save and not model.use_lora:
        yield "merge_on_save: false needs use_lora; a model without adapters has nothing to merge"
    if not output.merge_on_save and output.hf_merged:
        yield "hf_merged: contradicts merge_on_save false, which leaves no merged model; leave one of them out"


def _lacking(values: dict[str, Any], *sections: str) -> Iterator[str]:
    for field in FIELDS.values():
        if field.section in sections:
            yield from field.lacks(values)


def _data_problems(data: DataConfig) -> Iterator[str]:
    forms = [name for name in ("mixer_list", "dataset_mixer", "mixture") if getattr(data, name) is not None]
    for other in forms[1:]:
        yield f"{other}: contradicts {forms[0]}; give the training data once"
    if not forms:
        yield "mixer_list: is required, the training data (or dataset_mixer or mixture in YAML)"
    for typed in ("", "eval_"):
        for name in (f"{typed}mixer_list_splits", f"{typed}mixer_list_configs"):
            if getattr(data, f"{typed}mixture") is not None and getattr(data, name) not in (None, ["train"]):
                yield f"{name}: belongs to {typed}mixer_list; in {typed}mixture each entry has its own"
    if data.eval_mixer_list is not None and data.eval_mixture is not None:
        yield "eval_mixture: contradicts eval_mixer_list; give the held-out data once"
    if data.max_seq_length == 1:
        yield "max_seq_length: must be at least 2, a token of the prompt and one of the response"
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_seq_length:
        yield (
            f"max_prompt_length: {data.max_prompt_length} leaves no room for a response in "
            f"max_seq_length {data.max_seq_length}"
        )
    if forms:
        yield from _mixture_problems(lambda: _with_training_list(data).training_mixture)
    yield from _mixture_problems(lambda: data.held_out_mixture)


def _mixture_problems(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except ValueError as error:
        yield from str(error).splitlines()


def _with_training_list(data: DataConfig) -> DataConfig:
    """`dataset_mixer` as the flat list that it stands for."""
    if data.mixer_list is not None or not data.dataset_mixer:
        return data
    words = [word for name, amount in data.dataset_mixer.items() for word in (name, amount)]
    return dataclasses.replace(data, mixer_list=words, dataset_mixer=None)


def _optimizer_problems(config: RunConfig) -> Iterator[str]:
    train, model = config.train, config.model
    spec = OPTIMIZERS.get(train.optimizer)
    if spec is None:
        yield f"optimizer: expects one of {', '.join(OPTIMIZERS)}, got {train.optimizer!r}"
        return
    if train.weight_decay and not spec.decays:
        yield f"weight_decay: is not applied by optimizer {spec.name}; set it to 0 or use adamw"
    if not spec.is_installed:
        lacking = f"{spec.package}, which is not installed; pip install {spec.package}"
        yield f"optimizer: {spec.name} needs {lacking}, or use adamw"
    if model.weights_dtype == "bfloat16" and model.use_lora:
        yield "weights_dtype: bfloat16 contradicts use_lora, whose adapters train in float32; leave it out"
    if model.weights_dtype == "bfloat16" and model.dtype == "float32":
        yield "weights_dtype: bfloat16 contradicts dtype float32; set dtype to bfloat16 or auto"


def _hub_problems(config: RunConfig) -> Iterator[str]:
    output = config.output
    if output.resume_from_checkpoint == "hub" and (
        not output.push_to_hub or output.hub_strategy not in ("checkpoint", "all_checkpoints")
    ):
        yield "resume_from_checkpoint: hub needs push_to_hub and hub_strategy checkpoint or all_checkpoints"
    if not output.push_to_hub:
        return
    if output.hf_merged and not config.model.use_lora:
        yield "hf_merged: needs use_lora; a model without adapters is uploaded as it is"
    if output.hf_entity is not None and "/" in (output.hf_repo_id or ""):
        yield f"hf_entity: {output.hf_entity} contradicts hf_repo_id {output.hf_repo_id}, which names one; give it once"
    if output.hub_strategy in ("checkpoint", "all_checkpoints") and output.checkpointing_steps is None:
        yield f"hub_strategy: {output.hub_strategy} needs checkpointing_steps"
    if output.hf_repo_id is not None and (problem := repository_problem(output.hf_repo_id)):
        yield f"hf_repo_id: {problem}"
    if output.hf_repo_revision is not None and (problem := branch_problem(output.hf_repo_revision)):
        yield f"hf_repo_revision: {problem}"


def repository_problem(name: str) -> str | None:
    """Why a repository on the Hub cannot have this name, if so."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return " ".join(str(error).split())
    return None


def branch_problem(name: str) -> str | None:
    """Why a branch on the Hub cannot have this name, if so: git's rules."""
    bad = name == "@" or re.search(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{", name)
    if bad or any(re.fullmatch(r"|[.-].*|.*(\.|\.lock)", part) for part in name.split("/")):
        return f"{name!r} is no name that git allows a branch; use letters, digits, '.', '_', '-' and '/'"
    return None


def _loss_problems(config: RunConfig) -> Iterator[str]:
    reference = config.reference
    try:
        mix = config.loss.mix()
    except ValueError as error:
        yield from str(error).splitlines()
        return
    if reference.reference_model_name_or_path is not None and not mix.needs_reference:
        yield f"reference_model_name_or_path: loss_type {', '.join(config.loss.names)} uses no reference model"
    if reference.reference_cache_level == "sum" and mix.ld_alpha != 1.0:
        yield "reference_cache_level: ld_alpha needs token, got sum"


_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio", "mlflow": "mlflow-skinny"}


def _trackers(output: OutputConfig) -> list[Tracker]:
    """Those that a run reports to, each once, whichever of the two fields names them."""
    old: list[Tracker] = ["wandb"] if output.with_tracking else []
    return list(dict.fromkeys([*(output.report_to or []), *old]))


def _tracker_problems(output: OutputConfig) -> Iterator[str]:
    trackers = _trackers(output)
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            yield f"report_to: {name} is not installed; pip install {_PACKAGES[name]}, or leave it out"
    for field, value in (("wandb_project_name", output.wandb_project_name), ("wandb_entity", output.wandb_entity)):
        if value is not None and "wandb" not in trackers:
            yield f"{field}: needs wandb among report_to"


def resolve(config: RunConfig) -> RunConfig:
    """Defaults that depend on other fields, filled in."""
    config = _with_implied(config)
    given = config.flat()

    def unset(**defaults: Any) -> dict[str, Any]:
        return {name: value for name, value in defaults.items() if given[name] is None}

    model, data, output = config.model, config.data, config.output
    if model.use_lora and model.lora_start == "new":
        lora = unset(lora_rank=64, lora_alpha=16.0, lora_dropout=0.0, lora_target_modules=["all-linear"])
        model = dataclasses.replace(model, **lora)
    loss = config.loss.resolved()
    if loss.load_balancing_loss:
        loss = dataclasses.replace(loss, **unset(load_balancing_weight=0.001))
    output = dataclasses.replace(output, report_to=_trackers(output) or None, with_tracking=False)
    return dataclasses.replace(
        config,
        model=_expand_home(model),
        data=_expand_home(_with_training_list(data)),
        reference=_expand_home(config.reference),
        loss=loss,
        output=_expand_home(dataclasses.replace(output, **unset(output_dir=f"output/{output.exp_name}"))),
    )


def _expand_home(section: Section) -> Section:
    """A leading `~` of any path in a section, replaced; nothing else that is text can begin with `~/`."""

    def expand(value: Any) -> Any:
        if isinstance(value, list):
            return [expand(item) for item in value]
        if isinstance(value, dict):
            return {key: expand(item) for key, item in value.items()}
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value

    values = {f.name: expand(getattr(section, f.name)) for f in dataclasses.fields(section)}
    return dataclasses.replace(section, **values)
