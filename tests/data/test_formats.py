"""Every layout a row may have, read into one, and what is said of rows in none of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from open_po.config import parse_mixture
from open_po.data import load_pairs
from open_po.data.chat_templates import chat_template
from open_po.data.formats import MessagePair, RowError, TextPair, common_prefix_length, row_reader
from open_po.data.tokenization import Truncation
from tests import tiny
from tests.messages import assistant, system, user


def human(content: str) -> dict[str, str]:
    return {"from": "human", "value": content}


def gpt(content: str) -> dict[str, str]:
    return {"from": "gpt", "value": content}


ONE_TURN = MessagePair([user("q")], [assistant("good")], [assistant("bad")])
OPENING = [system("s"), user("q1"), assistant("a1"), user("q2")]
TWO_TURNS = MessagePair(OPENING, [assistant("good")], [assistant("bad")])

# name -> (row, what it holds)
ROWS: dict[str, tuple[dict[str, Any], TextPair | MessagePair]] = {
    "text": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, TextPair("q", "good", "bad")),
    "text with an empty prompt": ({"prompt": "", "chosen": "g", "rejected": "b"}, TextPair("", "g", "b")),
    "text is not stripped": ({"prompt": " q\n", "chosen": " g ", "rejected": "\tb"}, TextPair(" q\n", " g ", "\tb")),
    "text, with other fields": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "system": None, "conversations": None, "score": 3},
        TextPair("q", "good", "bad"),
    ),
    "message lists": (
        {"prompt": OPENING, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        TWO_TURNS,
    ),
    "single messages": ({"prompt": user("q"), "chosen": assistant("good"), "rejected": assistant("bad")}, ONE_TURN),
    "message list prompt, text answers": ({"prompt": [user("q")], "chosen": "good", "rejected": "bad"}, ONE_TURN),
    "text prompt, message answers": (
        {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        ONE_TURN,
    ),
    "text prompt, one message each": (
        {"prompt": "q", "chosen": assistant("good"), "rejected": assistant("bad")},
        ONE_TURN,
    ),
    "answers of more than one message": (
        {
            "prompt": [user("q")],
            "chosen": [assistant("call"), {"role": "tool", "content": "7"}, assistant("good")],
            "rejected": [assistant("bad")],
        },
        MessagePair(
            [user("q")], [assistant("call"), {"role": "tool", "content": "7"}, assistant("good")], [assistant("bad")]
        ),
    ),
    "one answer text, the other a message": (
        {"prompt": [user("q")], "chosen": "good", "rejected": [assistant("bad")]},
        ONE_TURN,
    ),
    "text prompt, answers that begin alike": (
        {
            "prompt": "q",
            "chosen": [assistant("same"), user("more"), assistant("good")],
            "rejected": [assistant("same"), user("more"), assistant("bad")],
        },
        MessagePair(
            [user("q")],
            [assistant("same"), user("more"), assistant("good")],
            [assistant("same"), user("more"), assistant("bad")],
        ),
    ),
    "conversations": (
        {"chosen": [*OPENING, assistant("good")], "rejected": [*OPENING, assistant("bad")]},
        TWO_TURNS,
    ),
    "conversations of different lengths": (
        {
            "chosen": [user("q"), assistant("good"), user("thanks"), assistant("bye")],
            "rejected": [user("q"), assistant("bad")],
        },
        MessagePair([user("q")], [assistant("good"), user("thanks"), assistant("bye")], [assistant("bad")]),
    ),
    "conversations that are the same": (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
        MessagePair([user("q")], [assistant("a")], [assistant("a")]),
    ),
    "UltraFeedback": (
        {
            "prompt": "q",
            "prompt_id": "0" * 64,
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
            "messages": [user("q"), assistant("good")],
            "score_chosen": 8.5,
            "score_rejected": 7.0,
        },
        replace(ONE_TURN, scores=(8.5, 7.0)),
    ),
    "conversations that repeat the prompt's messages": (
        {
            "prompt": [system("s"), user("q")],
            "chosen": [system("s"), user("q"), assistant("good")],
            "rejected": [system("s"), user("q"), assistant("bad")],
        },
        MessagePair([system("s"), user("q")], [assistant("good")], [assistant("bad")]),
    ),
    "HH": (
        {
            "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: good",
            "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: bad",
        },
        TextPair("\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:", " good", " bad"),
    ),
    "HH, answers that begin alike": (
        {"chosen": "\n\nHuman: q\n\nAssistant: I see", "rejected": "\n\nHuman: q\n\nAssistant: I know"},
        TextPair("\n\nHuman: q\n\nAssistant:", " I see", " I know"),
    ),
    "HH, one goes on": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: good\n\nHuman: x\n\nAssistant: y",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        TextPair("\n\nHuman: q\n\nAssistant:", " good\n\nHuman: x\n\nAssistant: y", " bad"),
    ),
    "HH, an empty answer": (
        {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        TextPair("\n\nHuman: q\n\nAssistant:", "", " bad"),
    ),
    "ShareGPT": (
        {"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")},
        ONE_TURN,
    ),
    "ShareGPT with a system text, lists": (
        {
            "conversations": [human("q1"), gpt("a1"), human("q2")],
            "chosen": [gpt("good")],
            "rejected": [gpt("bad")],
            "system": "s",
        },
        TWO_TURNS,
    ),
    "ShareGPT with an empty system text, text answers": (
        {"conversations": [human("q")], "chosen": "good", "rejected": "bad", "system": ""},
        ONE_TURN,
    ),
    "ShareGPT with user and assistant": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q1"},
                {"from": "assistant", "value": "a1"},
                {"from": "user", "value": "q2"},
            ],
            "chosen": {"from": "assistant", "value": "good"},
            "rejected": {"from": "assistant", "value": "bad"},
        },
        TWO_TURNS,
    ),
    "ShareGPT with role and content": (
        {"conversations": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")},
        ONE_TURN,
    ),
    "ShareGPT with a tool": (
        {
            "conversations": [
                human("q"),
                {"from": "function_call", "value": "f"},
                {"from": "observation", "value": "7"},
            ],
            "chosen": gpt("good"),
            "rejected": gpt("bad"),
        },
        MessagePair(
            [user("q"), assistant("f"), {"role": "tool", "content": "7"}], [assistant("good")], [assistant("bad")]
        ),
    ),
    "messages with keys of both kinds, as a column's schema fills them in": (
        {
            "prompt": None,
            "conversations": [{"from": "human", "value": "q", "role": None, "content": None, "weight": None}],
            "chosen": {"from": None, "value": None, "role": "assistant", "content": "good"},
            "rejected": {"from": "gpt", "value": "bad", "role": None, "content": None},
        },
        ONE_TURN,
    ),
    "messages with more keys": (
        {
            "prompt": [{"role": "user", "content": "q", "name": "x", "tool_calls": None}],
            "chosen": [{"role": "assistant", "content": "good", "name": None, "tool_calls": []}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        ONE_TURN,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_layouts(name: str) -> None:
    row, expected = ROWS[name]
    assert row_reader(None, None)(row) == [expected]


MESSAGE = "a message without text in role and content (or from and value)"
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": (
        {"prompt": "q", "chosen": "a", "rejected": None, "score": 0},
        "field rejected is missing or null; fields: prompt, chosen, score",
    ),
    "a name that is close": (
        {"prompt": "q", "choosen": "a", "rejected": "b"},
        "field chosen is missing or null; fields: prompt, choosen, rejected; did you mean choosen by it?",
    ),
    "no chosen": ({"question": "q", "rejected": "b"}, "field chosen is missing or null; fields: question, rejected"),
    "no prompt, no transcripts": (
        {"chosen": "a", "rejected": "b"},
        "field prompt is missing or null, and chosen and rejected are not transcripts that share turns up to "
        "'Assistant:'",
    ),
    "transcripts that share no turn": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
        "field prompt is missing or null, and chosen and rejected are not transcripts that share turns up to "
        "'Assistant:'",
    ),
    "no prompt, only answers": (
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "chosen and rejected share no first message, so there is no prompt",
    ),
    "conversations with different prompts": (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        "chosen and rejected share no first message, so there is no prompt",
    ),
    "a text prompt beside conversations with different prompts": (
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        "chosen and rejected share no first message, so there is no prompt",
    ),
    "conversations that part at the user": (
        {
            "chosen": [user("q"), assistant("a"), user("x"), assistant("good")],
            "rejected": [user("q"), assistant("a"), user("y"), assistant("bad")],
        },
        "field chosen has a message of role user after the prompt, where the assistant's answer should be",
    ),
    "conversations that do not begin with the prompt": (
        {
            "prompt": [user("q")],
            "chosen": [system("s"), user("q"), assistant("a")],
            "rejected": [system("s"), user("q"), assistant("b")],
        },
        "field chosen has a message of role system after the prompt, where the assistant's answer should be",
    ),
    "a conversation beside an answer": (
        {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": [assistant("b")]},
        "field chosen has a message of role user after the prompt, where the assistant's answer should be",
    ),
    "conversations without an answer": (
        {"prompt": [user("q")], "chosen": [user("q")], "rejected": [user("q")]},
        "field chosen has nothing after the prompt, where the assistant's answer should be",
    ),
    "the user as the answer": (
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [user("b")]},
        "field rejected has a message of role user after the prompt, where the assistant's answer should be",
    ),
    "ShareGPT with the human as the answer": (
        {"conversations": [human("q")], "chosen": human("a"), "rejected": gpt("b")},
        "field chosen has a message of role user after the prompt, where the assistant's answer should be",
    ),
    "a number": (
        {"prompt": "q", "chosen": 5, "rejected": 6},
        "field chosen is int, expected text, a message or a list of messages",
    ),
    "a number as the prompt": (
        {"prompt": 5, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "field prompt is int, expected text, a message or a list of messages",
    ),
    "a number as the prompt of text": (
        {"prompt": 5, "chosen": "a", "rejected": "b"},
        "field prompt is int, expected text, a message or a list of messages",
    ),
    "no messages": (
        {"prompt": "q", "chosen": [], "rejected": [assistant("b")]},
        "field chosen is an empty list, expected text, a message or a list of messages",
    ),
    "text as conversations": (
        {"conversations": "q", "chosen": "a", "rejected": "b"},
        "field conversations is text, expected messages",
    ),
    "text in a list": (
        {"prompt": ["q"], "chosen": "a", "rejected": "b"},
        "field prompt holds text where a message {role, content} is expected",
    ),
    "a list in a list": (
        {"prompt": [[user("q")]], "chosen": "a", "rejected": "b"},
        "field prompt holds a list where a message {role, content} is expected",
    ),
    "a message without content": (
        {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"},
        f"prompt has {MESSAGE}",
    ),
    "a message without a role": ({"prompt": "q", "chosen": {"content": "a"}, "rejected": "b"}, f"chosen has {MESSAGE}"),
    "content in parts": (
        {"prompt": "q", "chosen": assistant("a"), "rejected": {"role": "assistant", "content": [{"text": "b"}]}},
        f"rejected has {MESSAGE}",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_unreadable_rows(name: str) -> None:
    row, message = BAD_ROWS[name]
    with pytest.raises(RowError) as caught:
        row_reader(None, None)(row)
    assert str(caught.value) in (message, f"field {message}")


@given(st.lists(st.lists(st.integers(0, 1)), min_size=1, max_size=4))
def test_common_prefix_length(sequences: list[list[int]]) -> None:
    length = common_prefix_length(*sequences)
    assert all(sequence[:length] == sequences[0][:length] for sequence in sequences)
    longer = [tuple(sequence[: length + 1]) for sequence in sequences]
    assert len(set(longer)) > 1 or min(map(len, sequences)) == length


DEEP = "[" * 100_000 + "]" * 100_000


def test_numbers_and_json_of_any_size_are_faults_of_a_row_or_left_alone() -> None:
    read, row = row_reader(None, None), {"prompt": [user("q")], "chosen": "a", "rejected": "b"}
    (pair,) = read(row | {"score_chosen": 10**400, "score_rejected": 1})
    assert pair.scores is None, "as with other scores that are no number"
    with pytest.raises(RowError, match="field tools is text, but no JSON"):
        read(row | {"tools": DEEP})
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}
    (pair,) = read(row | {"chosen": [call]})
    assert pair.chosen == [call | {"content": ""}], "text that is no JSON stays text"


def test_bad_scores_do_not_stop_a_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 10**400, "score_rejected": 1}]
    assert len(_texts(_write(tmp_path / "data.jsonl", rows), tokenizer)) == 1


def test_why_a_labelled_row_gives_no_pair(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "q", "completion": f"a{label}", "label": label} for label in (True, False)]
    path = _write(tmp_path / "data.jsonl", rows)
    pairs = load_pairs(parse_mixture([str(path), "1.0"], ["train"]), tokenizer, Truncation(10_000, None))
    assert [(reason, found.count) for reason, found in pairs.left_out.items()] == [
        ("label is false: no good answer, and gives no pair", 1)
    ]


# ---------------------------------------------------------------------------------------------------------- from files


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer", bos_token=None)
    tokenizer.chat_template = chat_template("tulu")
    return tokenizer


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        return tiny.write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def _texts(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str, str]]:
    pairs = load_pairs(parse_mixture([str(path), "1.0"], ["train"]), tokenizer, Truncation(10_000, None))
    assert not pairs.left_out
    return [
        (tokenizer.decode(pair.prompt_ids), tokenizer.decode(pair.chosen_ids), tokenizer.decode(pair.rejected_ids))
        for pair in (pairs[index] for index in range(len(pairs)))
    ]


# Rows whose values are easily taken for something else than text.
TRICKY = [
    {"prompt": "1", "chosen": "2024-01-01", "rejected": "2024-01-01T10:00:00"},
    {"prompt": "02", "chosen": "2024-01-02", "rejected": "2024-01-02T10:00:00"},
    {"prompt": "3.10", "chosen": "2024-01-03", "rejected": "2024-01-03T10:00:00"},
]
TRICKIER = [
    {"prompt": "true", "chosen": '{"a": 1}', "rejected": "NA"},
    {"prompt": "1e5", "chosen": "null", "rejected": "None"},
    {"prompt": 'say "hi", please', "chosen": "two\nlines", "rejected": "a\r\nb"},
    {"prompt": "caf\u00e9 \u2028 \x85 \U0001f600", "chosen": "\u3000x", "rejected": "nan"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("rows", [TRICKY, TRICKIER], ids=["dates and numbers", "words of other types"])
def test_text_stays_text(
    kind: str, rows: list[dict[str, str]], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = _write(tmp_path / f"data.{kind}", rows)
    assert _texts(path, tokenizer) == [(r["prompt"], r["chosen"] + "</s>", r["rejected"] + "</s>") for r in rows]


def _renders(pair: TextPair | MessagePair) -> bool:
    """Whether the tulu template knows the roles, and there is one answer on either side to compare."""
    if isinstance(pair, TextPair) or pair.chosen == pair.rejected:
        return False
    roles = {message["role"] for message in pair.prompt}
    return roles <= {"system", "user", "assistant"} and len(pair.chosen) == len(pair.rejected) == 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", [name for name, (_, pair) in ROWS.items() if _renders(pair)])
def test_message_layouts_from_files(kind: str, name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two rows, the second with a key more in its messages: Parquet fills it with null in the first."""
    row, pair = ROWS[name]
    assert isinstance(pair, MessagePair)
    path = _write(tmp_path / f"data.{kind}", [row, {key: _with_name(value) for key, value in row.items()}])
    prompt = "".join(f"<|{m['role']}|>\n{m['content']}{'</s>' * (m['role'] == 'assistant')}\n" for m in pair.prompt)
    assert _texts(path, tokenizer) == [(prompt + "<|assistant|>\n", "good</s>", "bad</s>")] * 2


def _with_name(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_name(item) for item in value]
    return value | {"name": "n"} if isinstance(value, dict) else value
