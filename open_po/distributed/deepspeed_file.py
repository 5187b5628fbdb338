"""A DeepSpeed configuration file of the user's: what is taken from it, and what is this trainer's to decide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_po.errors import ConfigError

# What the trainer decides, with the field that says it. A file may leave it to whoever reads it ("auto").
_OURS = {
    "optimizer": "optimizer, learning_rate and weight_decay",
    "scheduler": "lr_scheduler_type, warmup_ratio and warmup_steps",
    "gradient_clipping": "max_grad_norm",
    "train_batch_size": "per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "fp16": "dtype",
    "bf16": "dtype",
    "steps_per_print": "logging_steps",
}
# What is passed on: none of it changes the value of a step.
_TAKEN = ("zero_optimization", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "dump_state")
_CHANGES_VALUES = ("zero_quantized", "zeropp_loco", "zenflow", "legacy_stage1")
# Said in published files as a matter of course; how it is done here is the same.
_HARMLESS = {"bf16", "steps_per_print"}


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """The file's settings but for those that are `auto` or this trainer's. Raises ConfigError.

    That is, for a file that cannot be read, or that fixes what a field of the configuration decides.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"DeepSpeed's configuration {path}: cannot be read ({error})"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"DeepSpeed's configuration {path}: must be a JSON object"])
    for name, field in _OURS.items():
        fixed = list(_fixed(content.pop(name, None), name))
        if fixed and name not in _HARMLESS:
            key, value = fixed[0]
            raise ConfigError([f'DeepSpeed\'s configuration {path}: {key} {value} is for {field} to say; write "auto"'])
    zero = content.get("zero_optimization", {})
    unknown = [name for name in content if name not in _TAKEN] + [
        f"zero_optimization.{name}" for name in zero if name.startswith(_CHANGES_VALUES)
    ]
    if unknown:
        raise ConfigError(
            [f"DeepSpeed's configuration {path}: {name} is not supported; take it out" for name in unknown]
        )
    return dict(_without_auto(content))


def _fixed(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The numbers and switches of a setting that are not left open."""
    if isinstance(value, dict):
        if value.get("enabled") is False:
            return
        for key, inner in value.items():
            if key != "type":
                yield from _fixed(inner, f"{name}.{key}")
    elif value not in (None, "auto"):
        yield name, value


def _without_auto(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield name, dict(_without_auto(value))
        elif value != "auto":
            yield name, value
