"""From YAML files and command-line flags to a checked `RunConfig`."""

from __future__ import annotations

import itertools
import re
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from open_po.config.aliases import ALIASES, translate
from open_po.config.checks import contradictions, resolve
from open_po.config.field import Field
from open_po.config.raw import Loader, Words, read_layers
from open_po.config.run_config import FIELDS, SECTIONS, RunConfig
from open_po.errors import ConfigError

_SPOKEN = {"yes": True, "on": True, "no": False, "off": False}  # what YAML 1.1 also takes for a boolean


# Fields that say the same in other words, each with what belongs to it.
_DATA_FORMS: tuple[set[str], ...] = (
    {"mixer_list", "dataset_mixer", "mixture"},
    {"eval_mixer_list", "eval_mixture"},
)
_TYPED = {  # which leaves behind what belongs to the other form
    "mixture": ("mixer_list_splits", "mixer_list_configs"),
    "eval_mixture": ("eval_mixer_list_splits", "eval_mixer_list_configs"),
}


def load_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a command line `CONFIG.yaml [MORE.yaml ...] [--field value ...]`.

    Names of other trainers are taken too (open_po/config/aliases). Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    layers = read_layers(arguments, problems)
    read_all = not problems
    values, notes, said_as = _take(layers, problems)
    if "exp_name" not in values and (name := _name_of_files(arguments)):
        values["exp_name"] = name
    typed: dict[str, Any] = {}
    mistyped: set[str] = set()
    for name, value in values.items():
        if name not in FIELDS:
            problems.append(_unknown_field(name))
            continue
        try:
            typed[name] = _convert(value, FIELDS[name])
        except ValueError as error:
            mistyped.add(name)
            problems.append(f"{said_as.get(name, name)}: {error}")
    sections = {
        section: cls(**{k: v for k, v in typed.items() if FIELDS[k].section == section})
        for section, cls in SECTIONS.items()
    }
    config = RunConfig(**sections, notes=tuple(notes))
    # A mistyped field has its default here: what that contradicts is no problem of the user's.
    # What a file that cannot be read may give is not missing.
    problems += [
        problem
        for problem in contradictions(config)
        if not _names(problem) & mistyped and (read_all or ": is required" not in problem)
    ]
    if problems:
        raise ConfigError(problems)
    return resolve(config)


def _names(problem: str) -> set[str]:
    """The fields that a line speaks of before its advice."""
    return set(re.findall(r"\w+", problem.split(";")[0]))


def _take(layers: Sequence[dict[str, Any]], problems: list[str]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Raw values by field (later layers win), what else is to be told of them, and which names they were given by."""
    values: dict[str, Any] = {}
    before: dict[str, Any] = {}
    notes: dict[str, str | None] = {}
    said_as: dict[str, str] = {}
    for layer in layers:
        taken = translate(layer, before, {name: said_as.get(name, name) for name in values})
        before |= layer
        values = {name: value for name, value in values.items() if said_as.get(name) not in taken.off}
        values = _layered(values, taken.values)
        notes |= taken.notes
        said_as = {name: said for name, said in said_as.items() if name not in taken.values} | taken.said_as
        problems += taken.problems
    return values, [line for line in notes.values() if line is not None], said_as


def _name_of_files(arguments: Sequence[str]) -> str | None:
    """The name of a run that several files make together, as `gemma-2-2b_sum_dpo_gamma`; None if it is one file."""
    files = [Path(word).stem for word in itertools.takewhile(lambda word: not word.startswith("--"), arguments)]
    return "_".join(files) if len(files) > 1 else None


def _layered(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of a later file, or the flags, over them. Data is replaced in whichever form it was given."""
    replaced: set[str] = set()
    for forms in _DATA_FORMS:
        replaced |= forms if forms & set(later) else set()
    for typed, own in _TYPED.items():
        replaced |= set(own) if typed in later else set()
    return {name: value for name, value in values.items() if name not in replaced} | later


def _unknown_field(name: str) -> str:
    close = get_close_matches(name, [*FIELDS, *ALIASES], n=1, cutoff=0.5)
    return f"{name}: unknown field" + (f"; did you mean {close[0]}?" if close else "; --help lists all fields")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return any(kind in (alternative, typing.get_origin(alternative)) for alternative in _alternatives(hint))


def _convert(value: Any, field: Field) -> Any:
    """`value` as the field's type; raises ValueError saying what is expected and what came."""
    hint = field.hint
    if isinstance(value, Words):
        value = _read_words(value, hint)
    if value is None and field.takes_none:
        return None
    for alternative in _alternatives(hint):
        converted = _convert_one(value, alternative)
        if converted is not None:
            return converted
    raise ValueError(f"expects {_describe(hint)}, got {value!r}")


def _read_words(words: Words, hint: Any) -> Any:
    """What YAML would have given in place of a flag's words; raises ValueError if there are too few or too many."""
    if not words:
        if _accepts(hint, bool):
            return True
        raise ValueError("no value follows the flag")
    if words == ["null"]:
        return None
    takes_one = any(_accepts(hint, kind) for kind in (str, float, bool))
    of_mappings = any(typing.get_origin(item) is dict for kind in _alternatives(hint) for item in typing.get_args(kind))
    if _accepts(hint, list) and not of_mappings and (len(words) > 1 or not takes_one):
        return list(words)
    if len(words) > 1:
        raise ValueError(f"takes one value, got {' '.join(words)}")
    if _accepts(hint, bool) or _accepts(hint, dict) or of_mappings:
        try:
            return yaml.load(words[0], Loader)
        except (yaml.YAMLError, ValueError):
            pass  # _convert says what is expected
    return words[0]


def _convert_one(value: Any, hint: Any) -> Any:
    """`value` (text, true, false, null, a list or a mapping) as one plain type; None if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value if value in arguments else None
    if origin is list:
        return _convert_list(value.split() if isinstance(value, str) else value, arguments[0])
    if origin is dict:
        fits = isinstance(value, dict) and value and all(map(_is_word, [*value, *value.values()]))
        return value if fits else None
    if hint is bool:
        return value if isinstance(value, bool) else _SPOKEN.get(str(value).lower())
    if hint is type(None) or not _is_word(value):
        return None
    try:
        return hint(value)  # str, int or float
    except ValueError:
        return None


def _convert_list(items: Any, hint: Any) -> list[Any] | None:
    """`items`, at least one, each as the type `hint`; None if they do not fit."""
    if not isinstance(items, list) or not items:
        return None
    converted: list[Any] = []
    for item in items:
        if item in (None, "null") and _accepts(hint, type(None)):
            converted.append(None)
            continue
        fitting = [x for kind in _alternatives(hint) if (x := _convert_one(item, kind)) is not None]
        if not fitting:
            return None
        converted.append(fitting[0])
    return converted


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    parts = []
    for alternative in _alternatives(hint):
        if typing.get_origin(alternative) is Literal:
            *others, last = map(str, typing.get_args(alternative))
            parts.append("one of " + ", ".join([*others, last]) if others else last)
        elif typing.get_origin(alternative) is list:
            (item, *_) = typing.get_args(alternative)
            choices = typing.get_args(item) if typing.get_origin(item) is Literal else ()
            words = "a list of words" if _accepts(item, str) else f"a list with {_describe(item)} for each loss"
            words = "a list of mappings {dataset: NAME, amount: 1.0, ...}" if typing.get_origin(item) is dict else words
            parts.append(f"a list of {', '.join(choices)}" if choices else words)
        elif typing.get_origin(alternative) is dict:
            parts.append("a mapping of names to numbers")
        elif alternative is not type(None):
            parts.append(names[alternative])
    return " or ".join(parts)


def help_text(program: str = "python dpo_tune_cache.py") -> str:
    """Every field with its type, default and meaning, by section."""
    lines = [f"usage: {program} CONFIG.yaml [MORE.yaml ...] [--field value ...]", ""]
    lines += ["YAML files merge left to right, flags win. --dry-run prints what they come to, and starts nothing.", ""]
    lines += ["Names of open-instruct, TRL and others are taken too: docs/aliases.md.", ""]
    for section, cls in SECTIONS.items():
        lines.append(f"{section}: {(cls.__doc__ or '').splitlines()[0]}")
        for field in (field for field in FIELDS.values() if field.section == section):
            shown = "" if field.default in (None, "") else f" (default {field.default})"
            lines.append(f"  --{field.name}: {_describe(field.hint)}{shown}\n      {field.about.text}")
        lines.append("")
    return "\n".join(lines)
