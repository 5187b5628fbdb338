"""The layouts a row of preference data may have, all read into one: a prompt and two responses.

| layout | fields |
|---|---|
| text | `prompt`, `chosen`, `rejected`: text |
| messages | `prompt`: messages or text; `chosen`, `rejected`: the answering messages, or one message |
| conversations | `chosen`, `rejected`: whole conversations that share a prefix (`prompt` is then not needed) |
| transcripts | `chosen`, `rejected`: text with `Human:` and `Assistant:` turns (HH), without `prompt` |
| ShareGPT | `conversations` (and `system`), then `chosen`, `rejected`: a message, messages or text |

A message is `{role, content}` or ShareGPT's `{from, value}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

Message = dict[str, str]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# Chat templates tend to leave out messages of roles that they do not know, without a word.
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
_HH_ANSWER = "\n\nAssistant:"


class RowError(Exception):
    """A row that cannot be read; the message says which field and why."""


@dataclass(frozen=True)
class TextPair:
    """A pair whose parts are plain text, tokenised as they stand."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class MessagePair:
    """A pair whose parts are messages, rendered by the tokenizer's chat template."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def common_prefix_length(*sequences: Sequence[Any]) -> int:
    """How many leading items all sequences share."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length


def parse_row(row: Mapping[str, Any]) -> TextPair | MessagePair:
    """The pair that `row` holds. Raises RowError."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            fields = [key for key, value in row.items() if value is not None]
            meant = "".join(f"; did you mean {close} by it?" for close in get_close_matches(name, fields, n=1))
            raise RowError(f"field {name} is missing or null; fields: {', '.join(fields)}{meant}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if row.get("conversations") is not None:
        return _share_gpt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _transcripts(chosen, rejected)
        if isinstance(prompt, str):
            return TextPair(prompt, chosen, rejected)
    return _message_row(prompt, _messages(chosen, "chosen"), _messages(rejected, "rejected"))


def _message_row(prompt: Any, chosen: list[Message], rejected: list[Message]) -> MessagePair:
    if prompt is None or (isinstance(prompt, str) and chosen[0]["role"] != "assistant"):
        # Whole conversations; at least one message is left to each as its answer.
        start = common_prefix_length(chosen[:-1], rejected[:-1])
        if not start:
            raise RowError("chosen and rejected share no first message, so there is no prompt")
        opening = chosen[:start]
    else:
        opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
        start = len(opening) if opening == chosen[: len(opening)] == rejected[: len(opening)] else 0
    return _message_pair(opening, chosen[start:], rejected[start:])


def _message_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> MessagePair:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            found = f"a message of role {answer[0]['role']}" if answer else "nothing"
            raise RowError(f"field {name} has {found} after the prompt, where the assistant's answer should be")
    return MessagePair(prompt, chosen, rejected)


def _share_gpt(row: Mapping[str, Any]) -> MessagePair:
    system = row.get("system")
    opening = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    prompt = opening + _messages(row["conversations"], "conversations")
    return _message_pair(prompt, _messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected"))


def _transcripts(chosen: str, rejected: str) -> TextPair:
    end = chosen.rfind(_HH_ANSWER, 0, common_prefix_length(chosen, rejected))
    if end < 0:
        raise RowError(
            "field prompt is missing or null, and chosen and rejected are not transcripts that share turns up to "
            "'Assistant:'"
        )
    end += len(_HH_ANSWER)
    return TextPair(chosen[:end], chosen[end:], rejected[end:])


def _messages(value: Any, name: str) -> list[Message]:
    """Messages as a list. Text is the assistant's answer, except in `prompt` and `conversations`."""
    if isinstance(value, str) and name in ("chosen", "rejected"):
        return [{"role": "assistant", "content": value}]
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list) or not items:
        expected = "messages" if name == "conversations" else "text, a message or a list of messages"
        raise RowError(f"field {name} is {_kind(value)}, expected {expected}")
    return [_message(item, name) for item in items]


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"field {name} holds {_kind(item)} where a message {{role, content}} is expected")
    role = item.get("role") if item.get("role") is not None else item.get("from")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(f"field {name} has a message without text in role and content (or from and value)")
    role = _ROLES.get(role.lower(), role.lower())
    if role not in _KNOWN_ROLES:
        raise RowError(f"field {name} has a message of the unknown role {role!r}; known: {', '.join(_KNOWN_ROLES)}")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "text" if isinstance(value, str) else type(value).__name__
