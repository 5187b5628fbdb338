"""Mixtures that repeat rows, filters, rows that are skipped, and what came from where, beside naive readings."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from open_po.config import MixturePart
from open_po.data import PairDataset, load_pairs, token_shards
from open_po.data.facts import known_pairs, known_prompts, tell_known
from open_po.data.formats import row_reader
from open_po.data.selection import BAD_ROWS, REPEATED, Selection
from open_po.data.tokenization import Truncation, tokenise
from open_po.errors import UserError
from open_po.output.tables import part_line, parts_table
from tests import tiny

FREE = Truncation(10_000, None)
Ids = tuple[tuple[int, ...], ...]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer(tmp_path / "tokenizer")


def part(path: Path, rows: Sequence[Any], **more: Any) -> MixturePart:
    return MixturePart(dataset=str(tiny.write_jsonl(path, list(rows))), **more)


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def ids(pairs: PairDataset) -> list[Ids]:
    return [as_ids(pairs[index]) for index in range(len(pairs))]


def as_ids(pair: Any) -> Ids:
    return tuple(map(tuple, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)))


def read(row: dict[str, Any], tokenizer: Any, truncation: Truncation = FREE, layout: str | None = None) -> list[Ids]:
    """A row's pairs, tokenised one by one."""
    return [as_ids(tokenise(pair, tokenizer, truncation)[0]) for pair in row_reader(layout, None)(row)]


def origins(pairs: PairDataset) -> list[str]:
    return [pairs.origin(index) for index in range(len(pairs))]


def reasons(pairs: PairDataset) -> dict[str, int]:
    return {reason: rows.count for reason, rows in pairs.left_out.items()}


# ----------------------------------------------------------------------------------------------------------- repeating


@pytest.mark.parametrize("amount", [1.0, 1.5, 2.0, 2.5, 3.04, 7.99])
def test_fractions_above_one_repeat_rows(
    amount: float, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them so often, and a draw of the rest once more; each is tokenised once."""
    seen: list[Any] = []
    monkeypatch.setattr(token_shards, "tokenise", lambda pair, *how: seen.append(pair) or tokenise(pair, *how))
    rows = tiny.text_rows(25)
    pairs = load_pairs([part(tmp_path / "x.jsonl", rows, amount=amount)], tokenizer, FREE)
    assert len(seen) == 25
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0)).tolist()
    count = round(amount * 25)
    more = sorted(order[: count % 25])
    expected = [*range(25)] * (count // 25) + more
    assert [int(origin.rsplit(" ", 1)[1]) - 1 for origin in origins(pairs)] == expected
    assert ids(pairs) == [read(rows[number], tokenizer)[0] for number in expected]
    (total,) = pairs.totals().parts or ()
    assert (total.available, total.rows, total.repeated, total.pairs) == (25, 25, count - 25, count)
    assert len(set(pairs.places.tolist())) == 25
    fraction = load_pairs([part(tmp_path / "x.jsonl", rows, amount=(count % 25) / 25 or 1.0)], tokenizer, FREE)
    assert ids(fraction) == [read(rows[number], tokenizer)[0] for number in more or range(25)]


def test_a_thinned_mixture_draws_from_what_is_repeated(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each pass over a row is one of the rows that are drawn from."""
    first, second = tiny.text_rows(10), tiny.text_rows(30, seed=1)
    mixture = [part(tmp_path / "a.jsonl", first, amount=3.0), part(tmp_path / "b.jsonl", second)]
    drawn = [load_pairs(mixture, tokenizer, FREE, max_rows=count) for count in (12, 60, 100)]
    counts = [Counter(origins(pairs)) for pairs in drawn]
    assert [sum(each.values()) for each in counts] == [12, 60, 60]
    assert [max(each.values()) for each in counts[1:]] == [3, 3]
    assert all(counts[0][origin] <= times for origin, times in counts[1].items())
    assert sum(pairs.repeated for pairs in drawn[1].sources) == 20
    for pairs in drawn:
        tokenised = {str(tmp_path / name): rows for name, rows in (("a.jsonl", first), ("b.jsonl", second))}
        for index, origin in enumerate(origins(pairs)):
            name, number = origin.split(" row ")
            assert ids(pairs)[index : index + 1] == read(tokenised[name][int(number) - 1], tokenizer)


def test_repeated_rows_share_numbers_and_keys(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("q1:", "a", "b"), row("q1:", "b", "c"), row("q2:", "a", "a"), row("q2:", "a", "b")]
    pairs = load_pairs([part(tmp_path / "x.jsonl", rows, amount=2.0)], tokenizer, FREE)
    assert pairs.prompt_numbers.tolist() == [0, 0, 1] * 2
    assert (pairs.response_numbers[:3] == pairs.response_numbers[3:]).all()
    assert (pairs.response_keys[:3] == pairs.response_keys[3:]).all()
    assert reasons(pairs) == {"identical responses": 1}


# ------------------------------------------------------------------------------------------- rows of several pairs


def ranked(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with 1 to 4 answers each, of few different scores."""
    rng = random.Random(seed)
    return [
        {
            "question": f"which {number}",
            "answers": [
                {"text": " ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 6))), "pm_score": rng.randint(0, 3)}
                for _ in range(rng.randint(1, 4))
            ],
        }
        for number in range(count)
    ]


def test_a_row_may_give_several_pairs_or_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", 7)
    monkeypatch.setattr(token_shards, "_BATCH_TOKENS", 50)
    rows = ranked(40)
    layout = "stack_exchange_scored"
    pairs = load_pairs([part(tmp_path / "x.jsonl", rows, format=layout, amount=2.0)], tokenizer, FREE)
    expected, named, empty = [], [], 0
    for number, each in enumerate(rows, 1):
        found = read(each, tokenizer, layout=layout)
        expected += found
        empty += not found
        name = f"{tmp_path / 'x.jsonl'} row {number}"
        named += [name] if len(found) == 1 else [f"{name} pair {place}" for place in range(1, len(found) + 1)]
    assert ids(pairs) == expected * 2
    assert origins(pairs) == named * 2
    assert len(expected) > 50
    assert 0 < empty == reasons(pairs)["gives no pair"]
    assert pairs.sources[0].format == layout


# ------------------------------------------------------------------------------------------------------------ bad rows


def test_bad_rows_are_skipped_and_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Broken lines, other encodings and rows that lack a side; a row of 10 MB is a row."""
    big = row("q", "a", "d") | {"notes": "x" * 10_000_000}
    lines = [
        json.dumps(row("q", "a", "b")).encode(),
        b'{"prompt": "q", "chosen"',
        json.dumps(big).encode(),
        '{"prompt": "é"}'.encode("latin-1"),
        b"",
        json.dumps({"prompt": "q", "chosen": 3, "rejected": "b"}).encode(),
        json.dumps(row("q", "c", "d")).encode(),
        json.dumps({"prompt": "q", "chosen": None, "rejected": "b"}).encode(),
        json.dumps(row("q", "same", "same")).encode(),
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    mixture = [MixturePart(dataset=str(path), format="text")]
    limits = Truncation(16, 8)
    pairs = load_pairs(mixture, tokenizer, limits, selection=Selection(skip_bad_rows=True))
    expected = [read(each, tokenizer, limits)[0] for each in (row("q", "a", "b"), big, row("q", "c", "d"))]
    assert ids(pairs) == expected
    assert origins(pairs) == [f"{path} row {number}" for number in (1, 3, 6)]  # a blank line is no row
    assert reasons(pairs) == {BAD_ROWS: 4, "identical responses": 1}
    first, second, third = pairs.left_out[BAD_ROWS].first
    assert first.startswith(f"{path}: line 2: broken JSON (")
    assert second.startswith(f"{path}: line 4: is not UTF-8 text (")
    assert third.startswith(f"{path} row 5: field chosen is")
    assert f"left out: 4 rows, {BAD_ROWS} ({first}; {second}; {third}; ...)" in pairs.describe()
    assert pairs.totals().left_out == {BAD_ROWS: 4, "identical responses": 1}
    with pytest.raises(UserError) as caught:
        load_pairs(mixture, tokenizer, limits)
    assert str(caught.value) == f"{first} (rows: 3 with other faults)"


def test_a_part_without_a_row_that_can_be_read_stops_the_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    good = part(tmp_path / "good.jsonl", tiny.text_rows(3))
    bad = part(tmp_path / "bad.jsonl", [{"text": "q"}] * 3)
    with pytest.raises(UserError) as caught:
        load_pairs([good, bad], tokenizer, FREE, selection=Selection(skip_bad_rows=True))
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'bad.jsonl'} row 1: ")
    assert line.endswith("; none of the part's 3 rows can be read, so on_bad_rows skips none")


def test_what_is_wrong_everywhere_is_told_before_all_is_tokenised(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", 10)
    read_rows: list[int] = []
    original = token_shards._records
    monkeypatch.setattr(token_shards, "_records", lambda *about: read_rows.append(1) or original(*about))
    mixture = [part(tmp_path / "bad.jsonl", [{"prompt": "q", "chosen": "a", "rejected": 3}] * 1000)]
    with pytest.raises(UserError, match=r"row 1: field rejected is .* \(rows: 9 more like it\)"):
        load_pairs(mixture, tokenizer, FREE)
    assert len(read_rows) == 10


# ------------------------------------------------------------------------------------------------------------- filters


def test_repeated_pairs_are_left_out_by_content(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """After tokenising, over all parts, the first stays; a row that is to be repeated is."""
    letters = random.Random(0)
    rows = [row(*("q" + letters.choice("ab") for _ in range(3))) for _ in range(60)]
    rows += [row("long " * 3 + "qa", "qb", "qa")]
    parts = [part(tmp_path / "a.jsonl", rows[:40], amount=2.0), part(tmp_path / "b.jsonl", rows[40:])]
    limits = Truncation(8, 3)
    pairs = load_pairs(parts, tokenizer, limits, selection=Selection(deduplicate=True))
    seen: set[Ids] = set()
    expected: list[list[Ids]] = [[], []]
    left = repeated = 0
    for number, each in enumerate(rows):
        if each["chosen"] == each["rejected"]:
            left += 1
            continue
        (found,) = read(each, tokenizer, limits)
        repeated += found in seen
        if found not in seen:
            seen.add(found)
            expected[number >= 40].append(found)
    assert ids(pairs) == expected[0] * 2 + expected[1]
    assert reasons(pairs) == {"identical responses": left, REPEATED: repeated}
    assert repeated > 20
    everything = load_pairs(parts, tokenizer, limits)
    assert len(everything) == 2 * sum(r["chosen"] != r["rejected"] for r in rows[:40]) + sum(
        r["chosen"] != r["rejected"] for r in rows[40:]
    )


@pytest.mark.parametrize(
    ("selection", "keeps"),
    [
        (Selection(min_score_gap=2), lambda better, worse, pair: better - worse >= 2),
        (Selection(min_score_ratio=2), lambda better, worse, pair: worse == 0 or better / worse >= 2),
        (Selection(min_response_length=5), lambda better, worse, pair: min(map(len, pair[1:])) >= 5),
        (
            Selection(min_score_gap=1, min_score_ratio=1.5, min_response_length=4),
            lambda better, worse, pair: (
                better - worse >= 1 and (worse == 0 or better / worse >= 1.5) and min(map(len, pair[1:])) >= 4
            ),
        ),
    ],
)
def test_filters(selection: Selection, keeps: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    layout, rows = "stack_exchange_scored", ranked(60, seed=3)
    mixture = [part(tmp_path / "x.jsonl", rows, format=layout)]
    expected, total = [], 0
    for each in rows:
        for pair in row_reader(layout, None)(each):
            found = as_ids(tokenise(pair, tokenizer, FREE)[0])
            assert pair.scores is not None
            total += 1
            expected += [found] * keeps(*pair.scores, found)
    pairs = load_pairs(mixture, tokenizer, FREE, selection=selection)
    assert ids(pairs) == expected
    assert 5 < len(expected) < total - 5
    assert sum(reasons(pairs).values()) - reasons(pairs)["gives no pair"] == total - len(expected)
    assert pairs.sources[0].left_out == reasons(pairs)


def test_a_score_filter_needs_scores(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    scored = part(tmp_path / "scored.jsonl", ranked(20), format="stack_exchange_scored")
    plain = part(tmp_path / "plain.jsonl", tiny.text_rows(5))
    for name in ("min_score_gap", "min_score_ratio"):
        with pytest.raises(UserError) as caught:
            load_pairs([scored, plain], tokenizer, FREE, selection=Selection(**{name: 1.5}))
        assert str(caught.value) == (
            f"{name}: the rows of {tmp_path / 'plain.jsonl'} have no scores; leave {name} out, or give the part a "
            "format that reads scores"
        )


def test_long_rows_may_be_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    limits = Truncation(34, 16)
    rows = tiny.text_rows(80)
    pairs = load_pairs([part(tmp_path / "x.jsonl", rows)], tokenizer, limits, selection=Selection(leave_out_long=True))
    whole = [read(each, tokenizer)[0] for each in rows]
    assert ids(pairs) == [
        pair for pair in whole if len(pair[0]) <= 16 and len(pair[0]) + max(len(pair[1]), len(pair[2])) <= 34
    ]
    assert 5 < len(pairs) < 75
    assert not pairs.lost.any()
    assert list(reasons(pairs).values()) == [80 - len(pairs)]


# -------------------------------------------------------------------------------------------- what came from where


def test_held_out_pairs_that_are_trained_on_are_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    letters = random.Random(1)

    def draw(count: int, names: str) -> list[dict[str, str]]:
        pairs = (letters.sample("abcde", 2) for _ in range(count))
        return [row(f"q{letters.choice(names)}:", chosen, rejected) for chosen, rejected in pairs]

    training = load_pairs([part(tmp_path / "a.jsonl", draw(30, "uvwx"))], tokenizer, FREE)
    held_out = load_pairs([part(tmp_path / "b.jsonl", draw(40, "vwxyz"))], tokenizer, FREE)
    mine, theirs = ids(held_out), ids(training)
    prompts = {pair[0] for pair in mine} & {pair[0] for pair in theirs}
    either_way = {(pair[0], frozenset(pair[1:])) for pair in theirs}
    pairs = sum((pair[0], frozenset(pair[1:])) in either_way for pair in mine)
    assert known_prompts(held_out, training) == len(prompts) == 3
    assert known_pairs(held_out, training) == pairs
    assert 5 < pairs < 35
    line = tell_known(held_out, training)
    assert line is not None
    assert line.startswith(f"{pairs} of 40 pairs are trained on too, and 3 of 5 prompts")
    other = load_pairs([part(tmp_path / "c.jsonl", draw(40, "yz"))], tokenizer, FREE)
    assert tell_known(other, training) is None


def test_parts_are_told_one_by_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*tiny.text_rows(10), row("q", "a", "a")]
    message = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    parts = [
        part(tmp_path / "a.jsonl", rows, amount=1.5),
        part(tmp_path / "b.jsonl", [message] * 4, amount=2),
        part(tmp_path / "c.jsonl", rows[:1]),
    ]
    pairs = load_pairs(parts, tokenizer, FREE, selection=Selection(deduplicate=True))
    first, second, third = pairs.sources
    assert (first.format, second.format) == ("text", "messages")
    extra = first.pairs - 10
    assert part_line(first) == (
        f"{tmp_path / 'a.jsonl'}, read as text: {10 + extra} pairs of 11 of 11 rows; repeated {first.repeated} times; "
        "left out 1, identical responses"
    )
    assert (second.available, second.rows, second.pairs, second.left_out) == (4, 2, 1, {REPEATED: 1})
    assert (third.pairs, third.left_out) == (0, {REPEATED: 1})
    table = parts_table("what", pairs.sources)
    assert [list(column.cells) for column in table.columns][-1] == [str(10 + extra), "1", "0"]


def test_identity_is_that_of_the_pairs_in_their_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tiny.text_rows(10)

    def identity(rows: Sequence[Any], name: str = "x.jsonl", **more: Any) -> list[Any]:
        pairs = load_pairs([part(tmp_path / name, rows, **more)], tokenizer, FREE)
        return [(one["pairs"], one["digest"]) for one in pairs.identity()]

    first = identity(rows)
    assert identity(rows, "moved.jsonl") == first
    changes = [
        identity([*rows[1:], rows[0]]),
        identity([rows[0] | {"rejected": "other"}, *rows[1:]]),
        identity(rows, amount=2.0),
    ]
    assert all(change != first for change in changes)
