"""Tokens as readable pieces: their texts together are the tokenizer's own decoding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from open_po.data.token_texts import Piece, pieces, visible
from tests import tiny

TEXTS = [
    "the red cat sleeps",
    " leading and  double spaces\n\n\tand tabs ",
    "Größe, 東京, 👩‍👩‍👧 and 😊!",
    "a\ufffdb \ufffd\ufffd",
    "e\u0301 \u202eright\u202c \u00a0.",
    "it 's , of course ,",  # what a clean-up of spaces would change
]
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` for spaces, a byte token for what has none, and decoding drops the first space."""
    letters = ["▁", *map(chr, range(97, 123))]
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    vocabulary |= {"▁t": len(vocabulary), "▁th": len(vocabulary) + 1, "▁the": len(vocabulary) + 2}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(backend)


def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    if request.param == "byte-level":
        return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return sentencepiece_like() if request.param == "sentencepiece" else wordpiece()


@pytest.fixture(scope="module")
def bytes_alone(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer(tmp_path_factory.mktemp("bytes"))


def decoded(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def assert_whole(ids: list[int], tokenizer: Any) -> list[Piece]:
    """Nothing is lost, added or changed."""
    found = pieces(ids, tokenizer)
    assert [token for piece in found for token in piece.ids] == ids
    text = "".join(piece.text for piece in found)
    expected = decoded(ids, tokenizer)
    if "\ufffd" in expected and tokenizer.convert_tokens_to_ids("<0x00>") != tokenizer.unk_token_id:
        # The decoder gives up every byte token beside half a character: read the bytes themselves.
        text, expected = (re.sub("\ufffd+", "\ufffd", each) for each in (text, from_bytes(ids, tokenizer)))
    assert text == expected
    return found


def from_bytes(ids: list[int], tokenizer: Any) -> str:
    names = [tokenizer.convert_ids_to_tokens(token) for token in ids]
    content = b"".join(
        bytes.fromhex(name[3:5]) if re.fullmatch("<0x..>", name) else name.replace("▁", " ").encode() for name in names
    )
    return content.decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_together_are_what_the_tokenizer_decodes(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert_whole([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *ids], tokenizer)
    for start in range(1, len(ids)):  # as truncation cuts, in the middle of a character too
        assert_whole(ids[start:], tokenizer)
        assert_whole(ids[:-start], tokenizer)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12))
def test_any_text(text: str, bytes_alone: PreTrainedTokenizerFast) -> None:
    found = assert_whole(bytes_alone(text, add_special_tokens=False)["input_ids"], bytes_alone)
    if "\ufffd" not in text:  # each piece is whole text by itself
        assert all(piece.text and "\ufffd" not in piece.text for piece in found)
        spoken = [piece for piece in found if piece.name is None]
        assert all(len(piece.ids) == 1 or any(ord(c) > 127 for c in piece.text) for piece in spoken)


def test_a_character_of_several_tokens_is_one_piece(bytes_alone: PreTrainedTokenizerFast) -> None:
    ids = bytes_alone("a😊é", add_special_tokens=False)["input_ids"]
    found = pieces(ids, bytes_alone)
    assert [(piece.text, len(piece.ids)) for piece in found] == [("a", 1), ("😊", 4), ("é", 2)]
    assert [piece.shown for piece in found] == ["a", "⟨😊=4 tokens⟩", "⟨é=2 tokens⟩"]
    assert [piece.text for piece in pieces(ids[:3], bytes_alone)] == ["a", "\ufffd"]  # of which truncation left two
    after_the_cut = pieces(ids[3:], bytes_alone)
    assert after_the_cut[-1].text == "é"
    assert {piece.text for piece in after_the_cut[:-1]} == {"\ufffd"}


def test_a_space_that_decoding_a_token_alone_would_drop_is_there() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer("the the", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert tokenizer.decode(ids[1:]) == "the"
    assert [piece.text for piece in pieces(ids, tokenizer)] == ["the", " the"]


def test_tokens_outside_the_text_are_told_from_text_that_looks_like_them(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(tmp_path)
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]"]})
    text = tokenizer("</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    outside = [tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "<think>", "[INST]", "</s>")]
    found = pieces([*outside, *text], tokenizer)
    assert [piece.shown for piece in found[:4]] == ["⟨s⟩", "⟨think⟩", "⟨[INST]⟩", "⟨/s⟩"]
    assert [piece.name for piece in found[:4]] == ["<s>", "<think>", "[INST]", "</s>"]
    assert "".join(piece.shown for piece in found[4:]) == "</s>"
    assert {piece.name for piece in found[4:]} == {None}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" word", " word"),
        ("two words", "two words"),
        ("word ", "word␣"),
        (" ", "␣"),
        ("   x", "␣␣␣x"),
        ("x  y", "x␣␣y"),
        ("a\n\n b", "a↵\n↵\n␣b"),
        ("\t\r\x07", "⇥⟨CR⟩⟨U+0007⟩"),
        ("\u200b\u00a0\u2028\u202e", "⟨U+200B⟩⟨NBSP⟩⟨U+2028⟩⟨U+202E⟩"),
        ("\x1b[31mred", "⟨U+001B⟩[31mred"),
        ("é漢😊", "é漢😊"),
    ],
)
def test_what_is_not_seen_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
