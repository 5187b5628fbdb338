"""What a file that strangers read does not tell: where folders lie on this machine, and secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from open_po.config import RunConfig

HIDDEN = "(hidden)"
# The Hub's tokens, and what stands before the host of an address.
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^\s/@]+(?=@)")
_SECRET_NAMES = ("TOKEN", "API_KEY", "SECRET", "PASSWORD")
_SHORTEST_SECRET = 8  # a shorter value is a word like any other


def last_part(path: str) -> str:
    """The name of a file or folder without the folders that it lies in."""
    return Path(os.path.abspath(Path(path).expanduser())).name


def without_folders(value: Any) -> Any:
    """Text, or lists and mappings of it, with paths outside the working directory cut down to `.../NAME`."""
    if isinstance(value, dict):
        return {without_folders(name): without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or os.path.normpath(value).split("/")[0] == ".."):
        return f".../{last_part(value)}"
    return value


def command_without_folders(words: Sequence[str], config: RunConfig) -> list[str]:
    """The words of a command line likewise; paths inside a word are found by the configuration that they gave."""
    long = sorted({text for text in _texts(list(config.flat().values())) if without_folders(text) != text}, key=len)
    shown = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        value = without_folders(value)
        for path in reversed(long):
            value = value.replace(path, without_folders(path))
        shown.append(f"{flag}{equals}{value}")
    return shown


def _texts(value: Any) -> list[str]:
    """All text in lists and mappings."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def without_secrets(text: str) -> str:
    """`text` with whatever looks like a token, or is one by an environment variable's name, hidden."""
    named = [value for name, value in os.environ.items() if name.upper().endswith(_SECRET_NAMES)]
    for value in [*named, get_token() or ""]:
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return _SECRETS.sub(HIDDEN, text)
