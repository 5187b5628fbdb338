"""docs/add_a_dataset.md does what it says: its own code is run, and its tables are those of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from open_po.data.formats import FORMATS, MessagePair, RowError, TextPair, row_reader
from tests import cli, tiny

PAGE = Path(__file__).parents[2] / "docs" / "add_a_dataset.md"


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's Python blocks, the first of them importable as my_rows."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_rows.py").write_text(found[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_rows", raising=False)
    return found


def test_the_page_has_every_layout() -> None:
    text = PAGE.read_text()
    for form in FORMATS.values():
        assert f"\n| `{form.name}` | {form.columns} | {form.data_sets} |\n" in text
        if form.prompt is not None:
            assert f"\n| `{form.name}` | `{form.prompt.text!r}` |\n" in text
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == len(FORMATS) + sum(
        form.prompt is not None for form in FORMATS.values()
    )


def test_the_page_prints_what_it_says(blocks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks[1], {})
    said = re.search(r"print\(.*\)  # (.*), then (.*)", blocks[1])
    assert said is not None
    assert capsys.readouterr().out.splitlines() == list(said.groups())


def test_the_function_trains_through_the_command_line(blocks: list[str], llama: Path, tmp_path: Path) -> None:
    """As the pairs that it makes do, written as text."""
    rows = tiny.text_rows(4, seed=3)
    mine = [{"task": row["prompt"], "candidates": [row["chosen"], row["rejected"]]} for row in rows]
    same = [row | {"prompt": f"{row['prompt']}\n"} for row in rows]
    outputs = [
        cli.train(llama, tiny.write_jsonl(tmp_path / f"{name}.jsonl", data), tmp_path / name, **fields)
        for name, data, fields in (("mine", mine, {"format": "my_rows:ranked"}), ("same", same, {}))
    ]
    ours, plain = map(cli.weights, outputs)
    assert all((ours[name] == plain[name]).all() for name in plain)


FUNCTIONS = """
from open_po.data.formats import MessagePair, RowError, TextPair

def nothing(row): return []
def none(row): return None
def mapping(row): return {"prompt": "q"}
def number(row): return TextPair("q", 5, "b")
def fails(row): return row["no"]
def says(row): raise RowError("field task is empty")
def messages(row): return MessagePair([{"from": "human", "value": "q"}], [{"role": "assistant", "content": "a"}], None)
def user(row): return MessagePair([{"role": "user", "content": "q"}], [{"role": "user", "content": "a"}], None)
def scored(row): return TextPair("q", "a", "b", scores=("high", 1))
def three(row): return TextPair("q", "a", "b", scores=(1, 2, 3))
def one(row): return TextPair("q", "a", "b", scores=5)
def huge(row): return TextPair("q", "a", "b", scores=(10**400, 1))
"""


def test_what_functions_give_and_fail_with(blocks: list[str], tmp_path: Path) -> None:
    (tmp_path / "their_rows.py").write_text(FUNCTIONS)

    def read(name: str) -> list[Any]:
        return row_reader(f"their_rows:{name}", None)({"task": "t"})  # type: ignore[return-value]

    assert read("nothing") == []
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert read("messages") == [MessagePair([question], [answer], None)]
    assert row_reader("their_rows:messages", "{task}:")({"task": "t"}) == [TextPair("t:", "a", None)]
    for name, message in {
        "none": "format their_rows:none returned NoneType, expected TextPair, MessagePair or a list of them",
        "mapping": "format their_rows:mapping returned dict, expected TextPair",
        "number": "field chosen is int, expected text",
        "fails": "format their_rows:fails fails on it (KeyError: 'no')",
        "says": "field task is empty",
        "user": "field chosen has a message of role user after the prompt",
        "scored": "field scores is 'high', expected a number",
        "three": "format their_rows:three gives scores of (1, 2, 3), expected two: (chosen, rejected)",
        "one": "format their_rows:one gives scores of 5, expected two: (chosen, rejected)",
        "huge": "field scores is 1000",
    }.items():
        with pytest.raises(RowError, match=re.escape(message)):
            read(name)


def test_a_module_that_cannot_be_imported_is_one_line(
    blocks: list[str], tmp_path: Path, llama: Path, capsys: Any
) -> None:
    (tmp_path / "broken_rows.py").write_text("raise OSError('no disk,\\nno rows')\n")
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.text_rows(2))
    words = cli.arguments(llama, data, tmp_path / "run", format="broken_rows:f")
    line = cli.failure(capsys, words)
    assert line == f"error: {data}: format broken_rows:f: cannot be imported (no disk, no rows)"
