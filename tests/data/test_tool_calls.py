"""Tool calls and tools in a chat template: they reach it, and a template that leaves calls out is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from open_po.data.chat_templates import chat_template
from open_po.data.formats import MessagePair, RowError, row_reader
from open_po.data.tokenization import LeftOut, Truncation, tokenise
from tests import tiny

TEMPLATE = (
    "{% if tools %}[tools {{ tools | tojson }}]\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}"
    "[call {{ f.name }} {{ f.arguments | tojson }}]{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a + b"}}]
WHOLE = Truncation(10_000, None)


def calls(name: str, **arguments: int) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


ROW = {
    "prompt": [{"role": "user", "content": "3 and 4"}],
    "chosen": [calls("add", a=3, b=4), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "seven"}],
    "rejected": [calls("add", a=4, b=4)],
    "tools": TOOLS,
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_they_are_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = row_reader(None, None)(ROW)
    ids, _ = tokenise(pair, tokenizer, WHOLE)
    assert tokenizer.decode(ids.prompt_ids) == f"[tools {json.dumps(TOOLS)}]\nuser: 3 and 4\nassistant: "
    called = '[call add {"a": 3, "b": 4}]</s>\ntool: 7\nassistant: seven</s>\n'
    assert tokenizer.decode(ids.chosen_ids) == called
    assert tokenizer.decode(ids.rejected_ids) == '[call add {"a": 4, "b": 4}]</s>\n'


def test_without_tools_nothing_is_said_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = row_reader(None, None)({**ROW, "tools": None})
    ids, _ = tokenise(pair, tokenizer, WHOLE)
    assert tokenizer.decode(ids.prompt_ids).startswith("user: 3 and 4\nassistant: ")


def test_a_template_that_leaves_calls_out_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = chat_template("tulu")
    for content in ("let me see", "let me add", "", None):  # which may have the called function's name in it
        row = {**ROW, "rejected": "no", "chosen": [calls("add", a=3) | {"content": content}]}
        (pair,) = row_reader(None, None)(row)
        with pytest.raises(RowError, match="has tool calls, which the chat template leaves out; set another chat_temp"):
            tokenise(pair, tokenizer, WHOLE)


def test_an_answer_that_is_a_call_alone_is_not_empty(tokenizer: PreTrainedTokenizerFast) -> None:
    question = [{"role": "user", "content": "q"}]
    call = [calls("add") | {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]}]
    tokenise(MessagePair(question, call, [{"role": "assistant", "content": "b"}]), tokenizer, WHOLE)
    with pytest.raises(LeftOut, match="empty response"):
        tokenise(MessagePair(question, call, [{"role": "assistant", "content": " "}]), tokenizer, WHOLE)
