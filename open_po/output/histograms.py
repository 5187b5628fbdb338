"""Histograms of lengths, side by side, for the console."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_BINS = 12  # about
_WIDEST = 30  # of a column, in characters
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one column counts."""

    title: str
    lengths: NDArray[np.int64]
    style: str = ""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A length that a column's are to stay within; the bins are cut there, with a line that says so."""

    column: int
    length: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Histograms:
    """Columns of counts over the same bins of lengths."""

    columns: Sequence[Column]
    limits: Sequence[Limit] = ()

    def edges(self) -> list[int]:
        """Ends of the bins, each of which holds the lengths above the end before it; powers of two apart, mostly.

        The last ones are as long as they must be: a few very long texts make no room for themselves.
        """
        lengths = np.concatenate([column.lengths for column in self.columns])
        usual, longest = float(np.quantile(lengths, 0.99)), int(lengths.max())
        step = 1
        while step * _BINS < usual:
            step *= 2
        ends = {min(step * number, longest) for number in range(1, _BINS + 1)}
        return sorted({0, longest, *ends, *(limit.length for limit in self.limits if limit.length < longest)})

    def counts(self) -> NDArray[np.int64]:
        """How many lengths of each column [bins, columns] are in each bin."""
        edges = np.array(self.edges()) + 0.5
        return np.stack([np.histogram(column.lengths, edges)[0] for column in self.columns], 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        edges, counts = self.edges(), self.counts()
        labels = [f"{low + 1:,}" if low + 1 == high else f"{low + 1:,}-{high:,}" for low, high in _pairs(edges)]
        margin = max(len("tokens"), *map(len, labels)) + 2
        width = min(_WIDEST, (options.max_width - margin) // len(self.columns))
        digits = len(f"{counts.max():,}")
        heading = Text("tokens".ljust(margin), style="bold")
        for column in self.columns:
            heading.append(column.title.ljust(width), style=f"bold {column.style}")
        yield heading
        yield from self._limit_lines(edges[0], margin)
        for label, end, numbers in zip(labels, edges[1:], counts.tolist(), strict=True):
            line = Text(f"{label:>{margin - 2}}  ")
            for column, number in zip(self.columns, numbers, strict=True):
                bar = _bar(number / counts.max() * (width - digits - 3))
                line.append(f"{number:>{digits},} ", style="" if number else "dim")
                line.append(f"{bar:<{width - digits - 1}}", style=column.style)
            yield line
            yield from self._limit_lines(end, margin)

    def _limit_lines(self, end: int, margin: int) -> Iterator[Text]:
        """What to say behind the bin that ends at `end`; behind the last one also of limits that nothing reaches."""
        for limit in self.limits:
            lengths = self.columns[limit.column].lengths
            longest = max(int(column.lengths.max()) for column in self.columns)
            if limit.length == end or (end == longest and limit.length > end):
                over = int((lengths > limit.length).sum())
                said = f"{limit.text} {limit.length:,}: {over:,} are longer ({self.columns[limit.column].title})"
                yield Text(f"{'─' * (margin - 1)} {said}", style="bold yellow" if over else "dim")


def _pairs(edges: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(edges))


def _bar(length: float) -> str:
    """A bar of so many characters, to the eighth of one; what is there at all is seen."""
    eighths = max(round(8 * length), int(length > 0))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
