"""Layouts with one answer to a prompt: for losses that need no rejected response."""

from __future__ import annotations

from typing import Any

from open_po.data.formats.fields import missing, shown, text_of, value_of
from open_po.data.formats.messages import alone, conversation, opening_of, read_messages, split_last
from open_po.data.formats.pairs import Pair, Row, RowError, TextPair

ANSWERS = ("completion", "response", "chosen")
CONVERSATIONS = ("messages", "conversations")


def single(row: Row) -> list[Pair]:
    """`prompt` with `completion`, `response` or `chosen`; or one conversation, which ends with the answer."""
    for name in ANSWERS:
        if row.get(name) is not None:
            return _answer(row, name)
    for name in CONVERSATIONS:
        if row.get(name) is not None:
            return conversation(row, name)
    raise missing(row, "completion")


def labelled(row: Row) -> list[Pair]:
    """`prompt`, `completion`, and whether it is good as `label`; none is given of one that is not."""
    label: Any = value_of(row, "label")
    if label not in (0, 1):
        raise RowError(f"field label is {shown(label)}, expected true or false")
    value_of(row, "completion")
    pairs = _answer(row, "completion")
    return pairs if label else []


def _answer(row: Row, name: str) -> list[Pair]:
    prompt, answer = row.get("prompt"), row[name]
    if isinstance(answer, str) and (isinstance(prompt, str) or prompt is None):
        return [TextPair(text_of(row, "prompt"), text_of(row, name), None)]
    read = read_messages(answer, name)
    if prompt is None or (isinstance(prompt, str) and read[0]["role"] != "assistant"):
        return [split_last(row, read, name)]
    opening = opening_of(prompt)
    read = read[len(opening) :] if read[: len(opening)] == opening else read
    return [alone(row, opening, read, name)]
