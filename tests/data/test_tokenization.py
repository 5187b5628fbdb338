"""Token ids of a pair: where the prompt ends, special tokens, templates, truncation, and rows that cannot train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from open_po.data.chat_templates import chat_template
from open_po.data.formats import MessagePair, RowError, TextPair
from open_po.data.tokenization import LeftOut, PreferencePair, Truncation, response_key, tokenise, tokenizer_digest
from open_po.errors import UserError
from tests import tiny
from tests.messages import assistant, user

FREE = Truncation(10_000, None)

# One token per letter, and these pairs merge.
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
LETTERS = "abcdwxyz<>|\n:"
MERGES = [("a", "b"), ("ab", "c"), ("c", "d")]
VOCABULARY = {
    token: index for index, token in enumerate([*SPECIAL.values(), *LETTERS, *(left + right for left, right in MERGES)])
}
BOS, EOS = VOCABULARY["<s>"], VOCABULARY["</s>"]


def merging_tokenizer(*, adds: str = "", **special: str | None) -> PreTrainedTokenizerFast:
    """A BPE tokenizer over a few letters that by itself adds `<s>` and `</s>` where `adds`, such as `<s> $A`, says."""
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=MERGES))
    if adds:
        special_ids = [("<s>", BOS), ("</s>", EOS)]
        backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special_ids)
    given = {name: token for name, token in (SPECIAL | special).items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def ids(*tokens: str) -> list[int]:
    return [VOCABULARY[token] for token in tokens]


def text(
    prompt: str, chosen: str, rejected: str, tokenizer: Any = None, truncation: Truncation = FREE
) -> PreferencePair:
    pair, _ = tokenise(TextPair(prompt, chosen, rejected), tokenizer or merging_tokenizer(), truncation)
    return pair


# ------------------------------------------------------------------------------------------------------ prompt boundary


def test_without_a_merge_the_prompt_is_the_prompts_own_ids() -> None:
    pair = text("xy", "zw", "w")
    assert pair == PreferencePair(ids("x", "y"), ids("z", "w", "</s>"), ids("w", "</s>"))


def test_a_merge_across_the_boundary_goes_to_the_response() -> None:
    """`xa` + `bw` is x ab w: a was never in front of the response, so it is scored, and in the other response too."""
    pair = text("xa", "bw", "zw")
    assert pair == PreferencePair(ids("x"), ids("ab", "w", "</s>"), ids("a", "z", "w", "</s>"))
    swapped = text("xa", "zw", "bw")
    assert swapped == PreferencePair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids)


def test_a_merge_in_both_responses_is_in_neither_prompt() -> None:
    """The prompt's own ids end in a, so the token ab that both responses begin with is scored twice, not shared."""
    assert text("xa", "bw", "bz") == PreferencePair(ids("x"), ids("ab", "w", "</s>"), ids("ab", "z", "</s>"))


def test_a_merge_over_more_than_one_token() -> None:
    assert text("xab", "cw", "w") == PreferencePair(ids("x"), ids("abc", "w", "</s>"), ids("ab", "w", "</s>"))


def test_what_the_responses_share_is_scored() -> None:
    assert text("x", "yyz", "yyw") == PreferencePair(ids("x"), ids("y", "y", "z", "</s>"), ids("y", "y", "w", "</s>"))


@given(st.text("abcdx", min_size=1), st.text("abcdx", min_size=1), st.text("abcdx", min_size=1))
def test_the_prompt_is_the_longest_common_prefix(prompt: str, chosen: str, rejected: str) -> None:
    if chosen == rejected:
        return
    tokenizer = merging_tokenizer()
    own, *whole = (tokenizer(t)["input_ids"] for t in (prompt, prompt + chosen, prompt + rejected))
    shared = 0
    while shared < len(own) and all(len(w) > shared and w[shared] == own[shared] for w in whole):
        shared += 1
    pair = text(prompt, chosen, rejected, tokenizer)
    if shared:
        assert pair.prompt_ids == own[:shared]
        assert pair.prompt_ids + pair.chosen_ids == [*whole[0], EOS]
        assert pair.prompt_ids + pair.rejected_ids == [*whole[1], EOS]
    else:
        assert pair == PreferencePair([BOS], [*whole[0], EOS], [*whole[1], EOS])


# ------------------------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize(
    ("adds", "prompt"),
    [("$A", ["x"]), ("<s> $A", ["<s>", "x"]), ("$A </s>", ["x"]), ("<s> $A </s>", ["<s>", "x"])],
)
def test_tokenizers_that_add_bos_and_eos_themselves(adds: str, prompt: list[str]) -> None:
    """BOS once, in the prompt; EOS once, at the end of each response and not between prompt and response."""
    tokenizer = merging_tokenizer(adds=adds)
    assert text("x", "y", "zw", tokenizer) == PreferencePair(ids(*prompt), ids("y", "</s>"), ids("z", "w", "</s>"))


def test_eos_written_in_the_response_is_not_doubled() -> None:
    assert text("x", "y</s>", "z") == PreferencePair(ids("x"), ids("y", "</s>"), ids("z", "</s>"))


def test_eos_inside_a_response_does_not_count_as_its_end() -> None:
    assert text("x", "y</s>z", "z").chosen_ids == ids("y", "</s>", "z", "</s>")


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_an_empty_prompt_becomes_bos(adds: str) -> None:
    pair = text("", "y", "z", merging_tokenizer(adds=adds))
    assert pair == PreferencePair(ids("<s>"), ids("y", "</s>"), ids("z", "</s>"))


def test_a_prompt_that_merges_away_becomes_bos() -> None:
    assert text("a", "b", "z") == PreferencePair(ids("<s>"), ids("ab", "</s>"), ids("a", "z", "</s>"))


@pytest.mark.parametrize("prompt", ["", "a"])
def test_without_a_prompt_and_without_bos_a_row_cannot_train(prompt: str) -> None:
    with pytest.raises(LeftOut, match=r"^no prompt token before the response, and the tokenizer has no BOS$"):
        text(prompt, "bx", "z", merging_tokenizer(bos_token=None))


# ----------------------------------------------------------------------------------------------------------- templates


MINIMAL = (
    "{% for m in messages %}<{{ 'w' if m['role'] == 'user' else 'z' }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<z>{% endif %}"
)


def messages(
    template: str | None, pair: MessagePair, tokenizer: Any = None, truncation: Truncation = FREE
) -> PreferencePair:
    tokenizer = tokenizer or merging_tokenizer()
    tokenizer.chat_template = template
    tokens, _ = tokenise(pair, tokenizer, truncation)
    return tokens


PAIR = MessagePair([user("x")], [assistant("ab")], [assistant("y")])


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_template_is_the_whole_truth_about_special_tokens(adds: str) -> None:
    """No EOS behind a rendered message and no BOS before it, unless the template writes them."""
    pair = messages(MINIMAL, PAIR, merging_tokenizer(adds=adds))
    assert pair == PreferencePair(ids("<", "w", ">", "x", "<", "z", ">"), ids("ab"), ids("y"))


@pytest.mark.parametrize("adds", ["$A", "<s> $A"])
def test_a_template_that_writes_bos_and_eos(adds: str) -> None:
    template = "{{ bos_token }}" + MINIMAL.replace("{% endfor", "{{ eos_token if m['role'] == 'assistant' }}{% endfor")
    pair = messages(template, PAIR, merging_tokenizer(adds=adds))
    assert pair == PreferencePair(ids("<s>", "<", "w", ">", "x", "<", "z", ">"), ids("ab", "</s>"), ids("y", "</s>"))


def test_messages_before_the_answer_are_prompt() -> None:
    pair = messages(MINIMAL, MessagePair([user("x"), assistant("y"), user("z")], PAIR.chosen, PAIR.rejected))
    assert pair.prompt_ids == ids("<", "w", ">", "x", "<", "z", ">", "y", "<", "w", ">", "z", "<", "z", ">")


def test_an_answer_of_several_messages_is_scored_whole() -> None:
    pair = messages(MINIMAL, MessagePair(PAIR.prompt, [assistant("y"), user("z"), assistant("w")], PAIR.rejected))
    assert pair.chosen_ids == ids("y", "<", "w", ">", "z", "<", "z", ">", "w")


def test_a_merge_between_generation_prompt_and_answer() -> None:
    template = "{% for m in messages %}a{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    pair = messages(template, MessagePair([user("x")], [assistant("bw")], [assistant("z")]))
    assert pair == PreferencePair(ids("a", "x"), ids("ab", "w"), ids("a", "z"))


def test_a_generation_prompt_that_is_no_prefix_of_the_rendered_answer() -> None:
    """Only what all three renderings share is prompt: `<z>|` opens an answer, but a finished one begins `<z>:`."""
    template = (
        "{% for m in messages %}{{ '<w>' if m['role'] == 'user' else '<z>:' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<z>|{% endif %}"
    )
    pair = messages(template, PAIR)
    assert pair == PreferencePair(ids("<", "w", ">", "x", "<", "z", ">"), ids(":", "ab"), ids(":", "y"))


def test_tulu(tmp_path: Path) -> None:
    """Expected strings from the Tulu models' own template; `</s>` is this tokenizer's EOS."""
    tokenizer = tiny.make_tokenizer(tmp_path)
    tokenizer.chat_template = chat_template("tulu")
    prompt = [{"role": "system", "content": "s"}, user("q1"), assistant("a1"), user("q2")]
    pair, _ = tokenise(MessagePair(prompt, [assistant("good")], [assistant("bad")]), tokenizer, FREE)
    assert tokenizer.decode(pair.prompt_ids) == (
        "<s><|system|>\ns\n<|user|>\nq1\n<|assistant|>\na1</s>\n<|user|>\nq2\n<|assistant|>\n"
    )
    assert tokenizer.decode(pair.chosen_ids) == "good</s>"
    assert tokenizer.decode(pair.rejected_ids) == "bad</s>"
    assert pair.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_tulu_without_bos_token(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(tmp_path, bos_token=None)
    tokenizer.chat_template = chat_template("tulu")
    pair, _ = tokenise(MessagePair([user("q")], [assistant("good")], [assistant("bad")]), tokenizer, FREE)
    assert tokenizer.decode(pair.prompt_ids) == "<|user|>\nq\n<|assistant|>\n"


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(MINIMAL + "{# caf\u00e9 #}", encoding="utf-8")
    assert messages(chat_template(str(path)), PAIR) == messages(MINIMAL, PAIR)


def test_templates_that_cannot_be_read(tmp_path: Path) -> None:
    message = (
        "chat_template_name 'tulip' is none of tulu, chatml, zephyr, and no readable file (No such file or directory)"
    )
    with pytest.raises(UserError) as caught:
        chat_template("tulip")
    assert str(caught.value) == message
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is none of tulu, chatml, zephyr, and no readable file"):
        chat_template(str(tmp_path / "latin.jinja"))


@pytest.mark.parametrize(
    ("template", "pair", "message"),
    [
        (None, PAIR, "holds messages, but the tokenizer has no chat template; set chat_template_name (e.g. tulu)"),
        (
            chat_template("tulu"),
            MessagePair([{"role": "tool", "content": "x"}], PAIR.chosen, PAIR.rejected),
            "is refused by the chat template (the tulu template has no role tool)",
        ),
        ("{{ messages[9]['content'] + 'x' }}", PAIR, "is refused by the chat template ("),
        ("{% if %}", PAIR, "is refused by the chat template ("),
    ],
)
def test_rows_that_cannot_be_rendered(template: str | None, pair: MessagePair, message: str) -> None:
    with pytest.raises(RowError) as caught:
        messages(template, pair)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_half_a_character_is_no_text() -> None:
    for prompt, chosen in (("x\ud83d", "y"), ("x", "\ud83dy")):
        with pytest.raises(RowError, match=r"^holds '\\ud83d', half a character and no text$"):
            text(prompt, chosen, "z")


# ----------------------------------------------------------------------------------------------------------- left out


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (TextPair("x", "y", "y"), "identical responses"),
        (TextPair("x", "", "y"), "empty response"),
        (TextPair("x", "y", " \n"), "empty response"),
        (TextPair("x", "", ""), "identical responses"),
        (MessagePair([user("x")], [assistant("y")], [assistant("y")]), "identical responses"),
        (MessagePair([user("x")], [assistant("y")], [assistant(" ")]), "empty response"),
    ],
)
def test_pairs_that_cannot_train(pair: TextPair | MessagePair, reason: str) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = MINIMAL
    with pytest.raises(LeftOut, match=f"^{reason}$"):
        tokenise(pair, tokenizer, FREE)


def test_a_template_that_drops_an_answer() -> None:
    template = MINIMAL.replace("{{ m['content'] }}", "{{ m['content'].replace('y', '') }}")
    with pytest.raises(LeftOut, match=r"^empty response after the chat template$"):
        messages(template, PAIR)


def test_responses_that_differ_only_in_what_is_cut_off() -> None:
    truncation = Truncation(4, 1)
    with pytest.raises(LeftOut, match=r"^identical responses after truncation$"):
        text("x", "yzwy", "yzwz", truncation=truncation)
    assert text("x", "yzw", "yzx", truncation=truncation) == PreferencePair(
        ids("x"), ids("y", "z", "w"), ids("y", "z", "x")
    )


# --------------------------------------------------------------------------------------------------------- truncation


def test_truncation_is_told() -> None:
    tokenizer = merging_tokenizer()

    def lost(prompt: str, chosen: str, rejected: str, limit: int, prompt_limit: int | None = None) -> tuple[int, ...]:
        return tokenise(TextPair(prompt, chosen, rejected), tokenizer, Truncation(limit, prompt_limit))[1]

    # A response has an EOS behind it.
    assert lost("xx", "y", "z", 4) == (0, 0, 0)
    assert lost("xxx", "y", "z", 4) == (1, 0, 0)
    assert lost("xx", "yyy", "z", 4) == (0, 2, 0)
    assert lost("xx", "z", "yyy", 4) == (0, 0, 2)
    assert lost("xxx", "yyyy", "z", 4) == (1, 3, 0)
    assert lost("xx", "y", "z", 100, 1) == (1, 0, 0)


@pytest.mark.parametrize(
    ("lengths", "limits", "expected"),
    [  # tokens of (prompt, chosen, rejected); expected tokens, by hand
        ((5, 3, 2), (8, None), (5, 3, 2)),  # fits exactly
        ((6, 3, 2), (8, None), (5, 3, 2)),  # the prompt gives way
        ((9, 3, 2), (8, None), (5, 3, 2)),
        ((9, 9, 2), (8, None), (4, 4, 2)),  # half each
        ((9, 9, 9), (7, None), (3, 4, 4)),
        ((3, 9, 2), (8, None), (3, 5, 2)),  # a short prompt stays whole
        ((9, 1, 1), (2, None), (1, 1, 1)),
        ((9, 3, 2), (8, 6), (6, 2, 2)),  # a limit of its own holds whether or not the pair fits
        ((9, 3, 2), (80, 6), (6, 3, 2)),
        ((5, 3, 2), (8, 6), (5, 3, 2)),
        ((5, 9, 2), (8, 6), (5, 3, 2)),
    ],
)
def test_lengths_after_truncation(
    lengths: tuple[int, int, int], limits: tuple[int, int | None], expected: tuple[int, int, int]
) -> None:
    pair = PreferencePair(*(list(range(length)) for length in lengths))
    cut = Truncation(*limits)(pair)
    assert cut == PreferencePair(
        list(range(lengths[0] - expected[0], lengths[0])), list(range(expected[1])), list(range(expected[2]))
    )
    assert Truncation(*limits, "keep_start")(pair) == PreferencePair(*(list(range(length)) for length in expected))


_lengths = st.integers(1, 30)


@given(_lengths, _lengths, _lengths, st.integers(2, 40), st.data())
def test_truncation_rules(prompt: int, chosen: int, rejected: int, limit: int, data: st.DataObject) -> None:
    prompt_limit = data.draw(st.none() | st.integers(1, limit - 1))
    pair = PreferencePair(list(range(prompt)), list(range(100, 100 + chosen)), list(range(200, 200 + rejected)))
    cut = Truncation(limit, prompt_limit)(pair)
    longest = max(chosen, rejected)
    after = max(len(cut.chosen_ids), len(cut.rejected_ids))
    # The oldest prompt tokens and the newest response tokens go; nothing is lost altogether.
    assert cut.prompt_ids
    assert cut.chosen_ids
    assert cut.rejected_ids
    assert cut.prompt_ids == pair.prompt_ids[-len(cut.prompt_ids) :]
    assert cut.chosen_ids == pair.chosen_ids[: len(cut.chosen_ids)]
    assert cut.rejected_ids == pair.rejected_ids[: len(cut.rejected_ids)]
    # Never too long, and a response is cut only where it would be.
    assert len(cut.prompt_ids) + after <= limit
    for response, original in ((cut.chosen_ids, chosen), (cut.rejected_ids, rejected)):
        assert len(response) == original or len(cut.prompt_ids) + len(response) == limit
    if prompt_limit is not None:
        assert len(cut.prompt_ids) == min(prompt, prompt_limit)
    elif prompt + longest <= limit:
        assert cut == pair
    else:  # the room is used up; the prompt gives way first, down to half
        assert len(cut.prompt_ids) + after == limit
        assert len(cut.prompt_ids) == prompt or len(cut.prompt_ids) >= limit // 2
        assert after == longest or len(cut.prompt_ids) <= limit // 2


@given(st.text("abcdx", min_size=1), st.text("abcdx"), st.text("abcdx"), st.integers(2, 12))
def test_both_responses_keep_one_prompt_and_its_newest_tokens(prompt: str, good: str, bad: str, limit: int) -> None:
    """With responses that differ at once, so that they cannot become identical."""
    tokenizer = merging_tokenizer()
    whole = text(prompt, "y" + good, "z" + bad, tokenizer)
    cut = text(prompt, "y" + good, "z" + bad, tokenizer, Truncation(limit, None))
    assert cut.prompt_ids == whole.prompt_ids[len(whole.prompt_ids) - len(cut.prompt_ids) :]
    assert max(len(cut.prompt_ids + cut.chosen_ids), len(cut.prompt_ids + cut.rejected_ids)) <= limit


# --------------------------------------------------------------------------------------------------------------- names


_ids = st.lists(st.integers(0, 3), max_size=4)


@given(_ids, _ids, _ids, _ids)
def test_response_keys_are_equal_for_equal_ids_only(p: list[int], r: list[int], q: list[int], s: list[int]) -> None:
    assert (response_key(p, r) == response_key(q, s)) == ((p, r) == (q, s))


def test_response_keys_know_where_the_prompt_ends() -> None:
    keys = {response_key([1, 2, 3][:cut], [1, 2, 3][cut:]) for cut in range(4)}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {16}


def test_the_digest_names_what_decides_the_ids() -> None:
    digest = tokenizer_digest(merging_tokenizer())
    assert tokenizer_digest(merging_tokenizer()) == digest
    others = [merging_tokenizer(adds="<s> $A"), merging_tokenizer(bos_token="x"), merging_tokenizer()]
    others[2].chat_template = MINIMAL
    more = merging_tokenizer()
    more.add_tokens(["xyz"])
    split = merging_tokenizer()
    split.split_special_tokens = True
    digests = {digest, *(tokenizer_digest(other) for other in [*others, more, split])}
    assert len(digests) == 6


def test_using_a_tokenizer_leaves_its_digest(tmp_path: Path) -> None:
    """A tokenizer may be saved with truncation and padding on; the first call switches them off."""
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    digest = tokenizer_digest(tokenizer)
    assert len(text("x", "yyyyyyyy", "z", tokenizer).chosen_ids) == 9
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == digest


def test_tokenizers_without_a_fast_backend() -> None:
    tokenizer = ByT5Tokenizer()
    pair, _ = tokenise(TextPair("x", "y", "z"), tokenizer, FREE)
    assert pair == PreferencePair([ord("x") + 3], [ord("y") + 3, 1], [ord("z") + 3, 1])
    assert tokenizer_digest(ByT5Tokenizer()) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(ByT5Tokenizer(extra_ids=10)) != tokenizer_digest(tokenizer)
