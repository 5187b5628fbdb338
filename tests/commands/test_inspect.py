"""`python -m open_po inspect`: what it prints, beside the files read and counted here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from open_po import __main__ as program
from open_po.commands import inspect
from open_po.data.chat_templates import chat_template
from tests import cli, tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer and no model."""
    tiny.make_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def shown(capsys: Capture, words: Sequence[str]) -> str:
    capsys.readouterr()
    assert inspect.main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def cells(output: str, *start: str) -> list[str]:
    """The other cells of the one table row that begins with the cells `start`; lines of one cell are joined by `|`."""
    found: list[list[str]] = []
    for line in output.splitlines():
        if line[:1] in "│┃" and line:
            row = [cell.strip() for cell in line.strip("│┃").split("┃" if line[0] == "┃" else "│")]
            if row[0]:
                found.append(row)
            else:
                found[-1] = [f"{above}|{cell}" if cell else above for above, cell in zip(found[-1], row, strict=True)]
    (row,) = [row for row in found if row[: len(start)] == list(start)]
    return row[len(start) :]


def parts(output: str, number: int) -> dict[str, tuple[str, str]]:
    """Of a row that is shown: each part's heading and its text."""
    row = re.split(r"^Row \d+: ", output, flags=re.MULTILINE)[number]
    split = re.split(r"^(prompt|chosen|rejected)(, .*?) ─+$\n", row, flags=re.MULTILINE)
    return {name: (said, text) for name, said, text in zip(split[1::3], split[2::3], split[3::3], strict=True)}


def unmarked(text: str) -> str:
    """The text behind the marks of a console without colours; lines are short enough not to be wrapped."""
    text = text.strip("\n").replace("\n", "").replace("┊", "")
    text = re.sub("⟪.*?⟫", "", text).replace("↵", "\n").replace("␣", " ").replace("⇥", "\t")
    text = re.sub(r"⟨(.)=\d tokens⟩", r"\1", text)
    return re.sub("⟨(/?s)⟩", r"<\1>", text)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_turns_that_are_scored_and_those_that_are_not(tokenizer: Path, tmp_path: Path, capsys: Capture) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
    row = [{"role": role, "content": content} for role, content in turns]
    data = tiny.write_jsonl(tmp_path / "data.jsonl", [{"prompt": row[:3], "chosen": row[3:], "rejected": row[5:]}])
    words = cli.flags(model_name_or_path=tokenizer, mixer_list=[data, 1.0], chat_template_name="zephyr")
    keep_start = cli.flags(truncation="keep_start", max_prompt_length=16, add_bos=True)
    found = parts(shown(capsys, [*words, "--scored_turns", "all", *keep_start]), 1)
    whole = parts(shown(capsys, [*words, *keep_start]), 1)
    assert whole["chosen"][1] == found["chosen"][1].replace("⟦", "").replace("⟧", "")
    assert "⟦" not in whole["prompt"][1]
    inside = re.findall("⟦(.*?)⟧", found["chosen"][1].replace("\n", "").replace("┊", ""))
    assert inside == ["<|user|>↵e⟨/s⟩↵<|assistant|>↵"]
    assert re.search(r", \d+ of them not scored, in ⟦⟧$", found["chosen"][0])
    assert re.fullmatch(r", 16 tokens, \d+ newer tokens cut", found["prompt"][0])
    assert unmarked(found["prompt"][1]).startswith("<s><|user|>")
    assert found["prompt"][1].rstrip("\n").endswith("tokens cut here⟫")


CHAT = [
    {
        "conversations": [
            {"from": "human", "value": "red cat?"},
            {"from": "gpt", "value": "blue dog.\n"},
            {"from": "human", "value": "Größe  two"},
        ],
        "chosen": {"from": "gpt", "value": "the tree\n\truns"},
        "rejected": {"from": "gpt", "value": "é 😊"},
    }
]


def test_a_conversation_is_shown_as_its_template_renders_it(tokenizer: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_jsonl(tmp_path / "chat.jsonl", CHAT)
    out = shown(capsys, cli.arguments(tokenizer, data, tmp_path / "run", chat_template_name="tulu"))
    plain = AutoTokenizer.from_pretrained(tokenizer)
    plain.chat_template = chat_template("tulu")
    names = {"human": "user", "gpt": "assistant"}
    turns = [{"role": names[m["from"]], "content": m["value"]} for m in CHAT[0]["conversations"]]
    prompt = plain.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    found = parts(out, 1)
    for name, (said, text) in found.items():
        expected = prompt
        if name != "prompt":
            answer = {"role": "assistant", "content": CHAT[0][name]["value"]}
            expected = plain.apply_chat_template([*turns, answer], tokenize=False)[len(prompt) :]
        assert unmarked(text) == expected
        ids = plain(expected, add_special_tokens=False)["input_ids"]
        assert said == f", {len(ids)} tokens"
    assert found["prompt"][1].startswith("⟨s⟩<┊|")
    assert found["chosen"][1].rstrip("\n").endswith("⟨/s⟩")
    assert found["rejected"][1].strip("\n") == "⟨é=2 tokens⟩┊␣┊⟨😊=4 tokens⟩⟨/s⟩"


def test_what_truncation_takes_is_told_and_marked(tokenizer: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [
        {"prompt": "q" * 30, "chosen": "a" * 25, "rejected": "b" * 5},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    words = cli.arguments(tokenizer, data, tmp_path / "run", max_seq_length=32, max_prompt_length=20)
    out = shown(capsys, words)
    # One token a letter, EOS behind each response; 12 tokens are left to a response.
    found = parts(out, 1)
    assert found["prompt"][0] == ", 20 tokens, 10 older tokens cut"
    assert found["prompt"][1].startswith("⟪10 tokens cut here⟫q┊q")
    assert unmarked(found["prompt"][1]) == "q" * 20
    assert found["chosen"][0] == ", 12 tokens, 14 newer tokens cut"
    assert found["chosen"][1].rstrip("\n").endswith("a⟪14 tokens cut here⟫")
    assert found["rejected"][0] == ", 6 tokens"
    assert "Row 1" in out
    assert "it loses the most to truncation, 24 tokens" in out
    assert cells(out, "prompt")[4:] == ["1", "10 (32.3%)", "21"]
    assert cells(out, "chosen")[3:] == ["26", "1", "14 (50.0%)", "14"]
    assert cells(out, "rejected")[3:] == ["6", "0", "0 (0.0%)", "8"]
    assert "max_prompt_length 20: 1 are longer (prompt)" in out
    assert "max_seq_length 32: 1 are longer (prompt + longer)" in out
    assert cells(out, "chosen ends with EOS") == ["1 once|1 not, because truncated"]
    assert cells(out, "rejected ends with EOS") == ["2 once"]


def test_long_parts_are_shown_in_part_unless_all_is_asked_for(tokenizer: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "qz" * 200, "chosen": "a", "rejected": "b"}])
    words = cli.arguments(tokenizer, data, tmp_path / "run", max_seq_length=1000)
    text = parts(shown(capsys, words), 1)["prompt"][1]
    head, said, tail = (line for line in re.split("\n(?=[.]{3})|(?<=[.]{3})\n", text.strip("\n")) if line)
    assert said == "... 160 tokens not shown here, --full shows them ..."
    assert unmarked(head) == unmarked(tail) == "qz" * 60
    assert unmarked(parts(shown(capsys, [*words, "--full"]), 1)["prompt"][1]) == "qz" * 200


# -------------------------------------------------------------------------------------------------------------- tables


def test_counts_are_those_of_the_files(
    tokenizer: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # short names, so that no cell is wrapped
    rows = tiny.text_rows(30)
    rows[3]["rejected"] = rows[3]["chosen"]
    for index in (5, 6, 11, 12):
        rows[index]["chosen"] = "  "
    rows[20] = dict(rows[0], chosen=" other")  # shares its prompt
    first = tiny.write_jsonl(Path("first.jsonl"), rows)
    second = tiny.write_jsonl(Path("second.jsonl"), tiny.text_rows(20, seed=1))
    held_out = tiny.write_jsonl(Path("held_out.jsonl"), [*rows[8:10], *tiny.text_rows(3, seed=2)])
    fields: dict[str, Any] = {
        "mixer_list": [first, "1.0", second, "8"],
        "eval_mixer_list": [held_out, "1.0"],
        "gradient_accumulation_steps": 2,
        "num_epochs": 3,
    }
    out = shown(capsys, [*cli.arguments(tokenizer, first, tmp_path / "run", **fields), "--rows", "0"])
    assert "Row 1" not in out
    assert cells(out, "training", str(first))[:5] == ["text", "30 of 30", "0", "5", "25"]
    assert cells(out, "training", str(second))[:5] == ["text", "8 of 20", "0", "0", "8"]
    assert cells(out, "held-out", str(held_out))[:5] == ["text", "5 of 5", "0", "0", "5"]
    assert cells(out, "training", "identical responses") == ["1", f"{first} row 4"]
    some = "; ".join(f"{first} row {number}" for number in (6, 7, 12))
    assert cells(out, "training", "empty response") == ["4", f"{some}; and 1 more"]
    assert cells(out, "prompts")[0].startswith("32 distinct; 2 of 33 pairs share theirs, up to 2")
    assert cells(out, "held-out prompts")[1] == "! 2 of 5 are trained on too"
    assert cells(out, "prompt begins with BOS") == ["33 not", "5 not"]
    assert cells(out, "global batch")[0].startswith("8 pairs")
    assert cells(out, "steps") == ["5 an epoch, 15 in all"]

    plain = AutoTokenizer.from_pretrained(tokenizer)
    kept = [row for index, row in enumerate(rows) if index not in (3, 5, 6, 11, 12)]
    total = sum(
        len(plain(row["prompt"])["input_ids"])
        + len(plain(row["prompt"] + row["chosen"])["input_ids"])
        - len(plain(row["prompt"])["input_ids"])
        + 1
        + len(plain(row["prompt"] + row["rejected"])["input_ids"])
        - len(plain(row["prompt"])["input_ids"])
        + 1
        for row in kept
    )
    assert cells(out, "training", str(first))[5] == f"{total / len(kept):,.0f}"


@pytest.mark.parametrize(("loss", "sides"), [("dpo", ["chosen", "rejected"]), ("sft", ["chosen"])])
@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_what_sharing_saves(
    loss: str, sides: list[str], sharing: str, tokenizer: Path, tmp_path: Path, capsys: Capture
) -> None:
    """One step of all pairs in one pack: each distinct prompt once, each distinct response to it once."""
    rows = tiny.text_rows(6)
    rows += [dict(rows[0], chosen=" another"), dict(rows[2], rejected=rows[2]["chosen"], chosen=" third")]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    fields = {"loss_type": loss, "prompt_sharing": sharing, "max_tokens_per_batch": 100_000}
    fields |= {"per_device_train_batch_size": 8}
    out = shown(capsys, cli.arguments(tokenizer, data, tmp_path / "run", **fields))
    plain = AutoTokenizer.from_pretrained(tokenizer)

    def length(text: str) -> int:
        return len(plain(text)["input_ids"])

    once: dict[str, set[str]] = {}
    otherwise = 0
    for row in rows:
        for side in sides:
            otherwise += length(row["prompt"] + row[side]) + 1  # EOS
            once.setdefault(row["prompt"], set()).add(row[side])
    computed = sum(
        (length(prompt) if sharing == "auto" else length(prompt) * len(answers))
        + sum(length(prompt + answer) + 1 - length(prompt) for answer in answers)
        for prompt, answers in once.items()
    )
    (said,) = cells(out, "prompt sharing")
    saved = f"{1 - computed / otherwise:.1%}"
    assert said.startswith(f"saves {saved} of the tokens: {computed:,} to compute instead of {otherwise:,}")
    assert cells(out, "packs")[0].startswith("1 in the first epoch, of at most 100,000 tokens")
    assert cells(out, "layout")[0].startswith("shared" if sharing == "auto" else "unshared")
    assert (", not trained on by this loss" in parts(out, 1)["rejected"][0]) == (loss == "sft")


def test_processes_of_the_run_are_counted(tokenizer: Path, tmp_path: Path, capsys: Capture, pairs_file: Path) -> None:
    words = [*cli.arguments(tokenizer, pairs_file, tmp_path / "run"), "--rows", "0", "--processes", "3"]
    out = shown(capsys, words)
    assert cells(out, "global batch")[0].startswith("12 pairs")
    assert cells(out, "steps") == ["2 an epoch, 2 in all"]
    # Engines that this machine cannot run are no matter; under tp all ranks work on the same packs.
    assert cells(shown(capsys, [*words, "--parallel", "tp"]), "steps") == ["6 an epoch, 6 in all"]
    capsys.readouterr()
    assert inspect.main([*words, "--parallel", "layers"]) == 2
    assert capsys.readouterr().err == "config error: --processes 3: parallel layers is one process; leave it out\n"


# -------------------------------------------------------------------------------------------------- command and page


def test_no_model_is_needed_and_a_configuration_file_is_read(
    tokenizer: Path, tmp_path: Path, capsys: Capture, pairs_file: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: no/such-model\ntokenizer_name: {tokenizer}\ndataset_mixer: {{{pairs_file}: 6}}"
    )
    capsys.readouterr()
    assert program.main(["inspect", str(config), "--rows", "1", "--max_seq_length", "64"]) == 0
    out = capsys.readouterr().out
    assert cells(out, "training", str(pairs_file))[:5] == ["text", "6 of 24", "0", "0", "6"]
    assert cells(out, "from") == [str(tokenizer)]
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (
            ["--rows", "-1"],
            2,
            "config error: argument --rows: must be 0 or more, got -1; see python -m open_po inspect",
        ),
        (["--processes", "0"], 2, "config error: argument --processes: must be 1 or more, got 0"),
        (["--rows", "1", "--betta", "1"], 2, "config error: betta: unknown field; did you mean beta?"),
        (["--out", "."], 1, "error: --out .: is a folder; name a file"),
    ],
)
def test_mistakes_are_told(
    words: list[str], code: int, line: str, tokenizer: Path, tmp_path: Path, pairs_file: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    try:
        got = inspect.main([*cli.arguments(tokenizer, pairs_file, tmp_path / "run"), *words])
    except SystemExit as stopped:  # argparse's way
        got = stopped.code
    (said,) = capsys.readouterr().err.splitlines()
    assert got == code
    assert said.startswith(line)


def test_a_row_that_cannot_be_read_stops_it_as_it_stops_a_run(tokenizer: Path, tmp_path: Path, capsys: Capture) -> None:
    data = tiny.write_jsonl(
        tmp_path / "pairs.jsonl", [*tiny.text_rows(3), {"prompt": "q", "chosen": "a", "rejected": None}]
    )
    words = cli.arguments(tokenizer, data, tmp_path / "run")
    capsys.readouterr()
    assert inspect.main(words) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith(f"error: {data} row 4: field rejected is missing or null")


class Page(HTMLParser):
    """A page's text, with the style of each stretch of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stretches: list[tuple[str, str]] = []
        self.styles: dict[str, str] = {}
        self._class = ""
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._class = dict(attrs).get("class") or ""
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._class, self._in_style = "", False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles |= dict(re.findall(r"\.(r\d+) \{([^}]*)\}", data))
        else:
            self.stretches.append((self._class, data))


def test_the_page_shows_each_token_in_the_colour_of_its_part(tokenizer: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [{"prompt": "<b>red cat", "chosen": " & dog", "rejected": " tree"}]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    page = tmp_path / "new" / "page.html"
    out = shown(capsys, [*cli.arguments(tokenizer, data, tmp_path / "run"), "--out", str(page)])
    assert out.rstrip().endswith(f"Page: {page}")
    read = Page()
    read.feed(page.read_text())
    assert not re.search(r"(src|href)=", page.read_text())  # it needs no other file

    def stretches(colours: set[str]) -> list[str]:
        return [
            text
            for name, text in read.stretches
            if name and colours & set(re.findall("#[0-9a-f]{6}", read.styles[name]))
        ]

    plain = AutoTokenizer.from_pretrained(tokenizer)
    prompt = plain(rows[0]["prompt"])["input_ids"]
    assert stretches({"#1f3b5c", "#30608f"}) == [plain.decode([token]) for token in prompt]
    assert "".join(stretches({"#1d4a2a", "#2f7a47"})).replace("␣", " ") == " & dog"
    assert "".join(stretches({"#5c2323", "#913c3c"})).replace("␣", " ") == " tree"
    assert stretches({"#ffd75f"}) == ["⟨/s⟩", "⟨/s⟩"]
    assert "┊" not in page.read_text()
