"""What a command prints to."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console

from open_po.errors import UserError
from open_po.output.board import Board

_FILE_WIDTH, _NOTEBOOK_WIDTH = 200, 100  # columns


class Output(Console):
    """Standard output with the board of the command's phases.

    Where rich would end the process without a word when nobody reads it any more, it raises UserError.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.board = Board(self)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        raise UserError("standard output was closed by its reader; what is on disk is kept")


def make_console(*, quiet: bool = False) -> Output:
    """What a command prints to: lines as wide as the terminal, or of 200 characters in a file.

    A notebook gets plain lines too, narrower ones. What a cell starts with `!` believes to be on a terminal, but not
    every notebook follows a cursor that moves; and rich's own live output there needs widgets that may be missing.
    """
    if "JPY_PARENT_PID" in os.environ:  # a notebook's kernel, or its child
        return Output(quiet=quiet, highlight=False, width=_NOTEBOOK_WIDTH, force_terminal=False, force_jupyter=False)
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Output(quiet=quiet, highlight=False, width=width, force_jupyter=False)
