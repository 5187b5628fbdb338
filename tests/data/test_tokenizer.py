"""Tokenizers of different habits: BOS and EOS once, BOS before a template, none with a fast backend, revisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, ByT5Tokenizer, CTRLTokenizer, GPT2Tokenizer, LlamaTokenizer

from open_po.config import ModelConfig
from open_po.data.chat_templates import CHAT_TEMPLATES
from open_po.data.formats import MessagePair, TextPair
from open_po.data.tokenization import Truncation, tokenise, tokenizer_digest
from open_po.data.tokenizer import dated_template, load_tokenizer, no_slow_tokenizer
from open_po.errors import UserError
from tests import cli, tiny
from tests.messages import assistant, user

FREE = Truncation(10_000, None)
LETTERS = "▁abcdwxyz<>|\n:"


def llama(**habits: Any) -> Any:
    """With SentencePiece's ways."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    return LlamaTokenizer(vocab=vocabulary, merges=[], **habits)


def gpt2(**habits: Any) -> Any:
    """One token is BOS and EOS, and none is added."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *letters])}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], **habits)


TOKENIZERS: dict[str, Any] = {
    "llama": lambda: llama(add_bos_token=True),
    "llama without BOS": llama,
    "llama with both": lambda: llama(add_bos_token=True, add_eos_token=True),
    "gpt2": gpt2,
    "gpt2 with BOS": lambda: gpt2(add_bos_token=True),
    "in Python": ByT5Tokenizer,  # adds EOS
}
ADD_BOS = ("llama", "llama with both", "gpt2 with BOS")


def texts(pair: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]


@pytest.mark.parametrize("written", ["", "bos", "eos", "both"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_gets_bos_and_eos_once(name: str, written: str) -> None:
    """Whether the tokenizer adds them, the text has them, both, or neither; BOS only where either does."""
    tokenizer = TOKENIZERS[name]()
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    opened, closed = written in ("bos", "both"), written in ("eos", "both")
    row = TextPair(f"{bos if opened else ''}xa", f"y{eos if closed else ''}", f"zw{eos if closed else ''}")
    pair, _ = tokenise(row, tokenizer, FREE)
    for response in (pair.chosen_ids, pair.rejected_ids):
        assert response.count(tokenizer.eos_token_id) == 1
        assert response[-1] == tokenizer.eos_token_id
    expected = int(name in ADD_BOS or (bool(bos) and opened))
    assert pair.prompt_ids[:expected] == [tokenizer.bos_token_id] * expected
    specials = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert not specials & set(pair.prompt_ids[expected:] + pair.chosen_ids[:-1] + pair.rejected_ids[:-1])


TEMPLATES = {  # of a turn: what is written before all, and behind an answer
    "neither": ("", ""),
    "BOS": ("{{ bos_token }}", ""),
    "EOS": ("", "{{ eos_token }}"),
    "EOS and a line break": ("{{ bos_token }}", "{{ eos_token }}\n"),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["llama", "llama with both", "gpt2", "gpt2 with BOS"])
def test_messages_get_what_the_template_writes(name: str, template: str) -> None:
    tokenizer = TOKENIZERS[name]()
    before, behind = TEMPLATES[template]
    tokenizer.chat_template = (
        before + "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
        f"{{% if m['role'] == 'assistant' %}}{behind}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    row = MessagePair([user("x")], [assistant("y")], [assistant("zw")])
    pair, _ = tokenise(row, tokenizer, FREE)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = pair.prompt_ids + pair.chosen_ids
    assert (ids[0] == bos, ids[1:].count(bos)) == (bool(before), int(bool(behind) and bos == eos))
    assert pair.chosen_ids.count(eos) == pair.rejected_ids.count(eos) == int(bool(behind))
    if behind:
        place = pair.chosen_ids.index(eos)
        assert tokenizer.decode(pair.chosen_ids[place + 1 :]) == ("\n" if behind.endswith("\n") else "")


# ---------------------------------------------------------------------------------------------------------------- BOS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.make_tokenizer(tmp_path)
    return tmp_path


def given_template(folder: Path, template: Any) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, *, add_bos: bool = True, **fields: Any) -> Any:
    return load_tokenizer(ModelConfig(model_name_or_path=str(folder), **fields), add_bos=add_bos)


ROW = MessagePair([user("q"), assistant("a"), user("r")], [assistant("good")], [assistant("bad")])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_bos_is_put_before_a_template_once(name: str, folder: Path, tmp_path: Path) -> None:
    """Also of tulu, which has one itself where open-instruct's has none."""
    plain, _ = tokenise(ROW, loaded(folder, add_bos=False, chat_template_name=name), FREE)
    tokenizer = loaded(folder, chat_template_name=name)
    pair, _ = tokenise(ROW, tokenizer, FREE)
    without = plain.prompt_ids[1:] if plain.prompt_ids[0] == tokenizer.bos_token_id else plain.prompt_ids
    assert pair.prompt_ids == [tokenizer.bos_token_id, *without]
    assert pair.chosen_ids == plain.chosen_ids
    assert (name == "tulu") == (without != plain.prompt_ids)
    tokenizer.save_pretrained(tmp_path / "saved")  # whoever uses the model renders as it was trained
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenise(ROW, again, FREE)[0] == pair


def test_bos_is_put_before_each_of_several_templates(folder: Path) -> None:
    given_template(folder, {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ messages[0]['role'] }}"})
    templates = loaded(folder).chat_template
    assert templates == {
        "default": "{{ bos_token }}{{ messages[0]['content'] }}",
        "tool_use": "{{ bos_token }}{{ messages[0]['role'] }}",
    }


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages[9]['content'] }}",
        "{{- bos_token -}}x{{ raise_exception('only long conversations') }}",
        "<s>{{ messages[9]['content'] }}",
        "{% if messages %}{% set first = bos_token %}{{ first }}{% endif %}x",
    ],
)
def test_a_template_that_begins_with_bos_is_refused(template: str, folder: Path) -> None:
    given_template(folder, template)
    loaded(folder, add_bos=False)
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert str(caught.value) == (
        "add_bos: the chat template begins with BOS itself, so that there would be two; leave add_bos out"
    )


def test_what_cannot_have_a_bos(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^add_bos: the tokenizer has no chat template to put BOS before; set chat_"):
        loaded(folder)
    tiny.make_tokenizer(tmp_path / "none", bos_token=None)
    with pytest.raises(UserError, match=r"^add_bos: the tokenizer has no BOS token; set bos_token in its tokenizer_"):
        loaded(tmp_path / "none", chat_template_name="zephyr")


def test_bos_is_not_put_before_text(folder: Path) -> None:
    row = TextPair("q", "good", "bad")
    one, other = (loaded(folder, add_bos=on, chat_template_name="chatml") for on in (True, False))
    assert tokenise(row, one, FREE) == tokenise(row, other, FREE)


# -------------------------------------------------------------------------------------------------- names of templates


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"),
        ("zephyr", "<|system|>\ns</s>\n<|user|>\nq</s>\n<|assistant|>\n"),
    ],
)
def test_templates_by_name(name: str, expected: str, folder: Path) -> None:
    """Expected strings from the models' own templates."""
    tokenizer = loaded(folder, add_bos=False, chat_template_name=name)
    row = MessagePair([{"role": "system", "content": "s"}, user("q")], [assistant("good")], [assistant("bad")])
    end = {"chatml": "<|im_end|>\n", "zephyr": "</s>\n"}[name]
    assert texts(tokenise(row, tokenizer, FREE)[0], tokenizer) == [expected, f"good{end}", f"bad{end}"]


# ------------------------------------------------------------------------------------- tokenizers in Python, revisions


def ctrl(folder: Path, merges: list[str], **special: str) -> Any:
    """Of a few letters, with these merges."""
    folder.mkdir()
    tokens = ["<unk>", "<e>", *(letter + end for letter in "abxyz" for end in ("@@", "")), "ab@@", "bx", "ab", "bx@@"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
    tokenizer = CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), eos_token="<e>", **special)
    tokenizer.save_pretrained(folder)
    return CTRLTokenizer.from_pretrained(folder)


def test_the_digest_of_a_tokenizer_in_python_knows_its_merges(tmp_path: Path) -> None:
    """Which are not in its vocabulary, and neither is where its files lie."""
    one, same, other = (
        ctrl(tmp_path / name, merges) for name, merges in (("a", ["a b"]), ("b", ["a b"]), ("c", ["b x</w>"]))
    )
    assert one.get_vocab() == other.get_vocab()
    row = TextPair("abx", " y", " z")
    assert tokenise(row, one, FREE)[0] != tokenise(row, other, FREE)[0]
    digest = tokenizer_digest(one)
    assert digest == tokenizer_digest(same)
    assert digest != tokenizer_digest(other)
    assert digest != tokenizer_digest(ctrl(tmp_path / "d", ["a b"], pad_token="<unk>"))


@pytest.mark.parametrize("slow", [False, True])
def test_a_run_with_a_tokenizer_in_python(slow: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the saved model, whose tokenizer is that one again; no line says that it is not what was asked for."""
    model = tmp_path / "model"
    tiny.make_model(model, vocab_size=400)
    ByT5Tokenizer().save_pretrained(model)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.text_rows(8))
    output = cli.train(model, data, tmp_path / "run", max_train_steps=1, max_seq_length=200, use_slow_tokenizer=slow)
    assert "use_slow_tokenizer" not in capsys.readouterr().out
    assert cli.summary(output)["data"]["pairs"] == 8
    again = AutoTokenizer.from_pretrained(output)
    assert not again.is_fast
    assert tokenizer_digest(again) == tokenizer_digest(AutoTokenizer.from_pretrained(model))


def test_a_tokenizer_that_there_is_only_a_fast_one_of(folder: Path) -> None:
    config = ModelConfig(model_name_or_path=str(folder), use_slow_tokenizer=True)
    tokenizer = load_tokenizer(config)
    assert no_slow_tokenizer(config, tokenizer) == (
        f"use_slow_tokenizer: has no effect, transformers has one {type(tokenizer).__name__}, which is the fast one"
    )
    assert no_slow_tokenizer(ModelConfig(model_name_or_path=str(folder)), tokenizer) is None
    assert no_slow_tokenizer(config, ByT5Tokenizer()) is None


def test_which_revision_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def note(name: str, *, revision: str | None, **rest: Any) -> Any:
        asked.append((name, revision))
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", note)
    every: list[dict[str, Any]] = [
        {},
        {"model_revision": "m"},
        {"model_revision": "m", "tokenizer_revision": "t"},
        {"model_revision": "m", "tokenizer_name": "some/other"},
        {"model_revision": "m", "tokenizer_name": "some/other", "tokenizer_revision": "t"},
    ]
    for fields in every:
        load_tokenizer(ModelConfig(model_name_or_path="some/model", **fields))
    names = ["some/model"] * 3 + ["some/other"] * 2
    assert asked == list(zip(names, [None, "m", "t", None, "t"], strict=True))


def test_a_template_that_writes_the_day_is_told(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    for template, is_dated in (
        (None, False),
        ("{{ messages }}", False),
        ("{{ strftime_now('%d %b %Y') }}", True),
        ({"default": "{{ messages }}", "tool_use": "{{ strftime_now('%Y') }}"}, True),
    ):
        tokenizer.chat_template = template
        line = dated_template(tokenizer)
        assert (line is not None) == is_dated
        assert line is None or line.startswith("the chat template writes the day into prompts")
