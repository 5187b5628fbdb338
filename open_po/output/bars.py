"""Phases drawn: a bar with its figures, in one line where they fit, else in more."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from open_po.output.phase import Phase

_BAR, _LEAST_BAR = 24, 8  # columns
_INDENT = 2


class Bar:
    """A phase that goes on: what is too long for a line goes into the next, and nothing is cut off but its label."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        phase, width = self._phase, options.max_width
        label = Text(phase.label)
        label.truncate(max(8, width // 3), overflow="ellipsis")
        head, left = f"{phase.share:4.0%}  {phase.amount()}", [phase.left()] if phase.left() else []
        first, rest = ", ".join([head, *left]), ", ".join(phase.figures())
        used = cell_len(label.plain) + cell_len(first) + 2
        if used + _LEAST_BAR + 1 > width:  # the bar comes before the time
            first, rest = head, ", ".join([*left, *phase.figures()])
            used = cell_len(label.plain) + cell_len(first) + 2
        in_one = used + _LEAST_BAR + cell_len(rest) + 4 <= width
        if in_one and rest:
            first = f"{first}  {rest}"
            used += cell_len(rest) + 2
        room = min(_BAR, width - used - 1)
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(no_wrap=True)
        cells: list[Text | ProgressBar] = [label]
        if room >= _LEAST_BAR:
            row.add_column(width=room)
            cells.append(ProgressBar(total=1.0, completed=phase.share, width=room))
        row.add_column(no_wrap=width >= used)
        row.add_row(*cells, Text(first))
        yield row
        if rest and not in_one:
            yield from _indented(rest, width, console)


def _indented(text: str, width: int, console: Console) -> list[Text]:
    lines = Text(text).wrap(console, max(8, width - _INDENT))
    return [Text(" " * _INDENT) + line for line in lines]
