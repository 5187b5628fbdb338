"""What a run, or a launch, would do: dry runs."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from open_po.commands.place import NODE_0, Place, counted
from open_po.config import FIELDS, MixturePart, RunConfig

_EXAMPLE_PAIRS = 100_000


def resolved(config: RunConfig) -> str:
    """The dry run of one process: the configuration with every field that has a value, which is itself a file of one.

    What is to be told of it stands above, as comments.
    """
    train = config.train
    pairs = train.pairs_of_rank
    lines = [
        "Dry run: what the run would be configured as. Nothing is started.",
        f"Global batch: {pairs} pairs on one process, {4 * pairs} on 4, {8 * pairs} on 8",
        *config.notes,
    ]
    return "".join(f"# {line}\n" for line in lines) + config.to_yaml().rstrip()


def dry_run(config: RunConfig, words: Sequence[str], place: Place, pairs: int | None, restarts: int) -> str:
    """The text of a dry run: each node's command, a rank's, the engine, the batch, the steps and the configuration."""
    lines = [
        f"Dry run: {place}, {counted(place.ranks, 'rank')}. Nothing is started.",
        f"Engine: parallel {config.distributed.parallel}",
        f"Global batch: {_batch(config, place)}",
        f"Steps: {_steps(config, place, pairs)}",
        f"Learning rate: {_learning_rate(config)}",
        f"Tokens of a forward pass: {_tokens(config, place)}",
        *(f"Note: {note}" for note in config.notes),
        "",
    ]
    for node in range(place.nodes):
        lines += [f"Node {node}:", f"  {_node_command(words, place, node, restarts)}"]
    lines += ["", f"Each starts {counted(place.processes, 'rank')}; one by hand, of {place.ranks}:"]
    for node in range(place.nodes):
        lines.append(f"  {_rank_command(words, place, node)}")
    if place.processes > 1:
        lines.append(
            f"  and so on: LOCAL_RANK from 0 to {place.processes - 1}, RANK = {place.processes} x GROUP_RANK + "
            "LOCAL_RANK"
        )
    if place.nodes > 1 and place.address == NODE_0:
        lines += ["", f"{NODE_0} is to be replaced by the address of node 0 (or set MASTER_ADDR for the dry run)."]
    changed = {name: value for name, value in config.flat().items() if value not in (None, FIELDS[name].default)}
    text = yaml.safe_dump(changed, sort_keys=False, width=110).rstrip()
    return "\n".join([*lines, "", "Configuration, where it is not the default:", textwrap.indent(text, "  ")])


def _global_batch(config: RunConfig, place: Place) -> int:
    return config.train.pairs_of_rank * place.ranks


def _batch(config: RunConfig, place: Place) -> str:
    train = config.train
    return (
        f"{_global_batch(config, place)} pairs = per_device_train_batch_size {train.per_device_train_batch_size} x "
        f"gradient_accumulation_steps {train.gradient_accumulation_steps} x {counted(place.ranks, 'rank')}"
    )


def _learning_rate(config: RunConfig) -> str:
    train = config.train
    words = f"{train.learning_rate:g}, {train.lr_scheduler_type}"
    if train.lr_scheduler_type == "constant":
        return words
    if train.warmup_steps is not None:
        return f"{words} after a warm-up of {counted(train.warmup_steps, 'step')} (warmup_steps)"
    return f"{words} after a warm-up of {train.warmup_ratio:.4g} of the steps (warmup_ratio)"


def _tokens(config: RunConfig, place: Place) -> str:
    asked = config.train.max_tokens_per_batch
    if asked != "auto":
        return f"{asked:,} (max_tokens_per_batch)"
    return f"max_tokens_per_batch auto, {'what fits in memory' if place.devices else 'measured'} when training begins"


def _node_command(words: Sequence[str], place: Place, node: int, restarts: int) -> str:
    variables = {}
    if place.nodes > 1:
        variables = {
            "NUM_NODES": place.nodes,
            "NODE_RANK": node,
            "MASTER_ADDR": place.address,
            "MASTER_PORT": place.port,
        }
    variables["GPUS_PER_NODE" if place.devices else "PROCESSES_PER_NODE"] = place.processes
    options = ["--restarts", str(restarts)] if restarts else []
    return _command(variables, ["bash", "scripts/train/launch.sh", *words, *options])


def _rank_command(words: Sequence[str], place: Place, node: int) -> str:
    variables = {
        "RANK": node * place.processes,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": place.ranks,
        "LOCAL_WORLD_SIZE": place.processes,
        "GROUP_RANK": node,
        "MASTER_ADDR": place.address if place.nodes > 1 else "127.0.0.1",
        "MASTER_PORT": place.port,
    }
    return _command(variables if place.ranks > 1 else {}, ["python", "dpo_tune_cache.py", *words])


def _command(variables: dict[str, object], words: Sequence[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(str(value))}" for name, value in variables.items()), shlex.join(words)])


def _steps(config: RunConfig, place: Place, given: int | None) -> str:
    """The number of steps, or what it hangs on where the data are not at hand."""
    train, batch = config.train, _global_batch(config, place)
    counted = [given] if given is not None else [_rows(part) for part in config.data.training_mixture]
    known = [count for count in counted if count is not None]
    formula = f"{train.num_epochs} x ceil(pairs / {batch})"
    if len(known) < len(counted):
        if train.max_train_steps is not None:
            return f"{train.max_train_steps} at most (max_train_steps), else {formula}"
        unknown = [part.dataset for part in config.data.training_mixture if _rows(part) is None]
        example = train.num_epochs * math.ceil(_EXAMPLE_PAIRS / batch)
        return (
            f"{formula}; the pairs of {', '.join(unknown)} are not counted here, give them with --pairs N (for example "
            f"{_EXAMPLE_PAIRS} pairs would be {example} steps)"
        )
    pairs = sum(known)
    if given is None and config.data.max_train_samples is not None:
        pairs = min(pairs, config.data.max_train_samples)
    steps = train.num_epochs * math.ceil(pairs / batch)
    if train.max_train_steps is not None and train.max_train_steps < steps:
        return f"{train.max_train_steps} (max_train_steps), of {steps} = {formula} with {pairs} pairs"
    return f"{steps} = {formula} with {pairs} pairs, if each row gives one"


def _rows(part: MixturePart) -> int | None:
    """Rows that a part of the mixture takes; None if that takes more than counting lines."""
    if isinstance(part.amount, int):
        return part.amount
    path = Path(part.dataset).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file() or part.split != "train":
        return None
    with open(path, "rb") as file:
        available = sum(bool(line.strip()) for line in file)
    return max(1, round(part.amount * available))
