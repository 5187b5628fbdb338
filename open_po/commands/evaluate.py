"""Answers of one or several models to the prompts of a data set, and how good they are.

    python -m open_po evaluate --model M [M ...] --task mt|sum|exact --data D [--out DIR] [--metrics NAME ...]
                               [--max_new_tokens N] [--checkpoints] [--field value ...]

D is a file or a Hub data set, or a mixture as in mixer_list; the chosen responses are what answers are compared with.
M is a model, a run's folder, or a checkpoint's. Every field of `python dpo_tune_cache.py --help` that concerns model
and data can follow. DIR gets evaluation.json, a plot, and answers/NAME.jsonl; answers that
are there are not generated again, and those of earlier evaluations with other data stay in answers/earlier/.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from open_po.commands.command_line import DATA_INSTEAD, CommandParser, Job, load_fields, refused, run_command
from open_po.config import FIELDS, RunConfig
from open_po.errors import ConfigError
from open_po.evaluation.metrics import METRICS, TASKS, MetricSpec, Task, Tools, metric

_TOKENS = 256


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    try:
        config, arguments = read_words(words)
    except ConfigError as error:
        return refused(error)

    def job() -> Job:
        from open_po.commands.evaluate_models import evaluate

        return partial(evaluate, arguments=arguments)

    return run_command(lambda: config, job)


def read_words(words: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """What a command line says: the fields, and its own flags. Raises ConfigError, or ends as CommandParser does."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and not rest[0].startswith("--"):
        parser.error(f"{rest[0]}: evaluate takes no configuration files; give fields as --field value")
    data = arguments.data if len(arguments.data) > 1 else [*arguments.data, "1.0"]
    # Its loss reads chosen responses alone, so rows without a rejected one are read too.
    flags = ["--model_name_or_path", arguments.model[0], "--mixer_list", *data, "--loss_type", "sft"]
    config = load_fields(flags, rest, command="evaluate", instead=_INSTEAD, problem=_problem)
    arguments.tools = Tools(**{name: getattr(arguments, name) for name in _TOOLS})
    arguments.specs = _metrics(arguments)
    return config, arguments


def _parser() -> CommandParser:
    metrics = "\n".join(f"    {spec.name:<12}{spec.summary}" for spec in METRICS.values())
    tasks = "\n".join(f"    {name:<12}{_listed(task)}" for name, task in TASKS.items())
    more = f"metrics (docs/add_a_metric.md adds one of your own, MODULE:FUNCTION):\n{metrics}\n\nby task:\n{tasks}"
    parser = CommandParser(prog="python -m open_po evaluate", description=__doc__, epilog=more)
    parser.add_argument("--model", required=True, nargs="+", metavar="M", help="the others are compared with the first")
    parser.add_argument("--task", required=True, choices=list(TASKS), help="what is measured, see below")
    parser.add_argument("--data", required=True, nargs="+", metavar="NAME", help="one data set, or NAME AMOUNT ...")
    out = Path("output/evaluation")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="in place of the task's")
    parser.add_argument("--max_new_tokens", type=_tokens, default=_TOKENS, help=f"of an answer (default {_TOKENS})")
    parser.add_argument("--checkpoints", action="store_true", help="of each M that is a run all checkpoints: a curve")
    engines = ["auto", "transformers", "vllm"]
    parser.add_argument("--engine", choices=engines, default="auto", help="auto: vllm if it is installed, on a GPU")
    for field in dataclasses.fields(Tools):
        if field.name in _TOOLS:
            default = "" if field.default is None else f" (default {field.default})"
            parser.add_argument(f"--{field.name}", default=field.default, help=f"{_TOOLS[field.name]}{default}")
    return parser


_TOOLS = {
    "reward_model": "for metrics reward and win_rate: a folder or a Hub model with one number as output",
    "comet_model": "for metric comet",
    "bertscore_model": "for metric bertscore, in place of the language's",
    "target_language": "of the answers: how bleu tells words apart, and which model bertscore takes",
    "source_pattern": "for comet: a regular expression whose first group is what a prompt asks to translate",
}
_INSTEAD = {
    **DATA_INSTEAD,
    "model_name_or_path": "--model",
    "max_tokens_per_batch": "--reference_max_tokens_per_batch",  # of a pass that keeps no activations
}


def _listed(task: Task) -> str:
    return ", ".join([*task.always, *(f"{name} if it is there" for name in task.if_there)])


def _tokens(word: str) -> int:
    if (count := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {word}")
    return count


def _metrics(arguments: argparse.Namespace) -> list[MetricSpec]:
    """Those that are asked for, or the task's. Raises ConfigError for what cannot be, as far as that is known here."""
    task = TASKS[arguments.task]
    specs, problems = [], []
    for name in dict.fromkeys(arguments.metrics or task.always):
        try:
            spec = metric(name)
        except ValueError as error:
            problems.append(str(error))
            continue
        specs.append(spec)
        problems += [line for line in [spec.lacks(arguments.tools, quick=True)] if line is not None]
    if problems:
        raise ConfigError(problems)
    return specs


def _problem(name: str) -> str | None:
    """What is wrong with a field, as far as answers are concerned."""
    if not FIELDS[name].is_scored:
        return f"{name}: evaluate does not train; leave it out"
    return f"{name}: evaluate reads no reference; leave it out" if name.startswith("reference_model") else None
