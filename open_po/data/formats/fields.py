"""A row's fields, each with the type that a layout wants. Everything here raises RowError with the field's name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from open_po.data.formats.pairs import Row, RowError, Scores

_LONGEST = 4 * 2**20  # bytes of a text, a million tokens or so: what is longer is no answer but a fault
_SHOWN = 60  # characters of a value
_SCORES = (  # of chosen and rejected, as public data sets name them
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


def kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "text" if isinstance(value, str) else "null" if value is None else type(value).__name__


def shown(value: Any) -> str:
    """A value for an error's line, of whatever size it is."""
    return repr(value[:_SHOWN]) if isinstance(value, str) else repr(value)[:_SHOWN]


def missing(row: Row, name: str) -> RowError:
    """That a row lacks a field, with those that it has."""
    fields = [key for key, value in row.items() if value is not None]
    meant = "".join(f"; did you mean {close} by it?" for close in get_close_matches(name, fields, n=1))
    return RowError(f"field {name} is missing or null; fields: {', '.join(fields)}{meant}")


def value_of(row: Row, name: str) -> Any:
    """A field that must be there."""
    if row.get(name) is None:
        raise missing(row, name)
    return row[name]


def text_of(row: Row, name: str) -> str:
    """A field of text."""
    return as_text(value_of(row, name), name)


def as_text(value: Any, name: str) -> str:
    """`value`, which must be text of a length that a tokenizer can do something with."""
    if not isinstance(value, str):
        raise RowError(f"field {name} is {kind(value)}, expected text")
    if 4 * len(value) > _LONGEST and (size := len(value.encode(errors="replace"))) > _LONGEST:
        raise RowError(f"field {name} has {size:,} bytes of text; up to {_LONGEST:,} are read, leave the row out")
    return value


def items_of(row: Row, name: str, *keys: str) -> list[Mapping[str, Any]]:
    """A field that is a list of mappings, all with `keys`."""
    items = value_of(row, name)
    if not isinstance(items, list) or not items:
        raise RowError(f"field {name} is {kind(items)}, expected a list of {{{', '.join(keys)}}}")
    for number, item in enumerate(items):
        if not isinstance(item, Mapping) or any(item.get(key) is None for key in keys):
            raise RowError(f"field {name}[{number}] is not {{{', '.join(keys)}}}")
    return items


def number_of(value: Any, name: str) -> float:
    """`value`, which must be a finite number."""
    if not _is_number(value):
        raise RowError(f"field {name} is {shown(value)}, expected a number")
    return float(value)


def choice_of(row: Row, name: str) -> int:
    """A field that is 0 or 1."""
    value = value_of(row, name)
    if isinstance(value, bool) or value not in (0, 1):
        raise RowError(f"field {name} is {shown(value)}, expected 0 or 1")
    return int(value)


def scores_of(row: Row) -> Scores | None:
    """The scores of chosen and rejected that stand in columns of their own; None without both."""
    for chosen, rejected in _SCORES:
        if _is_number(row.get(chosen)) and _is_number(row.get(rejected)):
            return float(row[chosen]), float(row[rejected])
    return None


def _is_number(value: Any) -> bool:
    """Whether `value` is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer: JSON's have any number of digits
        return False
