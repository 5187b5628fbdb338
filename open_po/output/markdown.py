"""Markdown that shows any text as it is, as GitHub and the Hub render it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def plain(text: str) -> str:
    """`text` on one line, with nothing in it taken for markup."""
    escaped = re.sub(r"([\\`*\[\]<>~$&#])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)


def code(text: str) -> str:
    """`text` as code on one line."""
    text = " ".join(text.split())
    ticks = _ticks(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}" if text else ""


def block(text: str, language: str = "") -> str:
    """`text` as lines of code."""
    ticks = _ticks(text, 3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _ticks(text: str, least: int) -> str:
    """More backticks than `text` has in a row anywhere, and `least` of them."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 0) -> str:
    """A table; its cells are Markdown. The last `right` columns are of numbers."""
    lines = [head, [*["---"] * (len(head) - right), *["---:"] * right], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def folded(title: str, text: str) -> str:
    """`text` that opens on a click."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"
