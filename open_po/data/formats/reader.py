"""Rows to pairs: by their columns, by a layout's name, or by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any, cast

from open_po.data.formats.catalogue import FORMATS, recognised
from open_po.data.formats.fields import as_text, number_of, shown
from open_po.data.formats.messages import read_messages, refuse_other_role
from open_po.data.formats.pairs import Message, MessagePair, Pair, Row, RowError, TextPair
from open_po.data.formats.spec import Format
from open_po.data.formats.template import Template


@dataclass(frozen=True)
class RowReader:
    """Reads rows into pairs; `format` None recognises each by its columns, `template` None leaves prompts alone."""

    format: Format | None
    template: Template | None

    def recognise(self, row: Row) -> str:
        """The name of the layout that `row` is read by. Raises RowError."""
        return self._format_of(row).name

    def __call__(self, row: Row) -> list[Pair]:
        """The pairs that `row` holds: mostly one, several of a ranked list, or none. Raises RowError."""
        form = self._format_of(row)
        pairs = form.read(row)
        template = self.template or form.prompt
        if not pairs or template is None:
            return pairs
        prompt, answer = template.fill(form.values(row)), form.answer if self.template is None else str
        return [_with_prompt(pair, prompt, answer) for pair in pairs]

    def why_none(self, row: Row) -> str:
        """Why there is no pair in a row that holds none. Raises RowError."""
        return self._format_of(row).nothing

    def _format_of(self, row: Row) -> Format:
        return recognised(row) if self.format is None else self.format


def row_reader(format: str | None, prompt_template: str | None) -> RowReader:
    """The reader for a part of a mixture. Raises ValueError with one line."""
    template = None if prompt_template is None else Template(prompt_template)
    return RowReader(None if format is None else _format(format), template)


def _format(name: str) -> Format:
    if ":" in name:
        return Format(name=name, read=_Custom(name, _imported(name)))
    if name not in FORMATS:
        close = get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"format {name!r} is unknown; {hint}known: {', '.join(FORMATS)}, or MODULE:FUNCTION")
    return FORMATS[name]


def _with_prompt(pair: Pair, prompt: str, answer: Callable[[str], str]) -> TextPair:
    """`pair` as text behind `prompt`."""
    chosen = answer(_plain(pair.chosen, "chosen"))
    rejected = None if pair.rejected is None else answer(_plain(pair.rejected, "rejected"))
    return TextPair(prompt, chosen, rejected, pair.scores)


def _plain(response: str | list[Message], name: str) -> str:
    if isinstance(response, str):
        return response
    if len(response) != 1 or "tool_calls" in response[0]:
        raise RowError(f"field {name} is more than one text, and prompt_template makes rows of text; leave one out")
    return str(response[0]["content"])


# ---------------------------------------------------------------------------------------------------- a user's function


@dataclass(frozen=True)
class _Custom:
    """A user's function, whose faults are told as those of a row."""

    name: str
    function: Callable[[Row], Any]

    def __call__(self, row: Row) -> list[Pair]:
        try:
            found = self.function(row)
        except RowError:
            raise
        except Exception as error:  # it is the user's: anything may be raised
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RowError(f"format {self.name} fails on it ({reason})") from error
        return [self._checked(pair) for pair in (found if isinstance(found, list) else [found])]

    def _checked(self, pair: Any) -> Pair:
        if not isinstance(pair, TextPair | MessagePair):
            raise RowError(
                f"format {self.name} returned {type(pair).__name__}, expected TextPair, MessagePair or a list of them"
            )
        if (scores := cast(Any, pair.scores)) is not None:
            if not isinstance(scores, tuple | list) or len(scores) != 2:
                raise RowError(f"format {self.name} gives scores of {shown(scores)}, expected two: (chosen, rejected)")
            for score in scores:
                number_of(score, "scores")
        if isinstance(pair, TextPair):
            for name in ("prompt", "chosen", *(["rejected"] if pair.rejected is not None else [])):
                as_text(getattr(pair, name), name)
            return pair
        prompt, chosen = read_messages(pair.prompt, "prompt"), read_messages(pair.chosen, "chosen")
        rejected = None if pair.rejected is None else read_messages(pair.rejected, "rejected")
        refuse_other_role(chosen, "chosen")
        if rejected is not None:
            refuse_other_role(rejected, "rejected")
        return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def _imported(name: str) -> Callable[[Row], Any]:
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(import_module(module), function)
    except Exception as error:  # the module is the user's: anything may be raised
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"format {name}: cannot be imported ({reason})") from error
    if not callable(found):
        raise ValueError(f"format {name}: is {type(found).__name__}, expected a function of a row")
    read: Callable[[Row], Any] = found
    return read
