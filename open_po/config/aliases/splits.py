"""Training and held-out data as alignment-handbook's files say them, and the DPO-gamma work's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_po.config.aliases.loss import Group

_MARKS = ("dataset_splits", "dataset_configs", "eval_split_size")
_STRATEGIES = ("evaluation_strategy", "eval_strategy")
_OF_EVALUATION = ("eval_steps", "eval_mixer_list", "eval_mixture")
SPLIT_NAMES = {*_MARKS, *_STRATEGIES, "task_name"}
SUM_PROMPT = (
    "<|im_start|>user\nSUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR: <|im_end|> <|im_start|>assistant "
)


def take_splits(layer: Mapping[str, Any], known: Mapping[str, Any]) -> Group:
    """The names of a layer that say its data together, our fields for them, and lines for people. Raises ValueError."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    names: set[str] = set()
    if layer.get("task_name") is not None:
        names.add("task_name")
        values |= _task(known["task_name"], known.get("algorithm"))
    strategy = next((name for name in _STRATEGIES if known.get(name) is not None), None)
    evaluates = strategy is None or known[strategy] not in ("no", False)
    if strategy is not None and known[strategy] not in ("no", False, "steps"):
        raise ValueError(f"{strategy}: {known[strategy]} is not offered; say steps, and eval_steps")
    if set(_STRATEGIES) & set(layer):
        names |= set(_STRATEGIES)
        if not evaluates:
            given = [name for name in _OF_EVALUATION if layer.get(name) is not None]
            names |= set(given)
            notes += [f"{name}: no effect with {strategy} no" for name in given]
            values |= dict.fromkeys(("eval_steps", "eval_mixture"))  # those of the files before
    if any(layer.get(name) is not None for name in _MARKS):
        names |= {*_MARKS, "dataset_mixer"}
        values |= _mixtures(known, evaluates)
    return names, values, notes


def _task(task: Any, algorithm: Any) -> dict[str, Any]:
    if task == "mt":
        return {}  # prompt, chosen and rejected as they are
    if task == "sum":
        return {"format": "tldr_sft" if algorithm == "sft" else "tldr_comparisons", "prompt_template": SUM_PROMPT}
    raise ValueError(f"task_name: expects mt or sum, got {task}; of other data format and prompt_template say it")


def _mixtures(known: Mapping[str, Any], evaluates: bool) -> dict[str, Any]:
    """`mixture` and `eval_mixture`; a split with `train` in its name is trained on, the others are held out."""
    mixer = known.get("dataset_mixer")
    mark = next(name for name in _MARKS if known.get(name) is not None)
    if not isinstance(mixer, dict):
        raise ValueError(f"{mark}: belongs to dataset_mixer; otherwise say mixture, with a split for each entry")
    configs = _listed(known.get("dataset_configs")) or [None]
    splits = _listed(known.get("dataset_splits")) or ["train"]
    if len(configs) not in (1, len(mixer)):
        raise ValueError(f"dataset_configs: gives {len(configs)} for {len(mixer)} datasets; give one for each")
    parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for position, (dataset, amount) in enumerate(mixer.items()):
        for split in splits:
            trains = "train" in split
            configuration = configs[position % len(configs)]
            part = {"dataset": dataset, "split": split}
            part["amount"] = amount if trains else known.get("eval_split_size") or "1.0"
            parts[trains].append(part if configuration is None else part | {"configuration": configuration})
    return {"mixture": parts[True], "eval_mixture": (evaluates and parts[False]) or None}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else str(value).split()
