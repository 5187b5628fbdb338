"""Files read by the number of a row, beside readings of the whole file; what is made of data is kept by its content."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from open_po.config import MixturePart
from open_po.data import content, row_files
from open_po.data.row_files import BadLine, JsonLines, Rows, open_file
from open_po.data.sources import load_mixture
from open_po.errors import UserError
from tests import tiny

LINES = [
    b'{"a": 1}',
    b'{"a": "\\u00e9"}',
    '{"a": "é ☃"}'.encode(),
    b"",
    b"  \t",
    b"\r",
    b' {"b": [1, {}]} ',
    b"{",
    b"\xff",
]
ENDS = [b"\n", b"\r\n"]


def read(rows: Rows, numbers: Sequence[int] | None = None) -> list[Any]:
    index = np.arange(len(rows)) if numbers is None else np.array(numbers, dtype=np.int64)
    return [str(row) if isinstance(row, BadLine) else dict(row) for row in rows.read(index)]


@given(
    st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(ENDS)), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
    st.integers(1, 30),
)
@settings(max_examples=150, deadline=None)
def test_lines_are_found_where_they_are(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[bytes, bytes]],
    has_bom: bool,
    is_ended: bool,
    chunk: int,
) -> None:
    """Whatever is blank, however many bytes are looked through at a time."""
    whole = b"".join(line + end for line, end in lines)
    whole = b"\xef\xbb\xbf" * has_bom + (whole if is_ended else whole.rstrip(b"\r\n"))
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(whole)
    expected: list[Any] = []
    for number, line in enumerate(whole.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            expected.append(json.loads(line))
        except ValueError as error:
            kind = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "broken JSON"
            expected.append(f"line {number}: {kind}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "_CHUNK", chunk)
        lines = row_files._lines(path)
    rows = JsonLines(path=path, digest="", lines=lines, facts=content.file_facts(path))
    got = read(rows)
    assert len(got) == len(expected) == len(rows)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.startswith(theirs) if isinstance(theirs, str) else mine == theirs
    some = list(range(0, len(got), 2))
    assert read(rows, some) == [got[number] for number in some]


def test_rows_of_a_rewritten_file_are_told_as_they_stood(tmp_path: Path) -> None:
    """A list's items by number, a CSV file's by line; good ones behind them are read."""
    (tmp_path / "x.json").write_text('[{"a": 1}, "text", {"a": 2}, 3]')
    no_object = "is not a JSON object with named fields"
    expected = [{"a": 1}, f"row 2: {no_object}", {"a": 2}, f"row 4: {no_object}"]
    assert read(open_file(tmp_path / "x.json")) == expected
    (tmp_path / "x.csv").write_text('a,b\n1,2\n\n1,2,3\n"q\nr",5\n"q"r,6\n7,8\n')
    assert read(open_file(tmp_path / "x.csv")) == [
        {"a": "1", "b": "2"},
        "line 4: has more cells than the header",
        {"a": "q\nr", "b": "5"},
        "line 7: broken CSV (',' expected after '\"')",
        {"a": "7", "b": "8"},
    ]


def test_json_that_python_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": ' + "9" * 5000 + '}\n{"a": ' + "[" * 200_000 + "\n")
    good, digits, deep = read(open_file(tmp_path / "x.jsonl"))
    assert good == {"a": 1}
    assert digits.startswith("line 2: JSON that cannot be read (Exceeds the limit")
    assert deep.startswith("line 3: JSON that cannot be read (")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_any_rows_by_number(kind: str, tmp_path: Path) -> None:
    table = [{"prompt": f"{number}\n{'é' * (number % 7)}", "chosen": str(number)} for number in range(3000)]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(table), path, row_group_size=700)
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen"])
            writer.writeheader()
            writer.writerows(table)
    else:
        path.write_text(json.dumps(table) if kind == "json" else "".join(json.dumps(row) + "\n" for row in table))
    rows = open_file(path)
    numbers = [0, 1, 699, 700, 1023, 1024, 2048, 2999]
    assert read(rows, numbers) == [table[number] for number in numbers]
    assert len(rows) == 3000


def test_a_file_that_changes_while_it_is_read_stops_the_reading(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"a": number} for number in range(10)])
    reading = open_file(path).read(np.arange(10))
    next(reading)
    tiny.write_jsonl(path, [{"a": -number} for number in range(10)])
    with pytest.raises(UserError, match="has changed while it was read"):
        list(reading)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_what_is_made_of_a_file_that_changes_meanwhile_is_not_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes once it is hashed; when the old content is back, that is what is read."""
    path = tmp_path / f"x.{kind}"

    def write(text: str) -> None:
        if kind == "parquet":
            parquet.write_table(pa.table({"a": [text] * len(text)}), path)
        else:
            row = json.dumps({"a": text})
            path.write_text({"json": f"[{row}]", "jsonl": f"{row}\n" * len(text), "csv": f"a\n{text}\n"}[kind])

    def hashed_then_changed(path: Path) -> str:
        digest = content.file_digest(path)
        write("another")
        return digest

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(row_files, "file_digest", hashed_then_changed)
        with pytest.raises(UserError, match="has changed while it was read"):
            open_file(path)
    assert not [each for each in (content.cache_folder() / "read").iterdir() if each.is_file()]
    write("old")
    assert {row["a"] for row in read(open_file(path))} == {"old"}


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"a": 1}, {"a": 2}])
    rows = open_file(path)
    (kept,) = content.cache_folder().rglob("*.lines.npy")
    kept.write_bytes(kept.read_bytes()[:-5])
    again = open_file(path)
    assert isinstance(rows, JsonLines)
    assert isinstance(again, JsonLines)
    assert again.lines.tolist() == rows.lines.tolist() == [[0, 1], [9, 2]]


# -------------------------------------------------------------------------------------------------------------- hashes


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to hash them, of any size."""
    seen: list[str] = []
    original = content._hash
    monkeypatch.setattr(content, "_ALWAYS_HASHED", 0)
    monkeypatch.setattr(content, "_hash", lambda path: seen.append(path.name) or original(path))
    return seen


def test_a_hash_is_remembered_only_of_a_file_that_nobody_had_touched_for_a_while(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"a": 1}])
    first = content.file_digest(path)
    assert content.file_digest(path) == first
    assert len(hashed) == 2  # it was written a moment ago
    later = path.stat().st_ctime_ns + 61 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    for _ in range(3):
        assert content.file_digest(path) == first
    assert len(hashed) == 3
    moved = path.rename(tmp_path / "y.jsonl")
    assert content.file_digest(moved) == first
    assert len(hashed) == 4


@pytest.mark.parametrize("how", ["times put back", "replaced by one of the same times", "longer"])
def test_a_changed_file_is_hashed_again(
    how: str, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"a": "old"}])
    before = path.stat()
    monkeypatch.setattr(time, "time_ns", lambda: before.st_ctime_ns + 61 * 10**9)
    first = content.file_digest(path)
    if how == "replaced by one of the same times":
        tiny.write_jsonl(tmp_path / "z.jsonl", [{"a": "new"}]).rename(path)
    else:
        tiny.write_jsonl(path, [{"a": "new"}] * (2 if how == "longer" else 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content.file_digest(path) != first
    assert len(hashed) == 2


def test_a_folder_is_its_files_and_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "deep" / "b").write_text("2")
    digests = [content.folder_digest(folder)]
    (folder / "deep" / "b").write_text("3")
    digests.append(content.folder_digest(folder))
    (folder / "deep" / "b").rename(folder / "b")
    digests.append(content.folder_digest(folder))
    assert len(set(digests)) == 3
    (folder / "b").rename(folder / "deep" / "b")
    (folder / "deep" / "b").write_text("2")
    assert content.folder_digest(folder) == digests[0]


# ------------------------------------------------------------------------------------- what `datasets` has, or reads


def prompts(part: MixturePart) -> list[str]:
    (rows,) = load_mixture([part])
    return [row["prompt"] for row in rows.rows.read(rows.taken)]  # type: ignore[index, call-overload]


@pytest.mark.parametrize("many", [True, False])
def test_what_datasets_saved_is_read_by_split(many: bool, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    train = datasets.Dataset.from_list([{"prompt": str(number)} for number in range(10)]).filter(
        lambda row: row["prompt"] != "3"
    )
    if many:
        test = datasets.Dataset.from_list([{"prompt": "t0"}, {"prompt": "t1"}])
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder)
        assert prompts(MixturePart(dataset=folder, split="test[1:]+train[:1]")) == ["t1", "0"]
    else:
        train.save_to_disk(folder)
    assert prompts(MixturePart(dataset=folder)) == list("012456789")
    assert prompts(MixturePart(dataset=folder, split="train[-2:]")) == ["8", "9"]
    with pytest.raises(UserError, match='Unknown split "dev"'):
        prompts(MixturePart(dataset=folder, split="dev"))


def test_configurations_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("one", "two"):
        parquet.write_table(pa.table({"prompt": [name]}), folder / f"{name}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("one", "two"):
        assert prompts(MixturePart(dataset=str(folder), configuration=name)) == [name]
    (part,) = load_mixture([MixturePart(dataset=str(folder), configuration="two")])
    assert part.name == f"{folder} (two, train)"
    with pytest.raises(UserError, match="Config name is missing"):
        prompts(MixturePart(dataset=str(folder)))
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError, match="is a file, which has no configuration one; leave it out"):
        prompts(MixturePart(dataset=str(path), configuration="one"))


def test_a_changed_folder_is_read_again_whatever_its_times_say(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "train.parquet"
    parquet.write_table(pa.table({"prompt": ["old"]}), path)
    times = path.stat()
    assert prompts(MixturePart(dataset=str(folder))) == ["old"]
    parquet.write_table(pa.table({"prompt": ["new"]}), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prompts(MixturePart(dataset=str(folder))) == ["new"]
