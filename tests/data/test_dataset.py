"""All pairs of a mixture: what is left out and what stops the run, the cache, workers, lengths and keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from open_po.config import MixturePart, parse_mixture
from open_po.data import PairDataset, PreferencePair, load_pairs, token_shards
from open_po.data.chat_templates import chat_template
from open_po.data.content import cache_folder
from open_po.data.formats import Pair, row_reader
from open_po.data.tokenization import Truncation, response_key, tokenise
from open_po.errors import UserError
from tests import tiny

FREE = Truncation(10_000, None)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(rows: Sequence[Any], name: str = "pairs.jsonl") -> str:
        return str(tiny.write_jsonl(tmp_path / name, list(rows)))

    return write


def load(name: str, tokenizer: Any, truncation: Truncation = FREE, **settings: Any) -> PairDataset:
    return load_pairs(parse_mixture([name, "1.0"], ["train"]), tokenizer, truncation, **settings)


def read(row: dict[str, Any]) -> Pair:
    (pair,) = row_reader(None, None)(row)
    return pair


def origins(pairs: PairDataset) -> list[str]:
    return [pairs.origin(index) for index in range(len(pairs))]


def left_out(pairs: PairDataset) -> dict[str, tuple[int, list[str]]]:
    return {reason: (rows.count, rows.first) for reason, rows in pairs.left_out.items()}


def row(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokens(pairs: PairDataset) -> list[PreferencePair]:
    return [pairs[index] for index in range(len(pairs))]


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that this process tokenises, as it does so."""
    seen: list[str] = []

    def spy(pair: Any, *settings: Any) -> Any:
        seen.append(pair.prompt)
        return tokenise(pair, *settings)

    monkeypatch.setattr(token_shards, "tokenise", spy)
    return seen


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("truncation", [FREE, Truncation(16, None), Truncation(16, 5)])
def test_pairs_are_their_rows_tokenised(
    truncation: Truncation, tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]
) -> None:
    rows = tiny.text_rows(50)
    pairs = load(write(rows), tokenizer, truncation)
    expected = [tokenise(read(r), tokenizer, truncation) for r in rows]
    assert tokens(pairs) == [pair for pair, _ in expected]
    assert pairs[np.int64(7)] == expected[7][0]
    assert pairs.lost.tolist() == [list(lost) for _, lost in expected]
    assert pairs.truncated_prompts == sum(lost.prompt > 0 for _, lost in expected)
    assert pairs.truncated_responses == sum(lost.chosen > 0 or lost.rejected > 0 for _, lost in expected)
    assert (pairs.truncated_prompts > 0) == (truncation is not FREE)


@pytest.mark.parametrize("max_rows", [None, 9, 3])
def test_pairs_are_counted_by_the_data_set_that_they_came_from(
    max_rows: int | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As their origins say, also of two parts of one file, and of rows left out."""
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for number, name in enumerate(names):
        tiny.write_jsonl(Path(name), [*tiny.text_rows(10, seed=number), row("q", "same", "same")])
    mixture = [
        MixturePart(dataset=names[0], split="train[:50%]"),
        MixturePart(dataset=names[1]),
        MixturePart(dataset=names[2], amount=3),
        MixturePart(dataset=names[0], split="train[50%:]"),
    ]
    pairs = load_pairs(mixture, tokenizer, FREE, max_rows=max_rows)
    expected = {name: sum(origin.startswith(name) for origin in origins(pairs)) for name in names}
    assert pairs.by_source == pairs.totals().by_source == expected
    assert list(pairs.by_source) == names
    assert sum(expected.values()) == len(pairs)
    if max_rows is None:
        assert (expected[names[0]], expected[names[1]]) == (10, 10)


def test_lengths_and_keys_belong_to_the_ids(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    rows = [
        *tiny.text_rows(30),
        row("same", "a", "b"),
        row("same", "b", "c"),
        row("sameb", "a", "c"),
        row("q", " ", "x"),
    ]
    pairs = load(write(rows), tokenizer)
    assert len(pairs) == 33 == len(pairs.response_keys)
    for index, pair in enumerate(tokens(pairs)):
        assert pairs.prompt_lengths[index] == len(pair.prompt_ids)
        assert pairs.chosen_lengths[index] == len(pair.chosen_ids)
        assert pairs.rejected_lengths[index] == len(pair.rejected_ids)
        assert pairs.response_keys[index].tolist() == [
            response_key(pair.prompt_ids, pair.chosen_ids),
            response_key(pair.prompt_ids, pair.rejected_ids),
        ]
    for lengths in (pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths):
        assert (lengths.shape, lengths.dtype) == ((33,), np.int64)


def test_keys_are_equal_where_prompt_and_response_are(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]
) -> None:
    rows = [row("q1:", "a", "b"), row("q1:", "b", "c"), row("q2:", "a", "b"), row("q1:", "c", "a")]
    pairs = load(write(rows), tokenizer)
    ids = [(p.prompt_ids, r) for p in tokens(pairs) for r in (p.chosen_ids, p.rejected_ids)]
    keys = pairs.response_keys.ravel().tolist()
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in keys] for a in keys]
    assert len(set(keys)) == 5


def test_numbers_are_equal_where_prompts_and_responses_to_them_are(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]
) -> None:
    """Over all parts of a mixture, and after rows were left out."""
    first = [row("q1:", "a", "b"), row("q1:", "b", "c"), row("q2:", "a", "a"), row("q2:", "a", "b")]
    second = [row("q1:", "c", "a"), row("q3:", "a", "b")]
    names = [write(first, "first.jsonl"), write(second, "second.jsonl")]
    pairs = load_pairs(parse_mixture([names[0], "1.0", names[1], "1.0"], ["train"]), tokenizer, FREE)
    assert pairs.prompt_numbers.tolist() == [0, 0, 1, 0, 2]
    assert (pairs.response_numbers.shape, pairs.response_numbers.dtype) == ((5, 2), np.int64)
    numbers = pairs.response_numbers.flatten().tolist()
    ids = [(p.prompt_ids, r) for p in tokens(pairs) for r in (p.chosen_ids, p.rejected_ids)]
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in numbers] for a in numbers]
    assert len(set(numbers)) == 7


def test_the_longest_pair_has_the_longest_row(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    rows = [row("q" * 20, "a", "b"), row("q", "a" * 30, "b"), row("q" * 15, "a", "b" * 25), row("qq", "a", "b" * 31)]
    pairs = load(write(rows), tokenizer)
    assert pairs.longest_pair == 2
    assert pairs.longest_row == len(tokens(pairs)[2].prompt_ids) + len(tokens(pairs)[2].rejected_ids)


def test_a_mixture_is_its_parts_in_order(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    rows = tiny.text_rows(20)
    first, second = write(rows[:12], "first.jsonl"), write(rows[12:], "second.jsonl")
    pairs = load_pairs(parse_mixture([first, "1.0", second, "3"], ["train[:50%]", "train"]), tokenizer, FREE)
    assert origins(pairs)[:6] == [f"{first} row {number}" for number in range(1, 7)]
    numbers = [int(origin.removeprefix(f"{second} row ")) for origin in origins(pairs)[6:]]
    assert len(numbers) == 3
    expected = [*rows[:6], *(rows[11 + number] for number in numbers)]
    assert tokens(pairs) == [tokenise(read(r), tokenizer, FREE)[0] for r in expected]
    told = [(source.name, source.available, source.rows, source.pairs) for source in pairs.sources]
    assert told == [(first, 6, 6, 6), (second, 8, 3, 3)]


def test_layouts_may_be_mixed_in_one_run(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    tokenizer.chat_template = chat_template("tulu")
    messages = write(
        [{"conversations": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad"}], "m.jsonl"
    )
    text = write([row("q", "good", "bad")])
    pairs = load_pairs(parse_mixture([messages, "1.0", text, "1.0"], ["train"]), tokenizer, FREE)
    assert [tokenizer.decode(pair.prompt_ids) for pair in tokens(pairs)] == ["<s><|user|>\nq\n<|assistant|>\n", "q"]
    assert [tokenizer.decode(pair.chosen_ids) for pair in tokens(pairs)] == ["good</s>", "good</s>"]


# ------------------------------------------------------------------------------------------------- left out and refused


def test_rows_that_cannot_train_are_counted_and_listed(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]
) -> None:
    rows = [
        row("q", "a", "b"),
        row("q", "same", "same"),
        row("q", "", "b"),
        row("q", "same", "same"),
        row("q", "xxxxxxxxy", "xxxxxxxxz"),
        row("q", "b", "c"),
        row("p", "same", "same"),
        row("q", "same", "same"),
    ]
    name = write(rows)
    pairs = load(name, tokenizer, Truncation(6, None))
    assert origins(pairs) == [f"{name} row 1", f"{name} row 6"]
    assert left_out(pairs) == {
        "identical responses": (4, [f"{name} row {number}" for number in (2, 4, 7)]),
        "empty response": (1, [f"{name} row 3"]),
        "identical responses after truncation": (1, [f"{name} row 5"]),
    }
    assert tokens(pairs) == [tokenise(read(rows[i]), tokenizer, FREE)[0] for i in (0, 5)]
    assert pairs.describe() == [
        "2 pairs, 12 tokens (prompts counted with each response)",
        f"left out: 4 rows, identical responses ({name} row 2; {name} row 4; {name} row 7; ...)",
        f"left out: 1 rows, empty response ({name} row 3)",
        f"left out: 1 rows, identical responses after truncation ({name} row 5)",
    ]


def test_truncation_is_described(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    rows = [row("qqqqqqqq", "a", "b"), row("qqqqqqqq", "aaaaaaaa", "b"), row("q", "b", "c")]
    assert load(write(rows), tokenizer, Truncation(6, None)).describe() == [
        "3 pairs, 29 tokens (prompts counted with each response)",  # 2 * 4 + 2 + 2, 2 * 3 + 3 + 2, 2 * 1 + 2 + 2
        "truncated: 2 prompts, responses of 1 pairs",
    ]


def test_row_numbers_after_a_subset_is_drawn(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    rows = [row(f"{number}:", "a", "a" if number % 3 == 0 else "b") for number in range(1, 61)]
    name = write(rows)
    pairs = load_pairs(parse_mixture([name, "0.5"], ["train[50%:]"]), tokenizer, FREE, max_rows=12)
    kept = [int(origin.removeprefix(f"{name} row ")) for origin in origins(pairs)]
    assert [tokenizer.decode(pair.prompt_ids) for pair in tokens(pairs)] == [f"{number}:" for number in kept]
    ((count, first),) = left_out(pairs).values()
    numbers = [int(origin.removeprefix(f"{name} row ")) for origin in first]
    assert all(number % 3 == 0 for number in numbers)
    assert not any(number % 3 == 0 for number in kept)
    assert len(kept) + count == 12
    assert min(kept + numbers) > 30


def test_no_row_can_train(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    name = write([row("q", "a", "a"), row("q", " ", "a"), row("p", "b", "b")])
    with pytest.raises(UserError) as caught:
        load(name, tokenizer)
    assert str(caught.value) == f"{name} 1.0: none of 3 rows can train (2 identical responses, 1 empty response)"


GOOD = row("q", "a", "b")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD, {"prompt": "q", "chosen": "a", "rejected": None}, GOOD],
            "row 2: field rejected is missing or null; fields: prompt, chosen",
        ),
        (
            [
                GOOD,
                {"chosen": "a"},
                {"prompt": "q", "chosen": 1, "rejected": 2},
                GOOD,
                {"chosen": "b"},
                {"chosen": "c"},
            ],
            "row 2: field rejected is missing or null; fields: chosen (rows: 2 more like it, 1 with other faults)",
        ),
        (
            [GOOD, row("q", "a", "a"), row("q", 1, 2), row("q", 3, 4)],
            "row 3: field chosen is int, expected text, a message or a list of messages (rows: 1 more like it)",
        ),
        (
            [GOOD, row("q", "\ud83d", "b"), {"text": "q"}],
            "row 2: holds '\\ud83d', half a character and no text (rows: 1 with other faults)",
        ),
        (
            [row([{"role": "user", "content": "q"}], "a", "b")] * 3,
            "row 1: holds messages, but the tokenizer has no chat template; set chat_template_name (e.g. tulu) "
            "(rows: 2 more like it)",
        ),
    ],
)
def test_rows_that_cannot_be_read_stop_the_run(
    rows: list[dict[str, Any]], message: str, tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]
) -> None:
    name = write(rows)
    with pytest.raises(UserError) as caught:
        load(name, tokenizer)
    assert str(caught.value) == f"{name} {message}"


def test_a_bad_row_in_the_second_part_is_named(tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    good, bad = write([GOOD] * 5), write([GOOD, {"prompt": "q"}], "bad.jsonl")
    with pytest.raises(UserError) as caught:
        load_pairs(parse_mixture([good, "1.0", bad, "1.0"], ["train"]), tokenizer, FREE)
    assert str(caught.value) == f"{bad} row 2: field chosen is missing or null; fields: prompt"


# --------------------------------------------------------------------------------------------------------------- cache


def test_rows_are_tokenised_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write: Callable[..., str], tokenised: list[str]
) -> None:
    name = write([*tiny.text_rows(20), row("q", "a", "a")])
    first = load(name, tokenizer, Truncation(16, None))
    assert len(tokenised) == 21
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    second = load(name, again, Truncation(16, None))
    assert len(tokenised) == 21
    assert tokens(first) == tokens(second)
    assert first.describe() == second.describe()
    assert (origins(first), left_out(first)) == (origins(second), left_out(second))
    assert (first.response_keys == second.response_keys).all()


def test_a_faulty_file_is_not_cached_as_good(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str], tokenised: list[str]
) -> None:
    name = write([GOOD, {"prompt": "q"}])
    for _ in range(2):
        with pytest.raises(UserError, match="row 2: field chosen is missing"):
            load(name, tokenizer)
    write([GOOD, GOOD | {"prompt": "p"}])
    assert len(load(name, tokenizer)) == 2


def test_a_moved_or_touched_file_is_not_tokenised_again(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str], tokenised: list[str]
) -> None:
    rows = tiny.text_rows(5)
    load(write(rows), tokenizer)
    os.utime(write(rows), ns=(1, 1))
    pairs = load(write(rows, "other.jsonl"), tokenizer)
    assert len(tokenised) == 5
    assert pairs.origin(0).endswith("other.jsonl row 1")


def test_only_the_changed_part_of_a_mixture_is_tokenised_again(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str], tokenised: list[str]
) -> None:
    first, second = write(tiny.text_rows(5), "first.jsonl"), write(tiny.text_rows(7, seed=1), "second.jsonl")
    load_pairs(parse_mixture([first, "1.0", second, "1.0"], ["train"]), tokenizer, FREE)
    assert len(tokenised) == 12
    write(tiny.text_rows(8, seed=2), "second.jsonl")
    load_pairs(parse_mixture([first, "1.0", second, "3"], ["train"]), tokenizer, FREE)
    assert len(tokenised) == 15


def test_a_part_of_what_is_tokenised_is_not_tokenised_again(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str], tokenised: list[str]
) -> None:
    rows = [*tiny.text_rows(20), row("q", "a", "a")]
    name = write(rows)
    load(name, tokenizer)
    for split, amount in (("train[:7]", "1.0"), ("train[5:]+train[:2]", "3"), ("train[-3:]", "2.5")):
        pairs = load_pairs(parse_mixture([name, amount], [split]), tokenizer, FREE)
        numbers = [int(origin.rsplit(" ", 1)[1]) - 1 for origin in origins(pairs)]
        assert tokens(pairs) == [tokenise(read(rows[number]), tokenizer, FREE)[0] for number in numbers]
        gathered = [ids for column in pairs.columns(4) for ids in column]
        assert sum(len(column.ids) for column in gathered) == sum(
            len(ids) for pair in tokens(pairs) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        )
    assert len(tokenised) == 21


def test_the_cache_does_not_depend_on_the_number_of_workers(
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., str],
    tokenised: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_shards, "_ROWS_PER_WORKER", 5)
    name = write(tiny.text_rows(20))
    first = load(name, tokenizer, num_workers=1)
    second = load(name, tokenizer, num_workers=2)
    assert len(tokenised) == 20
    assert tokens(first) == tokens(second)


@pytest.mark.parametrize(
    "change", ["content", "slice", "tokenizer", "special token", "template", "max_seq_length", "max_prompt_length"]
)
def test_what_decides_the_ids_decides_the_cache(
    change: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write: Callable[..., str], tokenised: list[str]
) -> None:
    rows = tiny.text_rows(20)
    name = write(rows)
    load(name, tokenizer, Truncation(16, 5))
    truncation, split, expected = Truncation(16, 5), "train", rows
    if change == "content":
        expected = [*rows[:-1], rows[-1] | {"chosen": "other"}]
        write(expected)
    elif change == "slice":
        split, expected = "train[:19]", rows[:19]
        for kept in cache_folder().rglob("*.arrow"):
            kept.unlink()
    elif change == "tokenizer":
        tokenizer.add_tokens(["cat"])
    elif change == "special token":
        tokenizer.eos_token = "<pad>"
    elif change == "template":
        tokenizer.chat_template = chat_template("tulu")
    elif change == "max_seq_length":
        truncation = Truncation(15, 5)
    else:
        truncation = Truncation(16, 6)
    pairs = load_pairs(parse_mixture([name, "1.0"], [split]), tokenizer, truncation)
    assert len(tokenised) == 20 + len(expected)
    assert tokens(pairs) == [tokenise(read(r), tokenizer, truncation)[0] for r in expected]


# ------------------------------------------------------------------------------------------------------------- workers


def test_two_workers_give_what_one_gives(
    tokenizer: PreTrainedTokenizerFast, write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_shards, "_ROWS_PER_WORKER", 50)
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", 20)
    rows = [*tiny.text_rows(200), row("q", "a", "a"), *tiny.text_rows(30, seed=1), row("q", "", "b")]
    name = write(rows)
    serial = load(name, tokenizer, Truncation(16, None), num_workers=1)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another_cache")
    seen: list[Any] = []
    monkeypatch.setattr(token_shards, "response_key", lambda *ids: seen.append(ids) or response_key(*ids))
    parallel = load(name, tokenizer, Truncation(16, None), num_workers=2)
    assert len(seen) == 3 * 20  # the first shard; other processes did the rest
    assert tokens(parallel) == tokens(serial)
    assert parallel.describe() == serial.describe()
    assert origins(parallel) == origins(serial)
    assert left_out(parallel) == left_out(serial)
    assert (parallel.response_keys == serial.response_keys).all()
    assert parallel.prompt_lengths.tolist() == serial.prompt_lengths.tolist()


@pytest.mark.parametrize(
    ("num_workers", "rows_per_worker", "shard_rows", "expected"),
    [(8, 500, 1, None), (8, 10, 1, 2), (1, 10, 1, None), (8, 1, 1, 8), (8, 1, 10, None), (8, 1, 7, 2)],
)
def test_no_more_workers_than_the_rows_are_worth(
    num_workers: int,
    rows_per_worker: int,
    shard_rows: int,
    expected: int | None,
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def alone(do: Any, arguments: Any, count: int, look: Any) -> None:
        asked.append(count)
        do(*arguments)

    monkeypatch.setattr(token_shards, "run_workers", alone)
    monkeypatch.setattr(token_shards, "_ROWS_PER_WORKER", rows_per_worker)
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", shard_rows)
    assert len(load(write(tiny.text_rows(20)), tokenizer, num_workers=num_workers)) == 20
    assert asked == ([] if expected is None else [expected])
