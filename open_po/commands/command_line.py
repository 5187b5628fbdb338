"""How every command starts and ends: words, configuration, ranks, and what a user can cause told in one line."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from open_po.config import FIELDS, HELD_OUT_FIELDS, RunConfig, load_config
from open_po.errors import ConfigError, Preempted, UserError, user_line

if TYPE_CHECKING:
    from open_po.distributed.runtime import Runtime

Job: TypeAlias = "Callable[[RunConfig, Runtime], None]"


class CommandParser(argparse.ArgumentParser):
    """The command line of `python -m open_po COMMAND`; `description` is shown as it is laid out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line, where argparse would print its usage above it."""
        self.exit(ConfigError.exit_code, f"config error: {message}; see {self.prog} --help\n")


def show(text: str) -> None:
    """Print what was asked for, to the end or to where nobody reads on (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still has to flush


def refused(error: ConfigError) -> int:
    """Tell every problem of a configuration, a line each and on one rank; returns the exit code."""
    for problem in error.problems if os.environ.get("RANK", "0") == "0" else ():
        print(f"config error: {problem}", file=sys.stderr)
    return error.exit_code


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from what is imported: it stays, and looking through it takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else this process has been here before
            gc.freeze()
            atexit.register(gc.unfreeze)  # or libraries complain of leaks
        gc.enable()


def end(code: int) -> NoReturn:
    """End this process, as multiprocessing ends its own: exit functions run, and what is printed gets out.

    The interpreter would also take its million objects apart one by one, which takes seconds after a run.
    """
    with suppress(SystemExit):
        sys.exit(code)  # wandb has put itself there, to learn the code
    threads: Callable[[], None] = threading._shutdown  # type: ignore[attr-defined]
    for step in (threads, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        try:
            step()
        except KeyboardInterrupt:
            code = code or 130
        except OSError as error:  # of output: nobody reads it, or the disk is full
            code = code or 120  # as the interpreter does
            if not isinstance(error, BrokenPipeError):
                print(f"error: what was printed is lost ({error.strerror})", file=sys.stderr)
    os._exit(code)


# The fields that `--data` gives, in whichever form.
DATA_INSTEAD = dict.fromkeys(("mixer_list", "dataset_mixer", "mixture", *HELD_OUT_FIELDS), "--data")


def load_fields(
    flags: Sequence[str],
    rest: Sequence[str],
    *,
    command: str,
    instead: Mapping[str, str],
    problem: Callable[[str], str | None],
) -> RunConfig:
    """The configuration of a command's own `flags` and of `rest`, which the user gave as --field value.

    `instead` says which of the command's words give a field that it sets itself, `problem` why another one is refused.
    Raises ConfigError.
    """
    given = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    problems = [f"{name}: {command} takes this from {instead[name]}" for name in given if name in instead]
    known = [name for name in given if name in FIELDS and name not in instead]
    problems += [line for name in known if (line := problem(name)) is not None]
    if problems:
        raise ConfigError(problems)
    return load_config([*flags, *rest])


def refuse_unwritable(out: Path) -> None:
    """Raises UserError, before anything takes long, if no file `out` can be written; its folder is made."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be made ({error.strerror})") from error


def quiet_imports() -> None:
    """Libraries do not tell, when they are imported, of kernels for other machines that they have none of here."""
    for name in ("bitsandbytes", "liger_kernel"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run_command(read: Callable[[], RunConfig], load: Callable[[], Job]) -> int:
    """Do the job that `load` imports with the configuration that `read` gives, on all ranks; returns the exit code.

    A job's imports take seconds, so a mistake in the configuration is told before them.
    """
    try:
        config = read()
    except ConfigError as error:
        return refused(error)
    quiet_imports()
    with _uncollected():
        job = load()
        from open_po.distributed.runtime import Runtime
    try:
        runtime = Runtime.start(config.train.seed, config)
    except ConfigError as error:
        return refused(error)
    for note in config.notes:
        runtime.say(note)
    try:
        job(config, runtime)
    except (Exception, KeyboardInterrupt) as error:
        line = user_line(error)
        if line is None:
            raise
        told_by_main = isinstance(error, Preempted) or (isinstance(error, UserError) and error.shared)
        if runtime.is_main or not told_by_main:
            word = "stopped" if isinstance(error, Preempted) else "error"
            print(f"{word}: {'' if runtime.is_main else f'rank {runtime.rank}: '}{line}", file=sys.stderr)
        if isinstance(error, Preempted):
            return error.exit_code
        return error.exit_code if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    runtime.close()  # after an error the others may wait in a collective: then only the process's end frees them
    return 0
