"""How every command starts and ends: configuration, ranks, and what a user can cause told in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from open_po.config import RunConfig
from open_po.errors import ConfigError, UserError
from open_po.runtime import Runtime, user_line


def run_command(read: Callable[[], RunConfig], job: Callable[[RunConfig, Runtime], None]) -> int:
    """Do `job` with the configuration that `read` gives, on all ranks; returns the exit code."""
    try:
        config = read()
    except ConfigError as error:
        for problem in error.problems if os.environ.get("RANK", "0") == "0" else ():
            print(f"config error: {problem}", file=sys.stderr)
        return error.exit_code
    try:
        runtime = Runtime.start(config.train.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        job(config, runtime)
    except (Exception, KeyboardInterrupt) as error:
        line = user_line(error)
        if line is None:
            raise
        told_by_main = isinstance(error, UserError) and error.shared
        if runtime.is_main or not told_by_main:
            print(f"error: {'' if runtime.is_main else f'rank {runtime.rank}: '}{line}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    runtime.close()  # after an error the others may wait in a collective: then only the process's end frees them
    return 0
