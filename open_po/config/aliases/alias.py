"""What an entry of the table of aliases is, and the kinds of entries that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a name's value becomes: fields with their raw values, or a line that says why it has no effect. It also gets what
# the same place and those before it say under other names. Raises ValueError with what to do instead.
Take = Callable[[Any, Mapping[str, Any]], "dict[str, Any] | str"]

_OFF = (False, None, "none", "no", "0")


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A name of another trainer. Where it ends in `*` it stands for all that begin so."""

    name: str
    fields: tuple[str, ...] = ()  # what it becomes
    says: str = ""  # how, or why it has no effect, or what to do instead
    kind: str = "field"  # field: becomes one; none: has no effect; refused; together: read with others, by a function
    take: Take
    yields: bool = False  # to our own field, where both are given
    reads: tuple[str, ...] = ()  # names beside it that decide what it becomes


def same(name: str, field: str, says: str = "", *, yields: bool = False) -> Alias:
    """Another name of a field."""
    return Alias(name=name, fields=(field,), says=says, take=lambda value, _: {field: value}, yields=yields)


def becomes(name: str, fields: str, says: str, take: Take, *, reads: str = "") -> Alias:
    """A name whose value is converted, by what the names that it `reads` say."""
    return Alias(name=name, fields=tuple(fields.split()), says=says, take=take, reads=tuple(reads.split()))


def values(name: str, field: str, meanings: Mapping[str, str], says: str = "") -> Alias:
    """A field, or another name of one, some of whose values have other names here; the rest are ours."""

    written = {ours.lower(): ours for ours in meanings.values()} | dict(meanings)

    def take(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        items = value if isinstance(value, list) else [value]
        ours = [written.get(item.lower(), item) if isinstance(item, str) else item for item in items]
        return {field: ours if isinstance(value, list) else ours[0]}

    by_ours = {ours: [theirs for theirs in meanings if meanings[theirs] == ours] for ours in meanings.values()}
    named = "; ".join(f"{', '.join(f'`{x}`' for x in theirs)}: {ours}" for ours, theirs in by_ours.items())
    return Alias(name=name, fields=(field,), says=says or named, take=take)


def unused(names: str, reason: str) -> Sequence[Alias]:
    """Names without an effect here, told with the reason."""
    return [Alias(name=name, says=reason, kind="none", take=lambda value, _: reason) for name in names.split()]


def refused(names: str, instead: str, off: Sequence[Any] = ()) -> Sequence[Alias]:
    """Names that would change a run and cannot be followed; where they are switched off they have no effect."""

    def take(value: Any, _: Mapping[str, Any]) -> str:
        if value in (*_OFF, *off):
            return "is off here too" if value in _OFF else "is so here too"
        raise ValueError(instead)

    return [Alias(name=name, says=instead, kind="refused", take=take) for name in names.split()]


def together(names: str, fields: str, says: str) -> Sequence[Alias]:
    """Names that mean something only with one another (loss.py, splits.py)."""

    def take(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        raise AssertionError("is read with the names that it belongs to")

    return [
        Alias(name=name, fields=tuple(fields.split()), says=says, kind="together", take=take) for name in names.split()
    ]


def number(value: Any) -> float:
    """A number that is still text. Raises ValueError."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expects a number, got {value!r}") from None


def truth(value: Any) -> bool:
    """True or false. Raises ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"expects true or false, got {value!r}")
    return value
