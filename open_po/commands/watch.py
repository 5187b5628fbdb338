"""Show a run, or a sweep, from another terminal while it goes on.

    python -m open_po watch OUTPUT_DIR [--once] [--interval SECONDS]

Status, phases with rate and time left, newest figures, curves, checkpoints. It ends when the run does. Where standard
output is no terminal, it prints a line for each thing that changes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_po.commands.command_line import CommandParser
from open_po.errors import UserError, user_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_TERMINAL_SECONDS, _PIPE_SECONDS = 1.0, 10.0  # between two looks


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code: 1 if the folder holds no run."""
    parser = CommandParser(prog="python -m open_po watch", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="of a run or a sweep")
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    between = f"seconds between two looks (default: {_TERMINAL_SECONDS:.0f}; {_PIPE_SECONDS:.0f} if it prints lines)"
    parser.add_argument("--interval", type=_seconds, metavar="SECONDS", help=between)
    arguments = parser.parse_args(words)
    from open_po.output.console import make_console  # with what `--help` can do without

    console = make_console()
    try:
        view = _view(arguments.folder)
        if arguments.once:
            console.print(view.picture(view.look()))
        elif console.is_terminal:
            _redraw(view, console, arguments.interval or _TERMINAL_SECONDS)
        else:
            _tell(view, console, arguments.interval or _PIPE_SECONDS)
    except UserError as error:
        print(f"error: {user_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _seconds(word: str) -> float:
    seconds = float(word)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{word}: must be above 0")
    return seconds


@dataclass(frozen=True, kw_only=True)
class _View:
    """A folder that is watched, and how what it says is shown."""

    folder: Path
    read: Callable[[], Any]  # the state; None once the folder is gone
    picture: Callable[[Any], RenderableType]
    lines: Callable[[Any], Iterator[tuple[str, str]]]

    def look(self) -> Any:
        """The state. Raises UserError if there is none."""
        state = self.read()
        if state is None:
            soon = "" if self.folder.exists() else "; a run makes it some seconds after it was started"
            raise UserError(f"{self.folder}: holds no run, and no sweep; name an output_dir{soon}")
        return state


def _view(folder: Path) -> _View:
    from open_po.watch.picture import Picture, lines
    from open_po.watch.run_state import RunReader
    from open_po.watch.sweep_state import SweepPicture, SweepReader, sweep_lines

    sweep = SweepReader(folder)
    if not (folder / "config.yaml").is_file() and sweep.look() is not None:
        return _View(folder=folder, read=sweep.look, picture=SweepPicture, lines=sweep_lines)
    return _View(folder=folder, read=RunReader(folder).look, picture=Picture, lines=lines)


def _redraw(view: _View, console: Console, seconds: float) -> None:
    from rich.live import Live

    state = view.look()
    with Live(view.picture(state), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while state.alive:
            time.sleep(seconds)
            state = view.look()
            live.update(view.picture(state), refresh=True)


def _tell(view: _View, console: Console, seconds: float) -> None:
    told: dict[str, str] = {}
    while True:
        state = view.look()
        for about, line in view.lines(state):
            if told.get(about) != line:
                told[about] = line
                console.print(line, soft_wrap=True, markup=False)
        if not state.alive:
            return
        time.sleep(seconds)
