"""What files and flags say, before it is known what it means: text, true, false, null, lists and mappings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_BASED_ON = "based_on"  # in a file: the file, or files, that it changes; their paths are seen from its folder


class Words(list[str]):
    """The words behind a flag, not yet read as its field's type."""


class Loader(yaml.SafeLoader):
    """YAML in which all but true, false and null stays text, since a field's type says what it is.

    So `1e-7` is a number, a commit `0123456` or a version `1.10` is kept as it is written, and `prompt_sharing: on` is
    no boolean. A repeated key is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        met: set[Any] = set()
        for key, _ in node.value:
            if key.value in met:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            met.add(key.value)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$", re.IGNORECASE), list("tTfF"))


def plain(value: Any) -> Any:
    """A flag's words as a file would give them: nothing is true, one word a value, several a list."""
    if not isinstance(value, Words):
        return value
    if len(value) > 1:
        return list(value)
    if not value:
        return True
    try:
        return yaml.load(value[0], Loader)
    except (yaml.YAMLError, ValueError):
        return value[0]


def read_layers(arguments: Sequence[str], problems: list[str]) -> list[dict[str, Any]]:
    """The files of a command line, each behind those that it is based on, and its flags: raw values by name, in order.

    What cannot be read is told in `problems`.
    """
    layers: list[dict[str, Any]] = []
    position = 0
    while position < len(arguments) and not arguments[position].startswith("--"):
        layers += _read_file(Path(arguments[position]), (), problems)
        position += 1
    flags: dict[str, Any] = {}
    while position < len(arguments):
        name, equals, inline = arguments[position][2:].partition("=")
        position += 1
        words = Words([inline] if equals else [])
        while position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        flags[name] = words
    return [*layers, flags]


def _read_file(path: Path, above: tuple[Path, ...], problems: list[str]) -> list[dict[str, Any]]:
    """A file's layer, behind those of the files that it is based on."""
    content = read_yaml(path, problems)
    bases = content.pop(_BASED_ON, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        problems.append(f"{path}: {_BASED_ON} must name a file, or a list of files")
        return [content]
    layers: list[dict[str, Any]] = []
    here = (*above, path.resolve())
    for base in (path.parent / base for base in bases):
        if base.resolve() in here:
            problems.append(f"{path}: {_BASED_ON} {base} goes round in a circle; leave it out")
        else:
            layers += _read_file(base, here, problems)
    return [*layers, content]


def read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping that a file holds; empty, with a line in `problems`, if it cannot be read."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except IsADirectoryError:
        inside = path / "config.yaml"
        found = f"is it {inside} that you mean?" if inside.is_file() else "name a YAML file"
        problems.append(f"{path}: is a folder; {found}")
        return {}
    except FileNotFoundError as error:
        close = get_close_matches(path.name, [other.name for other in path.parent.glob("*.y*ml")], n=1)
        advice = f"did you mean {path.parent / close[0]}?" if close else "configuration files come before the --flags"
        problems.append(f"{path}: cannot be read ({error.strerror}); {advice}")
        return {}
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        problems.append(f"{path}{line}: is not valid YAML ({error.problem})")
        return {}
    # ValueError: not UTF-8, or a tag such as !!int before other text. RecursionError: nested too deeply.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{path}: is not valid YAML ({' '.join(str(error).split())})")
        return {}
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        problems.append(f"{path}: must be a mapping of field names to values")
        return {}
    return content
