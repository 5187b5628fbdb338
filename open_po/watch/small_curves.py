"""Curves of a few lines of text, drawn in dots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.text import Text

Points = Sequence[tuple[float, float]]

# A character has 2 x 4 dots; these are their bits, by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
_LABEL = 8  # columns for the numbers beside


def small_curve(title: str, line: Points, marks: Points, *, width: int, height: int) -> Text:
    """`line` as a curve and `marks` as discs, with the range of both at the side: `height` + 2 lines of text."""
    every = [*line, *marks]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*every, strict=True))
    columns = max(4, width - _LABEL - 1)

    def place(x: float, y: float, across: int, down: int) -> tuple[int, int]:
        """The column and row of a point on a grid of so many."""
        to_right = 0.0 if right == left else (x - left) / (right - left)
        to_top = 0.5 if high == low else (y - low) / (high - low)
        return round(to_right * (across - 1)), round((1 - to_top) * (down - 1))

    cells = [[0] * columns for _ in range(height)]
    for column, row in _connected([place(x, y, 2 * columns, 4 * height) for x, y in line]):
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    discs = {place(x, y, columns, height) for x, y in marks}
    text = Text(f"{title}\n", style="bold")
    for row, bits in enumerate(cells):
        label = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}.get(row, "")
        text.append(f"{label:>{_LABEL - 1}} ", style="not bold dim")
        for column, bit in enumerate(bits):
            if (column, row) in discs:
                text.append("●", style="not bold yellow")
            else:
                text.append(chr(_BLANK + bit) if bit else " ", style="not bold cyan")
        text.append("\n")
    ends = f"{left:g}", f"{right:g}"
    text.append(" " * _LABEL + ends[0] + f"{ends[1]:>{max(1, columns - len(ends[0]))}}", style="not bold dim")
    return text


def _connected(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Dots with a column for each: the mean of those in one column, and what lies between it and the next."""
    rows: dict[int, list[int]] = {}
    for column, row in dots:
        rows.setdefault(column, []).append(row)
    means = [(column, round(sum(found) / len(found))) for column, found in sorted(rows.items())]
    drawn = means[:1]
    for (column, row), (to_column, to_row) in itertools.pairwise(means):
        steps = max(to_column - column, abs(to_row - row), 1)
        drawn += [
            (round(column + (to_column - column) * step / steps), round(row + (to_row - row) * step / steps))
            for step in range(1, steps + 1)
        ]
    return drawn
