"""Prompts as data: text with `{column}` for what a row has there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from open_po.data.formats.fields import as_text, kind
from open_po.data.formats.pairs import RowError


@dataclass(frozen=True)
class Template:
    """A prompt's text, with `{column}`, `{column.key}` for what lies within, and doubled braces for braces."""

    text: str

    def __post_init__(self) -> None:
        """Raises ValueError with one line."""
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(
                f"prompt_template: {error}; a column stands in {{braces}}, a brace itself is doubled"
            ) from None
        names = [name for _, name, _, _ in parts if name is not None]
        if not names:
            raise ValueError(f"prompt_template {self.text[:60]!r} names no column; write one as {{column}}")
        if any(not name or form or conversion for _, name, form, conversion in parts if name is not None):
            raise ValueError(
                f"prompt_template: a column stands in braces by its name alone, got {self.text[:60]!r}; a brace "
                "itself is doubled"
            )

    def fill(self, values: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises RowError naming the column that is not there, or is no text."""
        return "".join(self._pieces(values))

    def _pieces(self, values: Mapping[str, Any]) -> Iterator[str]:
        for literal, name, _, _ in Formatter().parse(self.text):
            yield literal
            if name is not None:
                yield _text(values, name)


def _text(values: Mapping[str, Any], path: str) -> str:
    value: Any = values
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            there = ", ".join(map(str, value)) if isinstance(value, Mapping) else kind(value)
            raise RowError(f"prompt_template has {{{path}}}, but the row has no {key}; there is: {there}")
        value = value[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"prompt_template has {{{path}}}, which is {kind(value)} in this row and no text")
    return as_text(value, path)
