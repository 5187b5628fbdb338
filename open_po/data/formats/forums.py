"""Layouts of questions with answers that people voted on: Stanford Human Preferences and Stack Exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import Any

from open_po.data.formats.fields import as_text, choice_of, items_of, number_of, text_of
from open_po.data.formats.html import all_text, paragraphs_and_code
from open_po.data.formats.pairs import Pair, Row, TextPair
from open_po.data.formats.template import Template

SHP_PROMPT = Template("\n\nHuman: {history}\n\nAssistant:")
QUESTION_PROMPT = Template("\n\nHuman: {question}\n\nAssistant:")
PAIRED_PROMPT = Template("Question: {question}\n\nAnswer: ")

_Clean = Callable[[str], str]


def shp(row: Row) -> list[Pair]:
    """`history`, `human_ref_A`, `human_ref_B`; `labels` is 1 where A is the better one."""
    _, *answers = (text_of(row, name) for name in ("history", "human_ref_A", "human_ref_B"))
    scores = [row.get(f"score_{side}") for side in "AB"]
    best = 1 - choice_of(row, "labels")
    known = None
    if None not in scores:
        known = number_of(scores[best], f"score_{'AB'[best]}"), number_of(scores[1 - best], f"score_{'BA'[best]}")
    return [TextPair("", answers[best], answers[1 - best], known)]


def paired(row: Row) -> list[Pair]:
    """`question`, `response_j` better than `response_k`."""
    _, better, worse = (text_of(row, name) for name in ("question", "response_j", "response_k"))
    return [TextPair("", better, worse)]


def ranked(row: Row, *, clean: _Clean = all_text, ties: bool = False) -> list[Pair]:
    """All pairs of `answers` with different scores; with `ties` also equal ones, the later before the earlier."""
    answers = _answers(row, clean)
    pairs: list[Pair] = []
    for (first, first_score), (second, second_score) in combinations(answers, 2):
        if first_score > second_score:
            pairs.append(TextPair("", first, second, (first_score, second_score)))
        elif ties or second_score > first_score:
            pairs.append(TextPair("", second, first, (second_score, first_score)))
    return pairs


def best(row: Row, *, clean: _Clean) -> list[Pair]:
    """The answer with the highest score, the first of several, and no other."""
    return [TextPair("", max(_answers(row, clean), key=lambda answer: answer[1])[0], None)]


def _answers(row: Row, clean: _Clean) -> list[tuple[str, float]]:
    return [
        (
            clean(as_text(item["text"], f"answers[{number}].text")),
            number_of(item["pm_score"], f"answers[{number}].pm_score"),
        )
        for number, item in enumerate(items_of(row, "answers", "text", "pm_score"))
    ]


def question_columns(row: Row, *, clean: _Clean = all_text) -> Mapping[str, Any]:
    """A row's columns, the question without its HTML tags."""
    return {**row, "question": clean(text_of(row, "question"))}


# As the DPO paper's code reads them.
paper_ranked = partial(ranked, clean=paragraphs_and_code, ties=True)
paper_best = partial(best, clean=paragraphs_and_code)
paper_columns = partial(question_columns, clean=paragraphs_and_code)
