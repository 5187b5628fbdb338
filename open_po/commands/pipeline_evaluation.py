"""What a pipeline tells `python -m open_po evaluate`: the task's flags, and how its preference stages read data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from open_po.config import FIELDS, RunConfig

# Fields by which prompts and answers become tokens, and what else reading them takes.
_READING = (
    *("tokenizer_name", "tokenizer_revision", "use_slow_tokenizer", "chat_template_name", "trust_remote_code", "dtype"),
    *("format", "prompt_template", "on_bad_rows", "max_seq_length", "max_prompt_length", "truncation", "add_bos"),
    "preprocessing_num_workers",
)
Flags = dict[str, list[str]]


def evaluation_flags(config: RunConfig, given: Mapping[str, list[str]], problems: dict[str, None]) -> Flags:
    """All flags of `evaluate` but its models and folder: `given` ones, else those of a preference stage's `config`."""
    values = config.flat()
    found = {name: _words(values[name]) for name in _READING if values[name] not in (None, FIELDS[name].default)}
    if "data" not in given:
        problems |= dict.fromkeys(_held_out(config, found))
    if "task" not in given:
        problems["evaluate.task: is required, mt, sum or exact; give it in the task's evaluate.yaml"] = None
    if config.model.model_revision not in (None, "main"):
        problems[
            f"model_revision {config.model.model_revision}: cannot be evaluated beside models that have none; name the "
            "folder of a download"
        ] = None
    return {**found, **given}


def _held_out(config: RunConfig, found: Flags) -> Iterator[str]:
    """Adds the held-out data of a run; a line for what `evaluate` has no flag for."""
    parts = config.data.held_out_mixture
    if not parts:
        yield "evaluate.data: is required where the task has no eval_mixer_list; give it in its evaluate.yaml"
    found["data"] = [word for part in parts for word in (part.dataset, str(part.amount))]
    if any(part.split != "train" for part in parts):
        found["mixer_list_splits"] = [part.split for part in parts]
    if any(part.configuration is not None for part in parts):
        found["mixer_list_configs"] = [part.configuration or "null" for part in parts]
    for name in ("format", "prompt_template"):
        kinds = {getattr(part, name) or getattr(config.data, name) for part in parts}
        if len(kinds) > 1:
            yield f"evaluate.data: the parts of eval_mixture differ in {name}; name those of one in evaluate.yaml"
        elif kinds - {None}:
            found[name] = [str(kinds.pop())]


def _words(value: Any) -> list[str]:
    return [str(value).lower() if isinstance(value, bool) else str(value)]
