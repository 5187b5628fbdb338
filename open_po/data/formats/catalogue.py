"""All layouts, an entry each, and which of them a row has."""

from __future__ import annotations

from difflib import get_close_matches

from open_po.data.formats import forums, messages, texts, unpaired
from open_po.data.formats.fields import missing
from open_po.data.formats.pairs import Row, RowError
from open_po.data.formats.spec import Format

_FORMATS = (
    Format(
        name="text",
        read=texts.text,
        columns="`prompt`, `chosen`, `rejected`: text",
    ),
    Format(
        name="messages",
        read=messages.messages,
        columns="`prompt`: messages or text; `chosen`, `rejected`: the answering message or messages, or whole "
        "conversations that share their beginning (`prompt` is then not needed); `tools`",
    ),
    Format(
        name="sharegpt",
        read=messages.share_gpt,
        columns="`conversations` [{`from`, `value`}], `system`, `chosen`, `rejected`, `tools`",
    ),
    Format(
        name="hh",
        read=texts.transcripts,
        columns="`chosen`, `rejected`: text with `\\n\\nHuman:` and `\\n\\nAssistant:` turns",
        data_sets="Anthropic/hh-rlhf",
    ),
    Format(
        name="shp",
        read=forums.shp,
        columns="`history`, `human_ref_A`, `human_ref_B`, `labels` (1: A is better), `score_A`, `score_B`",
        data_sets="stanfordnlp/SHP",
        found_by=(("history", "human_ref_A", "human_ref_B", "labels"),),
        prompt=forums.SHP_PROMPT,
        answer=texts.behind_blank,
    ),
    Format(
        name="stack_exchange_paired",
        read=forums.paired,
        columns="`question`, `response_j` (better), `response_k`",
        data_sets="lvwerra/stack-exchange-paired",
        found_by=(("question", "response_j", "response_k"),),
        prompt=forums.PAIRED_PROMPT,
    ),
    Format(
        name="stack_exchange_scored",
        read=forums.ranked,
        columns="`question`, `answers` [{`text`, `pm_score`}]: all pairs with different scores, without HTML tags",
        data_sets="HuggingFaceH4/stack-exchange-preferences",
        found_by=(("question", "answers"),),
        prompt=forums.QUESTION_PROMPT,
        answer=texts.behind_blank,
        values=forums.question_columns,
    ),
    Format(
        name="stack_exchange_dpo_paper",
        read=forums.paper_ranked,
        columns="the same, as the DPO paper's code reads it: equal scores make a pair too (the later answer is the "
        "chosen one); of HTML only text directly in paragraphs and blocks of code are kept",
        prompt=forums.QUESTION_PROMPT,
        answer=texts.behind_blank,
        values=forums.paper_columns,
    ),
    Format(
        name="stack_exchange_sft_paper",
        read=forums.paper_best,
        columns="the same, the best answer alone, as the DPO paper's code does for SFT",
        prompt=forums.QUESTION_PROMPT,
        answer=texts.behind_blank,
        values=forums.paper_columns,
    ),
    Format(
        name="ultrafeedback",
        read=messages.ultrafeedback,
        columns="as `messages`, with `score_chosen`, `score_rejected` or `chosen-rating`, `rejected-rating`; or "
        "`instruction`, `chosen_response`, `rejected_response`",
        data_sets="HuggingFaceH4/ultrafeedback_binarized, argilla/ultrafeedback-binarized-preferences(-cleaned)",
        found_by=(("instruction", "chosen_response", "rejected_response"),),
    ),
    Format(
        name="tulu3",
        read=messages.messages,
        columns="as `messages`: `prompt` text, `chosen`, `rejected` conversations; `source`, `id`, ratings",
        data_sets="allenai/llama-3.1-tulu-3-8b-preference-mixture",
    ),
    Format(
        name="olmo2",
        read=messages.messages,
        columns="as `tulu3`, and found as such",
        data_sets="allenai/olmo-2-1124-7b-preference-mix",
    ),
    Format(
        name="orca_dpo",
        read=messages.orca,
        columns="`system`, `question` or `prompt`, `chosen`, `rejected`: text, read as messages",
        data_sets="Intel/orca_dpo_pairs, jondurbin/truthy-dpo-v0.1",
    ),
    Format(
        name="mt_pref",
        read=texts.text,
        columns="as `text`, and found as such",
        data_sets="sardinelab/MT-pref",
    ),
    Format(
        name="tldr_comparisons",
        read=texts.tldr_comparisons,
        columns="`info` {`subreddit`, `title`, `post`}, `summaries` [{`text`}], `choice`; rows about articles of "
        "newspapers give none",
        data_sets="openai/summarize_from_feedback, comparisons",
        found_by=(("info", "summaries", "choice"),),
        prompt=texts.TLDR_PROMPT,
        answer=texts.one_blank,
        values=texts.post_columns,
    ),
    Format(
        name="tldr_sft",
        read=texts.tldr_summary,
        columns="`subreddit`, `title`, `post`, `summary`, the only answer",
        data_sets="martimfasantos/openai-summarize-tldr",
        found_by=(("subreddit", "title", "post", "summary"),),
        prompt=texts.TLDR_PROMPT,
        answer=texts.one_blank,
    ),
    Format(
        name="kto",
        read=unpaired.labelled,
        columns="`prompt`, `completion`, `label`: with a label of true the completion is the only "
        "answer, with false the row gives none",
        data_sets="trl-lib/kto-mix-14k",
        nothing="label is false: no good answer, and gives no pair",
        found_by=(("prompt", "completion", "label"),),
    ),
    Format(
        name="sft",
        read=unpaired.single,
        columns="`prompt` with `completion`, `response` or `chosen`, text or messages; or a conversation in `messages` "
        "or `conversations`, whose last message is the only answer",
        data_sets="allenai/tulu-3-sft-mixture",
        found_by=(
            *(("prompt", answer) for answer in unpaired.ANSWERS),
            *((name,) for name in unpaired.CONVERSATIONS),
        ),
    ),
)
_CLOSE = 0.8  # names as alike as `rejcted` and `rejected`: `selected` is another column
FORMATS: dict[str, Format] = {form.name: form for form in _FORMATS}


def recognised(row: Row) -> Format:
    """The layout that a row's columns have. Raises RowError if that is none, or not certain."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is not None and rejected is not None:
        return FORMATS[_of_two_answers(row)]
    if name := _meant(row):
        raise missing(row, name)
    found = [form for form in _FORMATS if any(_has(row, names) == len(names) for names in form.found_by)]
    if len(found) > 1 and _has(row, ("label",)):
        found = [form for form in found if form.name != "sft"]  # it takes all that kto does
    if len(found) == 1:
        return found[0]
    if found:
        raise RowError(f"has the columns of {' and of '.join(f.name for f in found)}; set format to the one it is")
    raise _unknown(row)


def _of_two_answers(row: Row) -> str:
    """The layout of a row with `chosen` and `rejected`."""
    prompt, chosen = row.get("prompt"), row["chosen"]
    if row.get("conversations") is not None:
        return "sharegpt"
    if isinstance(chosen, str) and isinstance(row["rejected"], str):
        if prompt is None:
            is_transcript = chosen.startswith(("\n\nHuman:", "Human:"))
            return "orca_dpo" if isinstance(row.get("question"), str) and not is_transcript else "hh"
        if isinstance(prompt, str):
            return "orca_dpo" if isinstance(row.get("system"), str) else "text"
    if isinstance(prompt, str):
        if _has(row, ("score_chosen", "score_rejected")) == 2 or _has(row, ("chosen-rating", "rejected-rating")) == 2:
            return "ultrafeedback"
        if isinstance(row.get("source"), str):
            return "tulu3"
    return "messages"


def _has(row: Row, names: tuple[str, ...]) -> int:
    return sum(row.get(name) is not None for name in names)


def _meant(row: Row) -> str | None:
    """Which of the columns of two answers a row lacks, if the others say that it should have both."""
    columns = [name for name in row if row[name] is not None]
    others = [name for name in columns if name != "rejected"]
    if row.get("chosen") is None:
        meant = row.get("rejected") is not None or get_close_matches("chosen", others, n=1, cutoff=_CLOSE)
        return "chosen" if meant else None
    if "rejected" in row or any(name.startswith("reject") for name in others):
        return "rejected"
    return "rejected" if get_close_matches("rejected", others, n=1, cutoff=_CLOSE) else None


def _unknown(row: Row) -> RowError:
    """What to say of a row that has no known layout: which column it lacks of the one that is nearest."""
    if _has(row, ("prompt", "chosen")):
        return missing(row, "chosen" if row.get("chosen") is None else "rejected")
    near = [
        ((len(names) - _has(row, names), -len(names)), form.name, next(name for name in names if row.get(name) is None))
        for form in _FORMATS
        for names in form.found_by
        if 2 * _has(row, names) >= len(names)
    ]
    nearest = [entry for entry in near if entry[0] == min(near)[0]]
    if len(nearest) == 1:
        return RowError(f"{missing(row, nearest[0][2])}; read as {nearest[0][1]}")
    return RowError(
        f"columns {', '.join(row) or '(none)'} are of no known layout; set format, to one of {', '.join(FORMATS)} or "
        "to MODULE:FUNCTION of your own"
    )
