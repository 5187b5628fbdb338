"""One run from a command line: what `dpo_tune_cache.py` starts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from open_po.commands.command_line import Job, refused, run_command, show
from open_po.commands.dry_run import resolved
from open_po.config import help_text, load_config
from open_po.errors import ConfigError

DRY_RUN = "--dry-run"


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code. What a user can cause is told in one line."""
    if not arguments or {"-h", "--help"} & set(arguments):
        show(help_text())
        return 0
    if DRY_RUN in arguments:
        return _dry_run([word for word in arguments if word != DRY_RUN])
    return run_command(lambda: load_config(arguments), partial(_job, arguments))


def _dry_run(arguments: Sequence[str]) -> int:
    try:
        config = load_config(arguments)
    except ConfigError as error:
        return refused(error)
    show(resolved(config))
    return 0


def _job(arguments: Sequence[str]) -> Job:
    from open_po.training.run import run

    return partial(run, words=arguments)
