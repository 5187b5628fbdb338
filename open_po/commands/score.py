"""Log-probs of every pair of a data set under a model, and under a reference the implicit rewards.

    python -m open_po score --model M --data D [--reference R] --out F.jsonl [--beta 0.1] [--field value ...]

D is a file or a Hub data set, or a mixture as in mixer_list; every field of `python dpo_tune_cache.py --help` that
concerns model, data and reference can follow. Log-probs are kept in and taken from the reference cache.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from open_po.commands.command_line import CommandParser, Job, load_fields, run_command
from open_po.config import FIELDS, RunConfig

_BETA = 0.1


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = CommandParser(prog="python -m open_po score", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder or a Hub model")
    parser.add_argument("--data", required=True, nargs="+", metavar="NAME", help="one data set, or NAME AMOUNT ...")
    parser.add_argument("--reference", help="a folder or a Hub model: adds the implicit rewards")
    parser.add_argument("--out", required=True, type=Path, help="JSON Lines file, one line for each pair")
    parser.add_argument("--beta", type=_beta, help=f"of the implicit rewards (default {_BETA})")
    arguments, rest = parser.parse_known_args(words)
    if arguments.beta is not None and arguments.reference is None:
        parser.error("argument --beta: implicit rewards need --reference")
    if rest and not rest[0].startswith("--"):
        parser.error(f"{rest[0]}: score takes no configuration files; give fields as --field value")
    data = arguments.data if len(arguments.data) > 1 else [*arguments.data, "1.0"]
    flags = ["--model_name_or_path", arguments.model, "--mixer_list", *data]
    if arguments.reference is not None:
        flags += ["--reference_model_name_or_path", arguments.reference]

    def job() -> Job:
        from open_po.commands.score_pairs import score

        return partial(score, out=arguments.out, beta=arguments.beta or _BETA)

    def read() -> RunConfig:
        return load_fields(flags, rest, command="score", instead=_INSTEAD, problem=_problem)

    return run_command(read, job)


def _beta(word: str) -> float:
    beta = float(word)
    if not 0 < beta < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {word}")
    return beta


_INSTEAD = {
    "model_name_or_path": "--model",
    "mixer_list": "--data",
    "dataset_mixer": "--data",
    "mixture": "--data",
    "eval_mixer_list": "--data",
    "eval_mixer_list_splits": "--data",
    "eval_mixer_list_configs": "--data",
    "eval_mixture": "--data",
    "reference_model_name_or_path": "--reference",
    "max_tokens_per_batch": "--reference_max_tokens_per_batch",  # of a pass that keeps no activations
}


def _problem(name: str) -> str | None:
    """What is wrong with a field, as far as scoring is concerned."""
    return None if FIELDS[name].is_scored else f"{name}: score does not train; leave it out"
