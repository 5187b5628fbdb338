"""Layouts of plain text: triples, transcripts, comparisons of summaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_po.data.formats.fields import as_text, choice_of, items_of, kind, scores_of, text_of, value_of
from open_po.data.formats.pairs import Pair, Row, RowError, TextPair, common_prefix_length
from open_po.data.formats.template import Template

_POST = ("subreddit", "title", "post")
_HH_ANSWER = "\n\nAssistant:"
TLDR_PROMPT = Template("SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:")


def text(row: Row) -> list[Pair]:
    """`prompt`, `chosen`, `rejected` as they stand."""
    return [TextPair(text_of(row, "prompt"), text_of(row, "chosen"), text_of(row, "rejected"), scores_of(row))]


def transcripts(row: Row) -> list[Pair]:
    """`chosen`, `rejected`: `Human:` and `Assistant:` turns, the same up to the last `Assistant:` that they share."""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    end = chosen.rfind(_HH_ANSWER, 0, common_prefix_length(chosen, rejected))
    if end < 0:
        raise RowError(
            "field prompt is missing or null, and chosen and rejected are not transcripts that share turns up to "
            "'Assistant:'"
        )
    end += len(_HH_ANSWER)
    return [TextPair(chosen[:end], chosen[end:], rejected[end:])]


def tldr_comparisons(row: Row) -> list[Pair]:
    """Two `summaries` of the post in `info`, and which of them was chosen."""
    info = value_of(row, "info")
    if not isinstance(info, Mapping):
        raise RowError(f"field info is {kind(info)}, expected {{subreddit, title, post}}")
    summaries = [
        as_text(summary["text"], f"summaries[{number}].text")
        for number, summary in enumerate(items_of(row, "summaries", "text"))
    ]
    if len(summaries) != 2:
        raise RowError(f"field summaries has {len(summaries)} of them, expected two")
    choice = choice_of(row, "choice")
    if info.get("post") is None and info.get("article") is not None:
        return []  # the data set's validation split compares summaries of newspaper articles too
    for name in _POST:
        as_text(info.get(name), f"info.{name}")
    return [TextPair("", summaries[choice], summaries[1 - choice])]


def tldr_summary(row: Row) -> list[Pair]:
    """The `summary` of a post, the only answer."""
    *_, summary = (text_of(row, name) for name in (*_POST, "summary"))
    return [TextPair("", summary, None)]


def post_columns(row: Row) -> Mapping[str, Any]:
    """A row's columns with those of `info`, which a prompt may name alone."""
    info = row.get("info")
    return {**info, **row} if isinstance(info, Mapping) else row


def behind_blank(response: str) -> str:
    """A response behind `Assistant:`, as the DPO paper's code writes it."""
    return " " + response


def one_blank(response: str) -> str:
    """A response with a blank before it, its own or another one."""
    return response if response[:1].isspace() else " " + response
