"""What a field of the configuration is: everything that is said of it, said once, where the field stands."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Sections whose fields `score` reads too, unless a field says otherwise.
_SCORED_SECTIONS = ("model", "data", "reference")


def option(
    default: Any,
    text: str,
    *,
    derived: bool = False,
    above: float | None = None,
    not_negative: bool = False,
    below: float | None = None,
    needs: str | None = None,
    shapes_result: bool = True,
    scores: bool | None = None,
) -> Any:
    """A field with its help text.

    `derived`: where it is left out, `resolve` fills it in from other fields, so its type has no None; one that `needs`
    a field which is off stays None, and nothing reads it then. `above`, `not_negative`, `below`: the range of a number.
    `needs`: the field, or fields (`a or b`), without which this one means nothing, with what to say of it.
    `shapes_result=False`: changing it between a run and its resumption is allowed. `scores`: whether `score` reads it;
    default by section.
    """
    about = About(
        text=text,
        derived=derived,
        above=above,
        not_negative=not_negative,
        below=below,
        needs=needs,
        shapes_result=shapes_result,
        scores=scores,
    )
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"about": about})
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, kw_only=True)
class About:
    """What `option` was told of a field; its docstring says what each means."""

    text: str
    derived: bool
    above: float | None
    not_negative: bool
    below: float | None
    needs: str | None
    shapes_result: bool
    scores: bool | None


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field as commands, checks and `--help` see it."""

    name: str
    section: str
    hint: Any  # its type
    default: Any
    about: About

    @property
    def takes_none(self) -> bool:
        """Whether it may be left out, as null."""
        return self.about.derived or type(None) in typing.get_args(self.hint)

    @property
    def is_scored(self) -> bool:
        """Whether `score` reads it."""
        return self.section in _SCORED_SECTIONS if self.about.scores is None else self.about.scores

    def out_of_range(self, value: Any) -> Iterator[str]:
        """What is wrong with its value, a line each."""
        about = self.about
        if value is None or isinstance(value, str):  # one of a field's words, as auto
            return
        if about.above is not None and not about.above < value < float("inf"):
            yield f"{self.name}: must be above {about.above}, got {value}"
        if about.not_negative and not 0 <= value < float("inf"):
            yield f"{self.name}: must not be negative, got {value}"
        if about.below is not None and value >= about.below:
            yield f"{self.name}: must be below {about.below}, got {value}"

    def lacks(self, values: dict[str, Any]) -> Iterator[str]:
        """A line if it is given among `values`, those of all fields, without the field that it needs."""
        value, about = values[self.name], self.about
        if about.needs is None or value == self.default:
            return
        if not any(values[name] for name in about.needs.split(",")[0].split(" or ")):
            yield f"{self.name}: needs {about.needs}"


def fields_of(section: str, cls: type) -> Iterator[Field]:
    """The fields of a section's dataclass."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        yield Field(
            name=item.name, section=section, hint=hints[item.name], default=default, about=item.metadata["about"]
        )
