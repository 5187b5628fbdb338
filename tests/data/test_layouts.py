"""Every known layout, in files as public data sets have them, against a second reading; and rows that are broken."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pyarrow as pa
import pytest
from pyarrow import parquet

from open_po.config import DataConfig
from open_po.data.formats import FORMATS, MessagePair, Pair, RowError, TextPair, row_reader
from tests import tiny

Row = dict[str, Any]
# What a row holds, read another way: prompt, chosen and rejected (None: there is none), and scores.
Reading = tuple[Any, Any, Any, Any]


class Layout(NamedTuple):
    """A layout's public columns, and a second reading of them."""

    rows: list[Row]
    read: Callable[[Row], list[Reading]]
    required: tuple[str, ...]  # columns without which nothing is read
    found_as: str | None = None  # another layout, if its rows cannot be told from that one's


def turns(*texts: str) -> list[dict[str, str]]:
    """The user and the assistant by turns."""
    return [{"content": text, "role": ("user", "assistant")[n % 2]} for n, text in enumerate(texts)]


# ------------------------------------------------------------------------------------------------------------- readings


def as_it_stands(row: Row) -> list[Reading]:
    return [(row["prompt"], row["chosen"], row["rejected"], None)]


def last_turns(*scores: str) -> Callable[[Row], list[Reading]]:
    """Conversations that differ in their last message alone."""

    def read(row: Row) -> list[Reading]:
        found = tuple(row[name] for name in scores) or None
        assert row["chosen"][:-1] == row["rejected"][:-1]
        return [(row["chosen"][:-1], row["chosen"][-1:], row["rejected"][-1:], found)]

    return read


def share_gpt(row: Row) -> list[Reading]:
    def plain(item: dict[str, str]) -> dict[str, str]:
        return {"role": {"human": "user", "gpt": "assistant"}[item["from"]], "content": item["value"]}

    return [([plain(i) for i in row["conversations"]], [plain(row["chosen"])], [plain(row["rejected"])], None)]


def transcripts(row: Row) -> list[Reading]:
    """Split at every answer; what comes before the last one that both have is the prompt."""
    mark = "\n\nAssistant:"
    (*before, good), (*same, bad) = row["chosen"].split(mark), row["rejected"].split(mark)
    assert before == same
    return [(mark.join(before) + mark, good, bad, None)]


def votes(row: Row) -> list[Reading]:
    """By the scores; the labels say the same."""
    asked = "\n\nHuman: {}\n\nAssistant:".format(row["history"])
    (worse, w), (better, b) = sorted([(row["score_A"], "A"), (row["score_B"], "B")])
    assert row["labels"] == (b == "A")
    return [(asked, f" {row[f'human_ref_{b}']}", f" {row[f'human_ref_{w}']}", (better, worse))]


def question_and_two(row: Row) -> list[Reading]:
    return [("Question: " + row["question"] + "\n\nAnswer: ", row["response_j"], row["response_k"], None)]


def elements(html: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(f"<all>{html}</all>"))


def visible(html: str) -> str:
    """All text of a document in which every paragraph, item and block of code stands on the outside or in a list."""
    found: list[str] = []
    for element in elements(html):
        for block in list(element) if element.tag == "ul" else [element]:
            found.append(re.sub(r"</?(?!code\b)\w+[^>]*>", "", ElementTree.tostring(block, encoding="unicode").strip()))
    return "\n\n".join(found).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def of_the_paper(html: str) -> str:
    """What the DPO paper's code keeps: paragraphs without what is marked up in them, and blocks of code."""
    found = []
    for element in elements(html):
        if element.tag == "p":
            found.append((element.text or "") + "".join(child.tail or "" for child in element))
        if element.tag == "pre":
            found += [f"<code>{''.join(code.itertext())}</code>" for code in element.iter("code")]
    return "\n\n".join(found)


def better_than(text: Callable[[str], str], *, ties: bool) -> Callable[[Row], list[Reading]]:
    """All ordered pairs of answers of which the first is the better, or of two equal ones the later."""

    def read(row: Row) -> list[Reading]:
        prompt = f"\n\nHuman: {text(row['question'])}\n\nAssistant:"
        answers = list(enumerate(row["answers"]))
        return [
            (prompt, " " + text(one["text"]), " " + text(two["text"]), (one["pm_score"], two["pm_score"]))
            for (i, one), (j, two) in permutations(answers, 2)
            if one["pm_score"] > two["pm_score"] or (ties and one["pm_score"] == two["pm_score"] and i > j)
        ]

    return read


def best_of(row: Row) -> list[Reading]:
    prompt = f"\n\nHuman: {of_the_paper(row['question'])}\n\nAssistant:"
    highest = max(answer["pm_score"] for answer in row["answers"])
    best = next(answer for answer in row["answers"] if answer["pm_score"] == highest)
    return [(prompt, " " + of_the_paper(best["text"]), None, None)]


def instruction(row: Row) -> list[Reading]:
    scores = (row["chosen_avg_rating"], row["rejected_avg_rating"])
    return [
        (
            [{"role": "user", "content": row["instruction"]}],
            [{"role": "assistant", "content": row["chosen_response"]}],
            [{"role": "assistant", "content": row["rejected_response"]}],
            scores,
        )
    ]


def with_system(row: Row) -> list[Reading]:
    asked = row["question"] if "question" in row else row["prompt"]
    opening = [{"role": role, "content": text} for role, text in (("system", row["system"]), ("user", asked)) if text]
    return [(opening, *([{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")), None)]


def post(info: Row) -> str:
    lines = ["SUBREDDIT: r/" + info["subreddit"], "TITLE: " + info["title"], "POST: " + info["post"], "TL;DR:"]
    return "\n\n".join(lines)


def two_summaries(row: Row) -> list[Reading]:
    texts = [summary["text"] for summary in row["summaries"]]
    chosen = texts.pop(row["choice"])
    return [(post(row["info"]), chosen, texts[0], None)]


def only_answer(name: str) -> Callable[[Row], list[Reading]]:
    def read(row: Row) -> list[Reading]:
        return [(row["prompt"], row[name], None, None)] if row.get("label", True) else []

    return read


# -------------------------------------------------------------------------------------------------------------- layouts

ASKED = "<p>How is <em>this</em> done?</p>\n\n<pre><code>if a &lt; b:\n    pass\n</code></pre>\n"
ANSWERS = [
    ("<p>With <code>x</code> &amp; y, see <a href='u'>here</a>.</p>\n<p>Or not.</p>", 4),
    ("<p>So:</p>\n<ul><li>one</li><li><b>two</b></li></ul>\n<pre><code>1 &gt; 0</code></pre>", 1),
    ("<p>I do not know.</p>", 1),
    ("<p>Why?</p>", -1),
]
SCORED = {
    "qid": 5,
    "question": ASKED,
    "answers": [
        {"answer_id": n, "author": "a", "author_id": n, "pm_score": score, "selected": n == 0, "text": text}
        for n, (text, score) in enumerate(ANSWERS)
    ],
    "date": "2011/02/03",
    "metadata": ["https://s", "https://s/questions"],
}
INFO = {"id": "t3_1", "post": "I slept\nlate {again}.", "title": "Late", "subreddit": "tifu", "site": None}
HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: why?\n\nAssistant:"

LAYOUTS = {
    "text": Layout(
        [{"prompt": "q\n", "chosen": " good", "rejected": "bad"}], as_it_stands, ("prompt", "chosen", "rejected")
    ),
    "mt_pref": Layout(
        [{"prompt": "Translate: casa\nEnglish:", "chosen": "house", "rejected": "home"}],
        as_it_stands,
        ("prompt", "chosen", "rejected"),
        "text",
    ),
    "messages": Layout(
        [
            {"chosen": turns("q", "good"), "rejected": turns("q", "bad")},
            {"chosen": turns("q", "a", "p", "good"), "rejected": turns("q", "a", "p", "bad")},
        ],
        last_turns(),
        ("chosen", "rejected"),
    ),
    "sharegpt": Layout(
        [
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "p"},
                ],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            }
        ],
        share_gpt,
        ("conversations", "chosen", "rejected"),
    ),
    "hh": Layout(
        [{"chosen": f"{HH} Because.", "rejected": f"{HH} Be quiet."}],
        transcripts,
        ("chosen", "rejected"),
    ),
    "shp": Layout(
        [
            {
                "post_id": "p",
                "domain": "askacademia_train",
                "upvote_ratio": 0.99,
                "history": "Which one?",
                "c_root_id_A": "a",
                "c_root_id_B": "b",
                "created_at_utc_A": 1,
                "created_at_utc_B": 2,
                "score_A": scores[0],
                "score_B": scores[1],
                "human_ref_A": "The first.",
                "human_ref_B": "The second.",
                "labels": int(scores[0] > scores[1]),
                "seconds_difference": 1.0,
                "score_ratio": max(scores) / min(scores),
            }
            for scores in ((52, 54), (9, 3))
        ],
        votes,
        ("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    "stack_exchange_paired": Layout(
        [
            {
                "qid": 1,
                "question": "How?",
                "date": "2010/12/11",
                "metadata": ["https://s"],
                "response_j": "So.",
                "response_k": "Don't.",
            }
        ],
        question_and_two,
        ("question", "response_j", "response_k"),
    ),
    "stack_exchange_scored": Layout([SCORED], better_than(visible, ties=False), ("question", "answers")),
    "stack_exchange_dpo_paper": Layout(
        [SCORED], better_than(of_the_paper, ties=True), ("question", "answers"), "stack_exchange_scored"
    ),
    "stack_exchange_sft_paper": Layout([SCORED], best_of, ("question", "answers"), "stack_exchange_scored"),
    "ultrafeedback": Layout(
        [
            {
                "prompt": "q",
                "prompt_id": "0" * 64,
                "chosen": turns("q", "good"),
                "rejected": turns("q", "bad"),
                "messages": turns("q", "good"),
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            }
        ],
        last_turns("score_chosen", "score_rejected"),
        ("chosen", "rejected"),
    ),
    "ultrafeedback, cleaned": Layout(
        [
            {
                "source": "evol_instruct",
                "prompt": "q",
                "chosen": turns("q", "good"),
                "chosen-rating": 4.75,
                "chosen-model": "m",
                "rejected": turns("q", "bad"),
                "rejected-rating": 2,
                "rejected-model": "n",
            }
        ],
        last_turns("chosen-rating", "rejected-rating"),
        ("chosen", "rejected"),
    ),
    "ultrafeedback, instructions": Layout(
        [
            {
                "source": "sharegpt",
                "instruction": "q",
                "chosen_response": "good",
                "rejected_response": "bad",
                "chosen_avg_rating": 4.5,
                "rejected_avg_rating": 4.25,
                "chosen_model": "m",
            }
        ],
        instruction,
        ("chosen_response", "rejected_response"),
    ),
    "tulu3": Layout(
        [
            {
                "id": "1",
                "prompt": "p",
                "chosen": turns("q", "a", "p", "good"),
                "rejected": turns("q", "a", "p", "bad"),
                "source": "ai2",
            }
        ],
        last_turns(),
        ("chosen", "rejected"),
    ),
    "olmo2": Layout(
        [
            {
                "prompt": "q",
                "chosen": turns("q", "good"),
                "rejected": turns("q", "bad"),
                "chosen_rating": 4.0,
                "rejected_rating": 3.5,
                "chosen_model": "m",
                "rejected_model": "n",
                "source": "ai2",
                "id": "1",
            }
        ],
        last_turns("chosen_rating", "rejected_rating"),
        ("chosen", "rejected"),
        "tulu3",
    ),
    "orca_dpo": Layout(
        [
            {"system": "Be short.", "question": "Why?", "chosen": "So.", "rejected": "No."},
            {"system": "", "question": "Why?", "chosen": "So.", "rejected": "No."},
        ],
        with_system,
        ("question", "chosen", "rejected"),
    ),
    "orca_dpo, truthy": Layout(
        [
            {
                "id": "1",
                "source": "truthy",
                "system": "You are honest.",
                "prompt": "Why?",
                "chosen": "So.",
                "rejected": "No.",
            }
        ],
        with_system,
        ("prompt", "chosen", "rejected"),
    ),
    "tldr_comparisons": Layout(
        [
            {
                "info": INFO,
                "summaries": [
                    {"text": " First.", "policy": "sup2", "note": "ok"},
                    {"text": " Second.", "policy": "ref", "note": None},
                ],
                "choice": choice,
                "worker": "w",
                "batch": "batch3",
                "split": "train",
                "extra": {"confidence": None},
            }
            for choice in (0, 1)
        ],
        two_summaries,
        ("info", "summaries", "choice"),
    ),
    "tldr_sft": Layout(
        [{"id": "1", "subreddit": "tifu", "title": "Late", "post": "I slept.", "summary": "Slept."}],
        lambda row: [(post(row), " " + row["summary"], None, None)],
        ("subreddit", "title", "post", "summary"),
    ),
    "kto": Layout(
        [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)],
        only_answer("completion"),
        ("completion", "label"),
    ),
    "kto, messages": Layout(
        [{"prompt": turns("q"), "completion": turns("q", "a")[1:], "label": label} for label in (True, False)],
        only_answer("completion"),
        ("completion", "label"),
    ),
    "sft, completion": Layout([{"prompt": "q", "completion": "a"}], only_answer("completion"), ("completion",)),
    "sft, response": Layout([{"prompt": "q", "response": "a"}], only_answer("response"), ("response",)),
    "sft, chosen": Layout([{"prompt": "q", "chosen": "a"}], only_answer("chosen"), ("chosen",)),
    "sft, messages": Layout(
        [{"id": "1", "messages": turns("q", "a", "p", "good"), "source": "s"}],
        lambda row: [(row["messages"][:-1], row["messages"][-1:], None, None)],
        ("messages",),
    ),
}


def name_of(layout: str) -> str:
    return layout.partition(",")[0]


def plain(pair: Pair) -> Reading:
    return pair.prompt, pair.chosen, pair.rejected, pair.scores


def test_every_layout_is_here() -> None:
    assert {name_of(layout) for layout in LAYOUTS} == set(FORMATS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_as_a_second_reading_does(name: str, kind: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        tiny.write_jsonl(path, layout.rows)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        parquet.write_table(pa.Table.from_pylist(layout.rows), path)
        rows = parquet.read_table(path).to_pylist()
    forced, free = (pickle.loads(pickle.dumps(row_reader(form, None))) for form in (name_of(name), None))
    assert len(rows) == len(layout.rows)
    for row, written in zip(rows, layout.rows, strict=True):
        expected = sorted(layout.read(written), key=str)
        assert sorted(map(plain, forced(row)), key=str) == expected
        assert free.recognise(row) == (layout.found_as or name_of(name))
        if layout.found_as is None:
            assert free(row) == forced(row)


def test_all_pairs_of_a_ranked_list_are_there() -> None:
    """Six of four answers, one of them between equals."""
    assert [
        len(row_reader(f"stack_exchange_{name}", None)(SCORED)) for name in ("scored", "dpo_paper", "sft_paper")
    ] == [5, 6, 1]


def test_comparisons_of_newspaper_articles_give_no_pair() -> None:
    (row, _) = deepcopy(LAYOUTS["tldr_comparisons"].rows)
    row["info"] = {"id": "1", "post": None, "title": "t", "subreddit": None, "site": "cnn", "article": "News."}
    assert row_reader(None, None)(row) == []


@pytest.mark.parametrize(
    "text", ["no tags, a < b & c > d", "<p>open", "<pre><code>x", "", "<p></p>", "<br>a<br/>b", "</p>x"]
)
def test_html_that_is_none_or_broken_is_read_anyway(text: str) -> None:
    row = deepcopy(SCORED) | {"question": text}
    row["answers"][0]["text"] = text
    seen = re.sub(r"</?\w+/?>", " ", text)
    for pair in row_reader("stack_exchange_scored", None)(row)[:1]:
        assert all(word in pair.prompt for word in seen.split())
    row_reader("stack_exchange_dpo_paper", None)(row)


def test_a_declaration_that_html_does_not_have_is_an_error() -> None:
    for name in ("scored", "dpo_paper", "sft_paper"):
        with pytest.raises(RowError, match="has text that is no HTML"):
            row_reader(f"stack_exchange_{name}", None)(SCORED | {"question": "<![x[y"})


# -------------------------------------------------------------------------------------------------------- broken rows

BIG = "x" * 10 * 2**20


def broken(layout: Layout) -> Iterator[tuple[str, Row]]:
    """A column, and a row in which it is missing, null or of a wrong type."""
    for row in layout.rows[:1]:
        for name in layout.required:
            yield name, {key: value for key, value in row.items() if key != name}
            yield name, row | {name: None}
            for wrong in (5, [], {}, [5], [[]], 2.5, [{"role": "user"}], [{"text": 5, "pm_score": "x"}] * 2):
                yield name, row | {name: wrong}


# What may be asked for where a column of another name would do as well.
OTHER_NAMES = {"sft": ("completion", "response", "messages"), "orca_dpo": ("question",)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_broken_rows_are_errors_that_name_the_field(name: str) -> None:
    read, free = row_reader(name_of(name), None), row_reader(None, None)
    for field, row in broken(LAYOUTS[name]):
        with pytest.raises(RowError) as caught:
            read(row)
        said = str(caught.value)
        names = {field, *OTHER_NAMES.get(name_of(name), ())}
        assert "\n" not in said
        assert any(word in said for word in names), said
        free_error = fault_of(free, row)  # by its columns it may be something else, but no more than that happens
        assert free_error is None or "\n" not in free_error


def fault_of(read: Callable[[Row], object], row: Row) -> str | None:
    try:
        read(row)
    except RowError as error:
        return str(error)
    return None


def big_rows(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """`value` with one of its texts 10 MB long, for each of them."""
    if isinstance(value, str):
        yield path, BIG
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            for inner, changed in big_rows(item, path or str(key)):
                copy = value.copy()
                copy[key] = changed
                yield inner, copy


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_of_10_mb_is_an_error_wherever_it_is_read(name: str) -> None:
    """Of columns that are not read, any length is taken."""
    read = row_reader(name_of(name), None)
    for row in LAYOUTS[name].rows[:1]:
        expected, refused = read(row), 0
        for field, big in big_rows(row):
            fault = fault_of(read, big)
            if fault is None:
                assert read(big) == expected
            else:
                refused += 1
                assert field in fault or "chosen and rejected" in fault
                assert len(fault) < 500
                assert f"{len(BIG):,} bytes" in fault or "role" in fault or "share" in fault
        assert refused


ONE_TURN: list[tuple[str, Row, str]] = [
    ("messages", {"chosen": turns("q"), "rejected": turns("q")}, "chosen and rejected share no first message"),
    ("sharegpt", {"conversations": [], "chosen": "a", "rejected": "b"}, "field conversations is an empty list"),
    ("hh", {"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, "are not transcripts that share turns"),
    ("tulu3", {"prompt": "q", "chosen": turns("q"), "rejected": turns("q", "b")}, "share no first message"),
    ("ultrafeedback", {"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q")}, "share no first message"),
    ("sft", {"messages": turns("q")}, "field messages is one message, so there is no prompt with an answer"),
    ("sft", {"messages": turns("q", "a", "p")}, "field messages ends with a message of role user"),
    ("sft", {"prompt": "q", "completion": turns("q")[:1] * 2}, "field completion ends with a message of role user"),
    ("kto", {"prompt": "q", "completion": turns("q"), "label": True}, "field completion is one message"),
    ("stack_exchange_scored", SCORED | {"answers": []}, "field answers is an empty list"),
    ("tldr_comparisons", {"info": INFO, "summaries": [{"text": "a"}], "choice": 0}, "field summaries has 1 of them"),
    (
        "tldr_comparisons",
        {"info": INFO, "summaries": [{"text": "a"}] * 2, "choice": 2},
        "field choice is 2, expected 0 or 1",
    ),
    ("shp", LAYOUTS["shp"].rows[0] | {"labels": "A"}, "field labels is 'A', expected 0 or 1"),
    ("shp", LAYOUTS["shp"].rows[0] | {"score_A": "many"}, "field score_A is 'many', expected a number"),
    ("kto", {"prompt": "q", "completion": "a", "label": "good"}, "field label is 'good', expected true or false"),
]


@pytest.mark.parametrize(("name", "row", "message"), ONE_TURN)
def test_rows_with_too_little_in_them(name: str, row: Row, message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        row_reader(name, None)(row)


# --------------------------------------------------------------------------------------------------------- recognition

UNKNOWN: dict[str, tuple[Row, str]] = {
    "one column of a layout is missing": (
        {name: value for name, value in LAYOUTS["shp"].rows[0].items() if name != "human_ref_B"},
        "field human_ref_B is missing or null; fields: ",
    ),
    "one of two responses": (
        {"question": "q", "response_j": "a", "response_k": None},
        "field response_k is missing or null; fields: question, response_j; did you mean response_j by it?; read as "
        "stack_exchange_paired",
    ),
    "two layouts": (
        {**LAYOUTS["stack_exchange_paired"].rows[0], "answers": SCORED["answers"]},
        "has the columns of stack_exchange_paired and of stack_exchange_scored; set format to the one it is",
    ),
    "two layouts of single answers": (
        {**LAYOUTS["tldr_sft"].rows[0], "prompt": "q", "completion": "a"},
        "has the columns of tldr_sft and of sft; set format",
    ),
    "none": ({"text": "q"}, "columns text are of no known layout; set format, to one of text, messages, "),
    "nothing": ({}, "columns (none) are of no known layout"),
    "a prompt alone": ({"prompt": "q"}, "field chosen is missing or null; fields: prompt"),
    "a slip": (
        {"prompt": "q", "chosen": "a", "rejcted": "b"},
        "field rejected is missing or null; fields: prompt, chosen, rejcted; did you mean rejcted by it?",
    ),
    "another name": ({"prompt": "q", "chosen": "a", "rejected_response": "b"}, "field rejected is missing or null"),
    "a null": (
        {"prompt": "q", "chosen": "a", "rejected": None},
        "field rejected is missing or null; fields: prompt, chosen",
    ),
    "chosen alone": ({"chosen": "a"}, "field rejected is missing or null; fields: chosen"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_rows_of_no_certain_layout(name: str) -> None:
    row, message = UNKNOWN[name]
    for read in (row_reader(None, None), row_reader(None, "{prompt}"), row_reader(None, None).recognise):
        with pytest.raises(RowError) as caught:
            read(row)
        assert str(caught.value).startswith(message)


def test_a_layout_is_found_whatever_stands_beside_it_as_null() -> None:
    """Columns of all layouts in one schema, as where files were put together."""
    everything = {name: None for layout in LAYOUTS.values() for row in layout.rows for name in row}
    for name, layout in LAYOUTS.items():
        if name != "sft, chosen":  # a rejected response that is null is a fault
            for row in layout.rows:
                assert row_reader(None, None).recognise(everything | row) == (layout.found_as or name_of(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ultrafeedbck",
            "format 'ultrafeedbck' is unknown; did you mean ultrafeedback? known: text, messages, sharegpt, ",
        ),
        ("x", "format 'x' is unknown; known: text, "),
        ("no_module:f", "format no_module:f: cannot be imported (No module named 'no_module')"),
        ("math:f", "format math:f: cannot be imported (module 'math' has no attribute 'f')"),
        ("math:pi", "format math:pi: is float, expected a function of a row"),
    ],
)
def test_formats_that_there_are_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        row_reader(name, None)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- prompt templates

SUM = (
    "<|im_start|>user\nSUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR: <|im_end|> <|im_start|>assistant "
)


def test_a_published_prompt_is_written_as_published() -> None:
    for name in ("tldr_comparisons", "tldr_sft"):
        for row in LAYOUTS[name].rows:
            info = row.get("info", row)
            (pair,) = row_reader(None, SUM)(row)
            assert pair.prompt == (
                f"<|im_start|>user\nSUBREDDIT: r/{info['subreddit']}\nTITLE: {info['title']}\nPOST: {info['post']}\n"
                "TL;DR: <|im_end|> <|im_start|>assistant "
            )
            texts = [summary["text"] for summary in row["summaries"]] if "summaries" in row else [row["summary"], None]
            assert {pair.chosen, pair.rejected} == set(texts)
            assert row_reader(None, SUM.replace("{", "{info."))(row) == [pair] if "info" in row else True


def test_templates_name_columns_and_make_text_of_messages() -> None:
    row = LAYOUTS["ultrafeedback"].rows[0]
    (pair,) = row_reader(None, "{{{prompt}}} {score_chosen}\n")(row)
    assert pair == TextPair("{q} 8.5\n", "good", "bad", (8.5, 7.0))
    (asked,) = row_reader("stack_exchange_paired", "Q: {question} A: ")(LAYOUTS["stack_exchange_paired"].rows[0])
    assert asked == TextPair("Q: How? A: ", "So.", "Don't.")
    for found in row_reader(None, "{question}")(SCORED):
        assert found.prompt == visible(ASKED)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            "{histroy}",
            LAYOUTS["shp"].rows[0],
            "prompt_template has {histroy}, but the row has no histroy; there is: post_id, ",
        ),
        ("{info.pst}", LAYOUTS["tldr_comparisons"].rows[0], "has no pst; there is: id, post, title, subreddit, site"),
        ("{chosen.x}", LAYOUTS["text"].rows[0], "prompt_template has {chosen.x}, but the row has no x; there is: text"),
        (
            "{chosen}",
            LAYOUTS["messages"].rows[0],
            "prompt_template has {chosen}, which is a list in this row and no text",
        ),
        ("{info.site}", LAYOUTS["tldr_comparisons"].rows[0], "which is null in this row and no text"),
        (
            "{id}",
            {"id": "1", "prompt": "q", "chosen": turns("q", "a", "p", "b")[1:], "rejected": turns("q", "c")[1:]},
            "field chosen is more than one text, and prompt_template makes rows of text; leave one out",
        ),
    ],
)
def test_rows_that_a_template_cannot_be_filled_from(template: str, row: Row, message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        row_reader(None, template)(row)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("my_prompt.txt", "prompt_template 'my_prompt.txt' names no column; write one as {column}"),
        ("{a", "prompt_template: expected '}' before end of string; a column stands in {braces}"),
        ("{}", "prompt_template: a column stands in braces by its name alone, got '{}'"),
        ("{a!r}", "prompt_template: a column stands in braces by its name alone"),
        ("{a:>3}", "prompt_template: a column stands in braces by its name alone"),
    ],
)
def test_templates_that_are_none(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        row_reader(None, template)


def test_parts_are_read_as_the_run_says() -> None:
    """Unless they say it themselves, training and held-out data alike, in either form."""
    mixture = [{"dataset": "a"}, {"dataset": "b", "format": "hh"}, {"dataset": "c", "prompt_template": "{c}"}]
    for given in ({"mixture": mixture}, {"mixer_list": ["a", "1.0"]}):
        fields: dict[str, Any] = {**given, **{f"eval_{name}": value for name, value in given.items()}}
        config = DataConfig(**fields, format="shp", prompt_template="{history}")
        for parts in (config.training_mixture, config.held_out_mixture):
            found = [(part.format, part.prompt_template) for part in parts]
            assert found == [("shp", "{history}"), ("hh", "{history}"), ("shp", "{c}")][: len(parts)]
        plain = DataConfig(**fields).training_mixture[0]
        assert (plain.format, plain.prompt_template) == (None, None)


# ---------------------------------------------------------------------------------------------------------------- tools

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lisboa"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


def test_tool_calls_are_kept() -> None:
    """Arguments as a mapping, whichever way they were written; nulls that a schema fills in are dropped."""
    written = deepcopy(CALL)
    written["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])
    filled = deepcopy(CALL) | {"index": None}
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    read = asks | {"content": ""}
    result = {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"}
    for calls in ([CALL], [written], [filled]):
        row = {
            "prompt": [*turns("q"), asks | {"tool_calls": calls}, result],
            "chosen": [*turns("", "It rains.")[1:]],
            "rejected": [asks | {"tool_calls": calls}],
            "tools": [TOOL],
        }
        expected = MessagePair([*turns("q"), read, result], turns("", "It rains.")[1:], [read], tools=[TOOL])
        assert row_reader(None, None)(row) == [expected]
        assert row_reader(None, None)(row | {"tools": json.dumps([TOOL])}) == [expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "get_weather"}, "field tools is text, but no JSON"),
        ({"tools": {"name": "x"}}, "field tools is dict, expected a list of descriptions of functions, or its JSON"),
        (
            {"chosen": [{"role": "assistant", "content": None, "tool_calls": ["f"]}]},
            "field chosen has tool_calls that are no list of {function: {name, arguments}}",
        ),
        (
            {"chosen": [{"role": "assistant", "content": None, "tool_calls": []}]},
            "field chosen has a message without text in role and content",
        ),
    ],
)
def test_tools_that_are_none(row: Row, message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        row_reader(None, None)({"prompt": turns("q"), "chosen": "a", "rejected": "b", **row})
