"""What came of the parts of a mixture: for messages and the summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from open_po.data.formats import RowError, row_reader
from open_po.data.selection import LeftOutRows, PartRows
from open_po.data.sources import SourceRows
from open_po.output.summary import PartTotals


def left_out_rows(parts: Sequence[PartRows]) -> dict[str, LeftOutRows]:
    """The rows of all parts that do not train, by reason."""
    found: dict[str, LeftOutRows] = {}
    for part in parts:
        for reason, rows in part.left_out.items():
            found[reason] = found.get(reason, LeftOutRows()).joined(rows)
    return found


def _layout(source: SourceRows) -> str | None:
    """The layout that rows are read by: what is asked for, or what the first one has; None if it has none."""
    part = source.part
    if part.format is not None or not len(source.taken):
        return part.format
    (first,) = source.rows.read(source.taken[:1])
    with suppress(RowError):
        return None if isinstance(first, RowError) else row_reader(None, None).recognise(first)
    return None


def part_totals(
    sources: Sequence[SourceRows], parts: Sequence[PartRows], kept: Sequence[NDArray[np.int64]]
) -> Iterator[PartTotals]:
    """What came of each part."""
    found = {id(part.source): (part, len(places)) for part, places in zip(parts, kept, strict=True)}
    for source in sources:
        part, pairs = found.get(id(source), (None, 0))
        rows = len(source.times[0])
        yield PartTotals(
            dataset=source.part.dataset,
            name=source.name,
            format=_layout(source),
            available=source.available,
            rows=rows,
            repeated=len(source.taken) - rows,
            left_out={} if part is None else {reason: each.count for reason, each in part.left_out.items()},
            pairs=pairs,
        )
