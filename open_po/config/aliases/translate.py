"""From what a file or the flags say, in the words of whichever trainer, to our fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from open_po.config.aliases.alias import Alias
from open_po.config.aliases.loss import LOSS_NAMES, take_loss
from open_po.config.aliases.splits import SPLIT_NAMES, take_splits
from open_po.config.aliases.table import ALIASES
from open_po.config.raw import plain

_BEGINNINGS = [alias for name, alias in ALIASES.items() if name.endswith("*")]


@dataclass
class Taken:
    """What became of a layer: raw values by our fields, and lines for people."""

    values: dict[str, Any] = field(default_factory=dict)
    said_as: dict[str, str] = field(default_factory=dict)  # by field, the name it was given by
    notes: dict[str, str | None] = field(default_factory=dict)  # by the name they are of; None: there is none any more
    off: set[str] = field(default_factory=set)  # names that set nothing: what they have set before goes
    problems: list[str] = field(default_factory=list)


def translate(layer: Mapping[str, Any], before: Mapping[str, Any], givers: Mapping[str, str]) -> Taken:
    """The raw values of one file, or of the flags, by our fields; `before` has those of the layers under it.

    `givers` says by which name each of our fields was given there: a name whose meaning this layer changes is read
    anew. Names that are neither fields nor aliases are left as they are.
    """
    taken = Taken()
    own = {**_read_anew(layer, before, givers), **layer}
    under = {name: value for name, value in before.items() if name not in layer}
    known = {name: plain(value) for name, value in {**under, **layer}.items()}  # what counts more stands behind
    for group, names in ((take_loss, LOSS_NAMES), (take_splits, SPLIT_NAMES)):
        values: dict[str, Any] = {}
        notes: list[str] = []
        try:
            names, values, notes = group(own, known)
        except ValueError as error:
            taken.problems.append(str(error))
        own = {name: value for name, value in own.items() if name not in names}
        taken.values |= values
        taken.notes |= {line: line for line in notes}
    named = {name: alias for name in own if (alias := alias_of(name)) is not None}
    taken.values |= {name: value for name, value in own.items() if name not in named}
    for name, alias in named.items():
        if plain(own[name]) is not None or name in alias.fields:
            _take_one(name, alias, own[name], known, set(layer), taken)
    return taken


def _read_anew(layer: Mapping[str, Any], before: Mapping[str, Any], givers: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: value
        for name, value in before.items()
        if (alias := ALIASES.get(name)) is not None
        and set(alias.reads) & set(layer)
        and not set(alias.fields) & set(layer)
        and all(givers.get(ours, name) == name for ours in alias.fields)
    }


def alias_of(name: str) -> Alias | None:
    """The entry of a name: its own, or that of its beginning."""
    if name in ALIASES:
        return ALIASES[name]
    return next((alias for alias in _BEGINNINGS if name.startswith(alias.name[:-1])), None)


def _take_one(name: str, alias: Alias, said: Any, known: Mapping[str, Any], given: set[str], taken: Taken) -> None:
    value = plain(said)
    try:
        result = alias.take(value, known)
    except ValueError as error:
        taken.problems.append(f"{name}: {error}")
        return
    shown = name if isinstance(value, dict | list) else f"{name} {_spoken(value)}"
    if isinstance(result, str):
        taken.notes[name] = f"{shown}: {result}"
        return
    taken.notes[name] = None
    taken.off |= set() if result else {name}
    for key, converted in result.items():
        ours = said if converted is value else converted  # what is not converted its field reads as it was given
        if key not in taken.values or plain(taken.values[key]) == plain(ours):
            taken.values[key] = ours
            taken.said_as |= {key: name} if key != name else {}
        elif alias.yields and key in given:
            taken.notes[name] = f"{shown}: no effect beside {key}"
        else:
            other = taken.said_as.get(key, key)
            first, second = (other, name) if key == name else (name, other)
            also = "is given too" if second == key else f"{second} says too"
            taken.problems.append(f"{first}: says {key}, which {also}, with another value; leave one of them out")


def _spoken(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
