"""What a command prints to."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from open_po.errors import UserError


class _Output(Console):
    """Standard output; where rich would end the process without a word when nobody reads it any more, an error."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        raise UserError("standard output was closed by its reader; what is on disk is kept")


def make_console(*, quiet: bool = False) -> Console:
    """What a command prints to: lines as wide as the terminal, or of 200 characters in a file."""
    return _Output(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else 200)
