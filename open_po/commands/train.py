"""One run from a command line: what `dpo_tune_cache.py` starts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from open_po.commands.command_line import Job, run_command, show
from open_po.config import help_text, load_config


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code. What a user can cause is told in one line."""
    if not arguments or {"-h", "--help"} & set(arguments):
        show(help_text())
        return 0
    return run_command(lambda: load_config(arguments), partial(_job, arguments))


def _job(arguments: Sequence[str]) -> Job:
    from open_po.training.run import run

    return partial(run, words=arguments)
