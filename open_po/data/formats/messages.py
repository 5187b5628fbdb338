"""Layouts of messages: `{role, content}` or ShareGPT's `{from, value}`, with tool calls where there are some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from open_po.data.formats.fields import as_text, kind, scores_of, shown, text_of, value_of
from open_po.data.formats.pairs import Message, MessagePair, Pair, Row, RowError, common_prefix_length

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
_OF_RESULTS = ("tool_call_id", "name")  # keys of a tool's answer that say what it answers


def messages(row: Row) -> list[Pair]:
    """`prompt`: messages or text; `chosen`, `rejected`: the answer, or whole conversations that share their start."""
    prompt = row.get("prompt")
    chosen, rejected = (read_messages(value_of(row, name), name) for name in ("chosen", "rejected"))
    if prompt is None or (isinstance(prompt, str) and chosen[0]["role"] != "assistant"):
        # Whole conversations; at least one message is left to each as its answer.
        start = common_prefix_length(chosen[:-1], rejected[:-1])
        if not start:
            raise RowError("chosen and rejected share no first message, so there is no prompt")
        opening = chosen[:start]
    else:
        opening = opening_of(prompt)
        start = len(opening) if opening == chosen[: len(opening)] == rejected[: len(opening)] else 0
    return [_pair(row, opening, chosen[start:], rejected[start:])]


def share_gpt(row: Row) -> list[Pair]:
    """`conversations`, with a `system` text perhaps, then `chosen` and `rejected`."""
    prompt = _system(row) + read_messages(value_of(row, "conversations"), "conversations")
    return [_pair(row, prompt, *(read_messages(value_of(row, name), name) for name in ("chosen", "rejected")))]


def orca(row: Row) -> list[Pair]:
    """`system` text, perhaps empty, `question` or `prompt`, and two answers of text."""
    asked = text_of(row, "prompt" if row.get("question") is None and "prompt" in row else "question")
    prompt = [*_system(row), {"role": "user", "content": asked}]
    chosen, rejected = (read_messages(text_of(row, name), name) for name in ("chosen", "rejected"))
    return [_pair(row, prompt, chosen, rejected)]


def ultrafeedback(row: Row) -> list[Pair]:
    """Conversations with scores, or Argilla's `instruction`, `chosen_response`, `rejected_response`."""
    if row.get("instruction") is None:
        return messages(row)
    names = ("chosen_response", "rejected_response")
    return [_pair(row, opening_of(text_of(row, "instruction")), *(read_answer(text_of(row, n)) for n in names))]


def conversation(row: Row, name: str) -> list[Pair]:
    """One conversation, whose last message is the answer; there is no other."""
    return [split_last(row, _system(row) + read_messages(row[name], name), name)]


def split_last(row: Row, whole: list[Message], name: str) -> MessagePair:
    """A conversation as its last message, the answer, and what comes before it."""
    if len(whole) == 1:
        raise RowError(f"field {name} is one message, so there is no prompt with an answer")
    if whole[-1]["role"] != "assistant":
        raise RowError(f"field {name} ends with a message of role {whole[-1]['role']}, expected the assistant's answer")
    return MessagePair(whole[:-1], whole[-1:], None, tools=_tools(row))


def alone(row: Row, prompt: list[Message], answer: list[Message], name: str) -> MessagePair:
    """An answer that has no other beside it."""
    refuse_other_role(answer, name)
    return MessagePair(prompt, answer, None, tools=_tools(row))


def opening_of(prompt: Any) -> list[Message]:
    """`prompt` as messages; text is the user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": as_text(prompt, "prompt")}]
    return read_messages(prompt, "prompt")


def read_answer(text: str) -> list[Message]:
    """Text as the assistant's answer."""
    return [{"role": "assistant", "content": text}]


def read_messages(value: Any, name: str) -> list[Message]:
    """Messages as a list. Text is the assistant's answer, except in `prompt` and in conversations."""
    whole = name in ("conversations", "messages")
    if isinstance(value, str) and not whole and name != "prompt":
        return read_answer(as_text(value, name))
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list) or not items:
        expected = "messages" if whole else "text, a message or a list of messages"
        raise RowError(f"field {name} is {kind(value)}, expected {expected}")
    return [_message(item, name) for item in items]


def _pair(row: Row, prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> MessagePair:
    refuse_other_role(chosen, "chosen")
    refuse_other_role(rejected, "rejected")
    return MessagePair(prompt, chosen, rejected, scores_of(row), _tools(row))


def refuse_other_role(answer: list[Message], name: str) -> None:
    """Raises RowError unless an answer begins with the assistant."""
    if not answer or answer[0]["role"] != "assistant":
        found = f"a message of role {answer[0]['role']}" if answer else "nothing"
        raise RowError(f"field {name} has {found} after the prompt, where the assistant's answer should be")


def _system(row: Row) -> list[Message]:
    text = row.get("system")
    return [{"role": "system", "content": as_text(text, "system")}] if text else []


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"field {name} holds {kind(item)} where a message {{role, content}} is expected")
    role = item.get("role") if item.get("role") is not None else item.get("from")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    calls = _calls(item.get("tool_calls"), name)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
        raise RowError(f"field {name} has a message without text in role and content (or from and value)")
    role = _ROLES.get(role.lower(), role.lower())
    if role not in _KNOWN_ROLES:
        raise RowError(
            f"field {name} has a message of the unknown role {shown(role)}; known: {', '.join(_KNOWN_ROLES)}"
        )
    # Beside calls there may be no content; templates that add texts up take none for a mistake.
    message: Message = {"role": role, "content": "" if content is None else as_text(content, name)}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: item[key] for key in _OF_RESULTS if isinstance(item.get(key), str)}
    return message


# ---------------------------------------------------------------------------------------------------------------- tools


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """A message's tool calls as chat templates take them, the arguments as a mapping."""
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) and called(call) for call in calls):
        raise RowError(f"field {name} has tool_calls that are no list of {{function: {{name, arguments}}}}")
    read: list[dict[str, Any]] = _without_nulls(calls)
    for call in read:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):  # OpenAI's way; templates write a mapping as JSON themselves
            with suppress(ValueError, RecursionError):  # then it stays text
                arguments = json.loads(function["arguments"])
                function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return read


def called(call: Mapping[str, Any]) -> str | None:
    """The name of the function that a tool call calls."""
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """The `tools` column: descriptions of functions, or the JSON of such a list."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError(f"field tools is text, but no JSON ({error})") from None
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"field tools is {kind(tools)}, expected a list of descriptions of functions, or its JSON")
    described: list[dict[str, Any]] = _without_nulls(tools)
    return described


def _without_nulls(value: Any) -> Any:
    """A copy without the nulls that a Parquet column's schema fills in where other rows have a key."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
