"""Which tokens are scored where every turn of the assistant is, against labels masked by other code."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from open_po.data.chat_templates import CHAT_TEMPLATES
from open_po.data.formats import MessagePair, RowError, TextPair
from open_po.data.tokenization import LeftOut, PreferencePair, Truncation, response_key, tokenise
from open_po.data.turns import Turns, within
from tests import tiny
from tests.masked import IGNORED, labels_of, masked
from tests.messages import assistant, system, user

FREE = Truncation(10_000, None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# Thoughts are rendered in the last turn alone, as Qwen3 does.
THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system prompt stands in the last of the user's turns, as Mistral's templates have it.
WANDERING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.index0 == messages | length - 1 or loop.index0 == messages | length - 2 %}SYSTEM {% endif %}"
    "{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

CONVERSATIONS = {
    "one turn": MessagePair([user("a red cat")], [assistant("runs")], [assistant("sleeps quickly")]),
    "several turns": MessagePair(
        [system("the dog"), user("a red cat"), assistant("runs"), user("but"), assistant("a dog"), user("and")],
        [assistant("over")],
        [assistant("under the tree")],
    ),
    "answers of several messages": MessagePair(
        [user("a red cat"), assistant("runs"), user("but")],
        [assistant("over"), user("the tree"), assistant("sleeps"), user("a")],
        [assistant("under"), user("the house"), assistant("eats"), assistant("sees")],
    ),
    "the assistant begins": MessagePair([assistant("a dog"), user("runs")], [assistant("over")], [assistant("and")]),
    "the assistant goes on": MessagePair(
        [user("a red cat"), assistant("runs")], [assistant("over")], [assistant("under")]
    ),
}


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_are_those_of_another_code(template: str, name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    pair = CONVERSATIONS[name]
    got, lost = tokenise(pair, tokenizer, FREE, "all")
    assert lost == (0, 0, 0)
    plain, _ = tokenise(pair, tokenizer, FREE)
    assert got == PreferencePair(plain.prompt_ids, plain.chosen_ids, plain.rejected_ids, got.turns)
    for side, answer in enumerate((pair.chosen, pair.rejected)):
        ids, labels = masked(pair.prompt + answer, tokenizer)
        assert labels_of(got, side)[0] == ids
        assert labels_of(got, side)[1][1:] == labels[1:]  # a first token is predicted by nothing
        assert sum(label != IGNORED for label in labels[1:]) == got.scored_tokens[0] + got.scored_tokens[1 + side]


def test_one_turn_alone_is_what_it_was(tokenizer: Any) -> None:
    """So that reference log-probs are found that were computed before."""
    tokenizer.chat_template = CHAT_TEMPLATES["tulu"]
    pair, _ = tokenise(CONVERSATIONS["one turn"], tokenizer, FREE, "all")
    assert pair.turns == Turns()
    assert pair == tokenise(CONVERSATIONS["one turn"], tokenizer, FREE)[0]


def test_text_has_no_turns(tokenizer: Any) -> None:
    row = TextPair("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e")
    assert tokenise(row, tokenizer, FREE, "all") == tokenise(row, tokenizer, FREE)


@pytest.mark.parametrize("kept", ["keep_end", "keep_start"])
@pytest.mark.parametrize("limits", [(40, None), (40, 30), (60, 9), (34, 1), (90, 60)])
def test_truncation_cuts_labels_alongside(kept: Any, limits: tuple[int, int | None], tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATES["zephyr"]
    pair = CONVERSATIONS["answers of several messages"]
    whole, _ = tokenise(pair, tokenizer, FREE, "all")
    try:
        cut, lost = tokenise(pair, tokenizer, Truncation(*limits, kept), "all")
    except LeftOut:
        pytest.fail("these limits leave something")
    start = len(whole.prompt_ids) - len(cut.prompt_ids) if kept == "keep_end" else 0
    assert lost.prompt == len(whole.prompt_ids) - len(cut.prompt_ids)
    for side in (0, 1):
        expected = []
        for values in labels_of(whole, side):
            prompt, response = values[: len(whole.prompt_ids)], values[len(whole.prompt_ids) :]
            length = len((cut.chosen_ids, cut.rejected_ids)[side])
            expected.append(prompt[start : start + len(cut.prompt_ids)] + response[:length])
        ids, labels = labels_of(cut, side)
        assert ids == expected[0]
        assert labels[1:] == expected[1][1:]
        assert labels[0] == IGNORED


def test_a_response_whose_turn_is_cut_off_cannot_train(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    pair = MessagePair([user("x")], [user("abcdef"), assistant("g")], [assistant("h")])
    assert tokenise(pair, tokenizer, Truncation(8, None), "all")[0].turns.chosen == ((0, 6),)
    with pytest.raises(LeftOut, match=r"^a response without a turn of the assistant, after truncation$"):
        tokenise(pair, tokenizer, Truncation(5, None), "all")


def test_an_earlier_turn_that_is_rendered_without_its_thoughts(tokenizer: Any) -> None:
    tokenizer.chat_template = THOUGHTFUL
    pair, _ = tokenise(CONVERSATIONS["several turns"], tokenizer, FREE, "all")
    scored = [tokenizer.decode(pair.prompt_ids[start:end]) for start, end in pair.turns.prompt]
    assert scored == ["runs<|im_end|>\n", "a dog<|im_end|>\n"]
    assert tokenizer.decode(pair.chosen_ids) == "<think>\n\n</think>\n\nover<|im_end|>\n"
    assert pair.turns.chosen == pair.turns.rejected == ()


@pytest.mark.parametrize(
    ("template", "number"),
    [
        (WANDERING, 2),
        (THOUGHTFUL.replace("m['content']", "m['content'].replace('runs', 'walks')"), 3),
    ],
)
def test_turns_that_cannot_be_told(template: str, number: int, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    prompt = CONVERSATIONS["several turns"].prompt[number == 2 :]
    pair = MessagePair(prompt, [assistant("over")], [assistant("under")])
    tokenise(pair, tokenizer, FREE)
    with pytest.raises(RowError) as caught:
        tokenise(pair, tokenizer, FREE, "all")
    assert str(caught.value) == (
        f"has an assistant's turn, message {number}, that the chat template renders otherwise when it is the last one, "
        "so that its tokens cannot be told; use scored_turns last or another chat_template_name"
    )


def test_random_conversations(tokenizer: Any) -> None:
    rng = random.Random(0)

    def words() -> str:
        return " ".join(rng.choice(tiny.WORDS) for _ in range(rng.randint(1, 5)))

    for template in CHAT_TEMPLATES.values():
        tokenizer.chat_template = template
        for _ in range(30):
            prompt = [system(words())] * rng.randint(0, 1)
            for _ in range(rng.randint(0, 4)):
                prompt += [user(words()), assistant(words())]
            prompt.append(user(words()))
            answers = [[assistant(words()), user(words()), assistant(words())][: rng.choice((1, 3))] for _ in range(2)]
            if answers[0] == answers[1]:
                continue
            pair, _ = tokenise(MessagePair(prompt, *answers), tokenizer, FREE, "all")
            for side, answer in enumerate(answers):
                ids, labels = masked(prompt + answer, tokenizer)
                assert (ids, labels[1:]) == (labels_of(pair, side)[0], labels_of(pair, side)[1][1:])


# ---------------------------------------------------------------------------------------------------------------- runs

places = st.lists(st.integers(0, 12), max_size=6, unique=True).map(sorted)
runs = places.map(lambda ends: tuple(zip(ends[::2], ends[1::2], strict=False)))


@given(runs, st.integers(0, 12), st.integers(0, 12), st.integers(-3, 3))
def test_parts_of_runs(given_runs: Any, start: int, end: int, origin: int) -> None:
    held = {place for first, behind in given_runs for place in range(first, behind)}
    found = within(given_runs, start, end, counted_from=origin)
    assert [place for first, behind in found for place in range(first, behind)] == [
        place - origin for place in sorted(held) if start <= place < end
    ]


@given(runs, runs, runs)
def test_turns_come_back(prompt: Any, chosen: Any, rejected: Any) -> None:
    turns = Turns(prompt, chosen, rejected)
    assert Turns.of(turns.flat()) == turns


_ids = st.lists(st.integers(0, 3), max_size=4)


@given(st.tuples(_ids, _ids, runs, runs), st.tuples(_ids, _ids, runs, runs))
def test_keys_know_what_is_scored(one: Any, other: Any) -> None:
    assert (response_key(*one) == response_key(*other)) == (one == other)


def test_keys_of_whole_responses_stay() -> None:
    """Caches of earlier versions have them."""
    assert response_key([1, 2, 3], [4, 5]) == response_key([1, 2, 3], [4, 5], (), ())
    assert response_key([1, 2, 3], [4, 5]).hex() == "2c9046d32753ef133cf64632700a8652"
