"""What every layout is read into: a prompt with one or two responses, as text or as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]  # a row's fields by name
Message = dict[str, Any]  # role and content, text; of an assistant's, tool_calls may stand beside a content of None
Scores = tuple[float, float]  # of chosen and rejected, the higher the better


class RowError(Exception):
    """A row that cannot be read; the message says which field and why."""


@dataclass(frozen=True)
class TextPair:
    """A pair whose parts are plain text, tokenised as they stand."""

    prompt: str
    chosen: str
    rejected: str | None  # None: the row has a chosen response alone
    scores: Scores | None = None


@dataclass(frozen=True)
class MessagePair:
    """A pair whose parts are messages, rendered by the tokenizer's chat template."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message] | None  # None: the row has a chosen response alone
    scores: Scores | None = None
    tools: list[dict[str, Any]] | None = None  # descriptions of functions, for the chat template


Pair = TextPair | MessagePair


def common_prefix_length(*sequences: Sequence[Any]) -> int:
    """How many leading items all sequences share."""
    first, *others = sequences
    shared, limit = 0, min(map(len, sequences))
    while shared < limit:  # by halves: slices are compared much faster than items
        middle = (shared + limit + 1) // 2
        if all(other[shared:middle] == first[shared:middle] for other in others):
            shared = middle
        else:
            limit = middle - 1
    return shared
