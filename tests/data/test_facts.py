"""Special tokens, shared prompts and the pairs to look at, beside counts made row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from open_po.config import parse_mixture
from open_po.data import PairDataset, PreferencePair, facts, load_pairs
from open_po.data.examples import choose_examples
from open_po.data.facts import known_prompts, shared, special_tokens
from open_po.data.tokenization import Truncation
from tests import tiny

BOS, EOS, PAD = 0, 1, 2


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer(tmp_path / "tokenizer")


def load(path: Path, rows: Sequence[Any], tokenizer: Any, limit: int = 10_000) -> PairDataset:
    return load_pairs(
        parse_mixture([str(tiny.write_jsonl(path, list(rows))), "1.0"], ["train"]), tokenizer, Truncation(limit, None)
    )


def ending(response: list[int], lost: int) -> str:
    """Read from the end, token by token."""
    run = 0
    while run < len(response) and response[-1 - run] == EOS:
        run += 1
    if run:
        return "once" if run == 1 else "repeated"
    if lost:
        return "cut"
    return "followed" if EOS in response else "missing"


def text(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_special_tokens_are_counted_row_by_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows of messages: text gets no special token twice."""
    monkeypatch.setattr(facts, "_CHUNK", 7)  # rows are read in several parts, the last a smaller one
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    odd = [
        text("<s>q", "a</s></s>", "b"),
        text("<s><s>q", "a", "a</s>b"),
        text("<s>q<s>", "a<s>", "b</s>"),
        text("q", "</s>", "</s></s></s>"),
        text("<pad>q", "a", "b<pad>"),
    ]
    rows: list[dict[str, Any]] = [*tiny.text_rows(14), *odd, *tiny.text_rows(5, seed=1)]
    rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    pairs = load(tmp_path / "pairs.jsonl", rows, tokenizer, limit=24)
    tokenizer.unk_token = "<pad>"
    found = special_tokens(pairs, tokenizer)
    assert pairs.lost.any()
    for index in range(len(pairs)):
        pair = pairs[index]
        leading = next(i for i, token in enumerate([*pair.prompt_ids, -1]) if token != BOS)
        assert found.leading_bos[index] == leading
        parts = list(vars(pair).values())[:3]
        assert found.inner_bos[index] == (sum(ids.count(BOS) for ids in parts) > leading)
        assert found.unknown[index] == sum(ids.count(PAD) for ids in parts)
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            assert found.endings[index, side] == ending(response, pairs.lost[index, 1 + side])
            behind = response[::-1].index(EOS) if EOS in response else len(response)
            assert found.behind_eos[index, side] == behind
    assert set(found.endings.flatten()) == {"once", "repeated", "cut"}


def test_a_template_may_end_behind_eos_or_without(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if 'open' not in m['content'] %}</s>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": answer, "rejected": "bad"}
        for answer in ("good", "left open", "very good")
    ]
    pairs = load(tmp_path / "chat.jsonl", rows, tokenizer)
    found = special_tokens(pairs, tokenizer)
    assert found.endings.tolist() == [["followed", "followed"], ["missing", "followed"], ["followed", "followed"]]
    assert found.behind_eos[0].tolist() == [1, 1]
    assert [found.ended(side, "missing") for side in (0, 1)] == [1, 0]
    odd = choose_examples(pairs, found, 2)[1]
    assert (odd.index, odd.reasons[0]) == (1, "a response ends without EOS")


def test_a_tokenizer_without_bos_or_with_one_token_for_all(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = load(tmp_path / "pairs.jsonl", [text("</s>q</s>", "a", "b")], tokenizer)
    tokenizer.bos_token = tokenizer.unk_token = "</s>"
    found = special_tokens(pairs, tokenizer)
    assert (found.leading_bos.tolist(), found.inner_bos.tolist(), found.unknown.tolist()) == ([1], [False], [0])
    without = tiny.make_tokenizer(tmp_path / "without", bos_token=None)
    assert special_tokens(pairs, without).leading_bos.tolist() == [0]


def test_what_pairs_share(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        *(text("q1:", *pair) for pair in ("ab", "ba", "ac", "ab", "ab")),
        *(text("q2:", *pair) for pair in ("ab", "cb")),
        text("q3:", "a", "b"),
    ]
    pairs = load(tmp_path / "pairs.jsonl", rows, tokenizer)
    found = shared(pairs)
    every = [pairs[index] for index in range(len(pairs))]
    prompts = Counter(tuple(pair.prompt_ids) for pair in every)
    whole = [tuple(map(tuple, list(vars(pair).values())[:3])) for pair in every]
    assert found.prompts == len(prompts) == 3
    assert found.in_company == sum(count for count in prompts.values() if count > 1) == 7
    assert found.most == max(prompts.values()) == 5
    responses = {(p, r) for p, *both in whole for r in both}
    assert found.responses == len(responses) == 8
    assert found.repeated == len(whole) - len(set(whole)) == 2
    assert found.contradicted == sum((p, r, c) in set(whole) for p, c, r in whole) == 4

    held_out = load(tmp_path / "held_out.jsonl", [*rows[5:], *tiny.text_rows(4)], tokenizer)
    theirs = {tuple(held_out[index].prompt_ids) for index in range(len(held_out))}
    assert known_prompts(held_out, pairs) == len(theirs & set(prompts)) == 2


# ------------------------------------------------------------------------------------------------------------ examples


def test_examples_are_the_telling_ones(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    names = []
    for number in range(3):
        rows = tiny.text_rows(8, seed=number)
        if number == 1:
            rows[2]["prompt"] = "word " * 70  # truncated
            rows[5] = text("q", "a" * 30, "b")
        names.append(str(tiny.write_jsonl(tmp_path / f"{number}.jsonl", rows)))
    words = [word for name in names for word in (name, "1.0")]
    pairs = load_pairs(parse_mixture(words, ["train"]), tokenizer, Truncation(64, None))
    special = special_tokens(pairs, tokenizer)
    (cut,) = [index for index in range(len(pairs)) if pairs.lost[index].any()]
    examples = choose_examples(pairs, special, 5)
    assert [example.index for example in examples] == [0, cut, 8, 16, 13]
    assert cut == 10
    lengths = [longest(pairs[index]) for index in range(len(pairs))]
    assert lengths.index(max(lengths)) == cut  # one pair with two reasons
    lost = int(pairs.lost[cut].sum())
    reasons = [example.reasons for example in examples]
    assert reasons[0] == [f"it is the first of {names[0]}"]
    assert reasons[1] == [
        f"it loses the most to truncation, {lost} tokens",
        f"it is the longest, {max(lengths)} tokens of prompt and longer response",
    ]
    assert reasons[2:4] == [[f"it is the first of {name}"] for name in names[1:]]
    apart = [abs(len(pair.chosen_ids) - len(pair.rejected_ids)) for pair in (pairs[i] for i in range(len(pairs)))]
    assert apart.index(max(apart)) == 13
    assert reasons[4] == [f"its responses differ most in length, by {max(apart)} tokens"]
    everything = choose_examples(pairs, special, 1000)
    assert sorted(example.index for example in everything) == list(range(len(pairs)))
    assert choose_examples(pairs, special, 0) == []


def longest(pair: PreferencePair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
