"""What describes a layout of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from open_po.data.formats.pairs import Pair, Row
from open_po.data.formats.template import Template


def _as_it_stands(response: str) -> str:
    return response


def _its_columns(row: Row) -> Mapping[str, Any]:
    return row


@dataclass(frozen=True, kw_only=True)
class Format:
    """A layout of rows and how to read one."""

    name: str
    read: Callable[[Row], list[Pair]]  # raises RowError
    # For people, in Markdown: the columns, and data sets that are laid out so.
    columns: str = ""
    data_sets: str = ""
    nothing: str = "gives no pair"  # what is said of a row of which `read` makes none
    # A row that lacks `chosen` or `rejected` is read so if it has all the columns of one of these.
    found_by: tuple[tuple[str, ...], ...] = ()
    # Where rows have no prompt of their own: `read` leaves it empty, and a response behind it is `answer(response)`.
    prompt: Template | None = None
    answer: Callable[[str], str] = _as_it_stands
    values: Callable[[Row], Mapping[str, Any]] = _its_columns  # what a prompt template may name
