"""Which of the tokenised rows train: those that can be read, pass the filters, and did not come before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from open_po.config import DataConfig
from open_po.data.sources import SourceRows
from open_po.data.token_rows import Known, Outcome
from open_po.errors import UserError

_NAMED = 3  # rows, for each reason
BAD_ROWS = "cannot be read"
LONE = "no rejected response, which the loss needs"
REPEATED = "the same pair came before"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows are to train."""

    skip_bad_rows: bool = False
    needs_rejected: bool = False  # what reads the pairs compares two responses
    deduplicate: bool = False
    min_score_gap: float | None = None
    min_score_ratio: float | None = None
    min_response_length: int | None = None
    leave_out_long: bool = False

    @staticmethod
    def of(data: DataConfig, *, needs_rejected: bool, held_out: bool = False) -> Selection:
        """What a configuration says. Held-out pairs are all evaluated, as far as they can be read."""
        skip = data.on_bad_rows == "skip"
        if held_out:
            return Selection(skip_bad_rows=skip, needs_rejected=needs_rejected)
        return Selection(
            skip_bad_rows=skip,
            needs_rejected=needs_rejected,
            deduplicate=data.deduplicate,
            min_score_gap=data.min_score_gap,
            min_score_ratio=data.min_score_ratio,
            min_response_length=data.min_response_length,
            leave_out_long=data.long_rows == "leave_out",
        )


@dataclass(kw_only=True)
class LeftOutRows:
    """Rows that do not train, for one reason."""

    count: int = 0
    first: list[str] = field(default_factory=list)  # where they stand, of a few

    @property
    def more(self) -> int:
        """How many are not named."""
        return self.count - len(self.first)

    def joined(self, other: LeftOutRows) -> LeftOutRows:
        """These and then others."""
        return LeftOutRows(count=self.count + other.count, first=[*self.first, *other.first][:_NAMED])


@dataclass(kw_only=True)
class PartRows:
    """The tokenised rows of one part, and which of them are still to train."""

    source: SourceRows
    known: Known
    places: NDArray[np.int64]  # of the rows in their file
    left_out: dict[str, LeftOutRows] = field(default_factory=dict)  # by reason

    def __post_init__(self) -> None:
        self.keeps: NDArray[np.bool_] = self.known.outcome == Outcome.PAIR

    def origin(self, place: int) -> str:
        """Where a tokenised row came from."""
        return origin(self.source.name, self._number("row", place) + 1, self._number("pair", place))

    def _number(self, column: str, place: int) -> int:
        return int(self.known.numbers(column)[place])

    def leave_out(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Those of the rows that were still to train do not, for this reason."""
        self._count(np.flatnonzero(self.keeps & rows), reason)
        self.keeps &= ~rows

    def _count(self, places: NDArray[np.int64], reason: str, faults: Sequence[str] = ()) -> None:
        if not len(places):
            return
        found = self.left_out.setdefault(reason, LeftOutRows())
        found.count += len(places)
        for index, place in enumerate(places[: _NAMED - len(found.first)].tolist()):
            found.first.append(self._fault(place, faults[index]) if faults else self.origin(place))

    def count_faults(self) -> None:
        """Count the rows that gave no pair, by reason."""
        bad = np.flatnonzero(self._bad())
        self._count(bad, BAD_ROWS, self.known.reasons(self._only(bad[:_NAMED])))
        places = np.flatnonzero(self.known.outcome == Outcome.LEFT_OUT)
        reasons = np.array(self.known.reasons(self._only(places)))
        for first in np.sort(np.unique(reasons, return_index=True)[1]).tolist():
            self._count(places[reasons == reasons[first]], str(reasons[first]))

    def _only(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        found = np.zeros_like(self.keeps)
        found[places] = True
        return found

    def _bad(self) -> NDArray[np.bool_]:
        bad: NDArray[np.bool_] = self.known.outcome >= Outcome.BAD_ROW
        return bad

    def _fault(self, place: int, why: str) -> str:
        if self.known.outcome[place] == Outcome.BAD_LINE:
            return f"{self.source.name}: {why}"
        return f"{self.origin(place)}: {why}"

    def stop_at_bad_rows(self) -> None:
        """Raises UserError that names the first row which cannot be read."""
        bad = self._bad()
        if not bad.any():
            return
        whys = self.known.reasons(bad)
        more = Counter(whys)[whys[0]] - 1
        others = len(whys) - 1 - more
        rest = [f"{more} more like it"] * bool(more) + [f"{others} with other faults"] * bool(others)
        fault = self._fault(int(bad.argmax()), whys[0])
        raise UserError(fault + (f" (rows: {', '.join(rest)})" if rest else ""))

    def stop_if_all_are_bad(self) -> None:
        """Raises UserError if not one row can be read."""
        bad = self._bad()
        if bad.all():
            fault = self._fault(0, self.known.reasons(self._only(np.arange(1)))[0])
            raise UserError(f"{fault}; none of the part's {len(bad):,} rows can be read, so on_bad_rows skips none")


def origin(name: str, row: int, pair: int) -> str:
    """Where a pair came from, for messages."""
    return f"{name} row {row}" + (f" pair {pair}" if pair else "")


def apply_filters(parts: Sequence[PartRows], selection: Selection) -> None:
    """Leave out what cannot be read or does not pass. Raises UserError for what stops a run."""
    for part in parts:
        if selection.skip_bad_rows:
            part.stop_if_all_are_bad()
        else:
            part.stop_at_bad_rows()
        part.count_faults()
        for rows, reason in _filters(part, selection):
            part.leave_out(rows, reason)


def _filters(part: PartRows, selection: Selection) -> Iterator[tuple[NDArray[np.bool_], str]]:
    """Rows that are not to train, and why."""
    if selection.needs_rejected and selection.skip_bad_rows:  # else the run stops at them
        yield part.known.numbers("rejected_length") == 0, LONE
    if selection.leave_out_long:
        yield part.known.sides("lost").sum(1) > 0, "longer than the limits (long_rows leave_out)"
    if (least := selection.min_response_length) is not None:
        chosen, rejected = part.known.numbers("chosen_length"), part.known.numbers("rejected_length")
        short = (chosen < least) | ((rejected > 0) & (rejected < least))
        yield short, f"a response is shorter than {least:,} tokens (min_response_length)"
    fields = {"min_score_gap": selection.min_score_gap, "min_score_ratio": selection.min_score_ratio}
    for name, smallest in fields.items():
        if smallest is not None:
            yield from _score_filter(part, name, smallest)


def _score_filter(part: PartRows, name: str, least: float) -> Iterator[tuple[NDArray[np.bool_], str]]:
    chosen, rejected = part.known.numbers("chosen_score"), part.known.numbers("rejected_score")
    unknown = np.isnan(chosen) | np.isnan(rejected)
    if part.keeps.any() and unknown[part.keeps].all():
        raise UserError(
            f"{name}: the rows of {part.source.name} have no scores; leave {name} out, or give the part a format that "
            "reads scores"
        )
    yield unknown, f"without scores ({name})"
    if name == "min_score_gap":
        yield chosen - rejected < least, f"scores are less than {least:g} apart (min_score_gap)"
    else:
        high, low = np.maximum(chosen, rejected), np.minimum(chosen, rejected)
        # Not by division: a score of 0 is a lower one, and the ratio of two such scores says nothing.
        yield (high < least * low) | (high <= 0), f"scores' ratio is below {least:g} (min_score_ratio)"


def leave_out_repeated(parts: Sequence[PartRows], response_numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Leave out pairs that came before, in this part or another; returns which stay.

    `response_numbers` [K, 2] of the pairs that were still to train, in order.
    """
    pairs = response_numbers @ np.array([int(response_numbers.max(initial=0)) + 1, 1])
    stay = np.zeros(len(pairs), dtype=bool)
    stay[np.unique(pairs, return_index=True)[1]] = True
    start = 0
    for part in parts:
        places = np.flatnonzero(part.keeps)
        mine = stay[start : start + len(places)]
        start += len(places)
        repeated = np.zeros_like(part.keeps)
        repeated[places[~mine]] = True
        part.leave_out(repeated, REPEATED)
    return stay
