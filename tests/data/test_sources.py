"""Rows of files and mixtures: which rows are taken, their numbers, and files that cannot be read."""

from __future__ import annotations

import csv
import json
import os
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from open_po.config import parse_mixture
from open_po.data.row_files import BadLine
from open_po.data.sources import SourceRows, load_mixture
from open_po.errors import UserError
from tests import tiny


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """24 rows whose prompt is their number, from 1."""
    rows = [{"prompt": str(number), "chosen": "a", "rejected": "b"} for number in range(1, 25)]
    return str(tiny.write_jsonl(tmp_path / "numbered.jsonl", rows))


@pytest.fixture
def lettered(tmp_path: Path) -> str:
    """10 rows whose prompt is a letter."""
    return str(tiny.write_jsonl(tmp_path / "lettered.jsonl", [{"prompt": letter} for letter in "abcdefghij"]))


def rows(part: SourceRows) -> list[dict[str, Any]]:
    found = list(part.rows.read(part.taken))
    assert not any(isinstance(row, BadLine) for row in found)
    return [dict(row) for row in found]


def prompts(part: SourceRows) -> list[str]:
    return [row["prompt"] for row in rows(part)]


def take(name: str, amount: str = "1.0", split: str = "train", max_rows: int | None = None) -> list[str]:
    (part,) = load_mixture(parse_mixture([name, amount], [split]), max_rows)
    assert prompts(part) == [str(number + 1) for number in part.taken]
    return prompts(part)


def fault(name: str | Path, split: str = "train", amount: str = "1.0") -> str:
    """The one line said about a file, without its name, or about the first of its lines that cannot be read."""
    try:
        (part,) = load_mixture(parse_mixture([str(name), amount], [split]))
    except UserError as error:
        line = str(error)
    else:
        return next(str(row) for row in part.rows.read(part.taken) if isinstance(row, BadLine))
    assert "\n" not in line
    assert line.startswith(f"{name}: ")
    return line.removeprefix(f"{name}: ")


ALL = [str(number) for number in range(1, 25)]


# ---------------------------------------------------------------------------------------------------------- which rows


@pytest.mark.parametrize(
    ("amount", "count"),
    [("1.0", 24), ("0.5", 12), ("0.1", 2), ("0.3", 7), ("0.001", 1), ("1", 1), ("10", 10), ("24", 24)],
)
def test_fractions_and_counts(amount: str, count: int, numbered: str) -> None:
    taken = take(numbered, amount)
    assert len(taken) == count == len(set(taken))
    assert taken == sorted(taken, key=int)  # in their old order


def test_a_subset_is_spread_over_the_file(numbered: str) -> None:
    assert take(numbered, "12") != ALL[:12]


def test_subsets_are_nested(numbered: str) -> None:
    subsets = [set(take(numbered, str(count))) for count in range(1, 25)]
    assert all(smaller < larger for smaller, larger in pairwise(subsets))
    assert set(take(numbered, "0.5")) == subsets[11]


def test_subsets_do_not_depend_on_the_state_of_any_generator(numbered: str) -> None:
    """The run's seed is set before the data are loaded; the rows must be the same in a sweep over seeds."""
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        drawn.append(take(numbered, "10"))
        assert torch.initial_seed() == seed
    assert drawn[0] == drawn[1]


def test_a_count_that_is_too_large(numbered: str) -> None:
    more = "a fraction above 1.0 repeats rows"
    assert fault(numbered, amount="25") == f"25 rows are asked for, split train has 24; {more}"
    half = "train[:50%]"
    assert fault(numbered, split=half, amount="13") == f"13 rows are asked for, split {half} has 12; {more}"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ALL),
        ("train[:90%]", ALL[:22]),
        ("train[90%:]", ALL[22:]),
        ("train[5:7]", ["6", "7"]),
        ("train[-3:]", ["22", "23", "24"]),
        ("train[:1000]", ALL),
        ("train[20:]+train[:2]", ["21", "22", "23", "24", "1", "2"]),
    ],
)
def test_splits_are_slices_and_rows_keep_their_numbers(split: str, expected: list[str], numbered: str) -> None:
    assert take(numbered, "1.0", split) == expected


def test_a_subset_of_a_slice_keeps_its_numbers(numbered: str) -> None:
    taken = take(numbered, "0.5", "train[50%:]")
    assert len(taken) == 6
    assert set(taken) < set(ALL[12:])


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_slices_of_other_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{kind}"
    table = [{"prompt": str(number)} for number in range(1, 11)]
    if kind == "csv":
        path.write_text("prompt\n" + "".join(f"{row['prompt']}\n" for row in table))
    elif kind == "json":
        path.write_text(json.dumps(table))
    else:
        parquet.write_table(pa.Table.from_pylist(table), path)
    assert take(str(path), "1.0", "train[50%:]") == ["6", "7", "8", "9", "10"]


def test_several_parts_with_a_split_for_each(numbered: str, lettered: str) -> None:
    parts = load_mixture(
        parse_mixture([numbered, "3", lettered, "0.5", numbered, "1.0"], ["train", "train[:80%]", "train[:2]"])
    )
    assert [part.name for part in parts] == [numbered, lettered, numbered]
    assert [len(part.taken) for part in parts] == [3, 4, 2]
    assert set(prompts(parts[1])) < set("abcdefgh")
    assert prompts(parts[2]) == ["1", "2"]


def test_one_split_serves_all_parts(numbered: str, lettered: str) -> None:
    parts = load_mixture(parse_mixture([numbered, "1.0", lettered, "1.0"], ["train[:50%]"]))
    assert [prompts(part) for part in parts] == [ALL[:12], list("abcde")]


def test_max_rows_draws_over_the_whole_mixture(numbered: str, lettered: str) -> None:
    items, splits = [numbered, "1.0", lettered, "1.0"], ["train"]

    def drawn(count: int) -> set[str]:
        parts = load_mixture(parse_mixture(items, splits), count)
        assert sum(len(part.taken) for part in parts) == min(count, 34)
        return {prompt for part in parts for prompt in prompts(part)}

    subsets = [drawn(count) for count in range(1, 36)]
    assert all(smaller <= larger for smaller, larger in pairwise(subsets))
    assert [len(subset) for subset in subsets] == [*range(1, 35), 34]
    assert {name.isdigit() for name in subsets[16]} == {True, False}


def test_max_rows_of_one_file(numbered: str) -> None:
    assert take(numbered, "1.0", max_rows=10) == take(numbered, "10")
    assert take(numbered, "1.0", max_rows=100) == ALL


# ------------------------------------------------------------------------------------------------------- faulty sources


def test_missing_and_empty_files(tmp_path: Path) -> None:
    types = ".jsonl, .json, .csv, .parquet"
    for kind in ("jsonl", "json", "csv", "parquet"):
        path = tmp_path / f"data.{kind}"
        assert fault(path) == f"is no file; data are {types} files, or Hub names"
        path.write_text("")
        assert fault(path) == "the file is empty"
    (tmp_path / "data.txt").write_text("{}\n")
    assert fault(tmp_path / "data.txt") == f"is of no known type; data files are {types}"
    (tmp_path / "folder.jsonl").mkdir()
    assert fault(tmp_path / "folder.jsonl") == f"is no file; data are {types} files, or Hub names"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("blank.jsonl", b"\n \n\n"),
        ("bom.jsonl", b"\xef\xbb\xbf\n"),
        ("none.json", b"[]"),
        ("none.json", b"\n [ ]\n"),
        ("header.csv", b"prompt,chosen,rejected\n"),
    ],
)
def test_files_without_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert fault(tmp_path / name) == "holds no rows"


def test_parquet_without_rows(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert fault(tmp_path / "none.parquet") == "holds no rows"


def test_a_slice_without_rows(numbered: str) -> None:
    assert fault(numbered, "train[:0]") == "split train[:0] holds no rows"


def test_splits_that_a_file_does_not_have(numbered: str) -> None:
    assert fault(numbered, "test") == "Unknown split \"test\". Should be one of ['train']."
    assert fault(numbered, "train[:") == "Unrecognized instruction format: train[:"


GOOD = '{"prompt": "q"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", GOOD * 2 + '{"prompt": "q"\n' + GOOD, "line 3: broken JSON (Expecting ',' delimiter, column 15)"),
        ("x.jsonl", GOOD + "\n\n" + "prompt: q\n", "line 4: broken JSON (Expecting value, column 1)"),
        ("x.jsonl", GOOD + '{"prompt": "q"} {}\n', "line 2: broken JSON (Extra data, column 17)"),
        ("x.jsonl", GOOD + '{"prompt": "cut', "line 2: broken JSON (Unterminated string starting at, column 12)"),
        ("x.json", GOOD + "nothing\n", "line 2: broken JSON (Expecting value, column 1)"),
        ("x.jsonl", GOOD + '["q"]\n', "line 2: is not a JSON object with named fields"),
        ("x.jsonl", GOOD + '"q"\n', "line 2: is not a JSON object with named fields"),
        ("x.jsonl", GOOD + "null\n", "line 2: is not a JSON object with named fields"),
        (
            "x.json",
            '[\n{"prompt": "q"},\n{"prompt" "q"}\n]',
            "line 3: broken JSON (Expecting ':' delimiter, column 11)",
        ),
        ("x.json", '[\n{"prompt": "q"},\n', "line 3: broken JSON (Expecting value, column 1)"),
        ("x.json", '\n\n[{"prompt": "q"}] x', "line 3: broken JSON (Extra data, column 19)"),
        ("x.json", '[{"prompt": "q"}, "q"]', "row 2: is not a JSON object with named fields"),
        ("x.csv", "prompt,chosen\nq,a,b\n", "line 2: has more cells than the header"),
        ("x.csv", 'prompt,chosen\n"q\nr",a\n"s,b\n', "line 4: broken CSV (unexpected end of data)"),
        ("x.csv", "prompt,chosen\n\nq,a\n\nq,a,b\n", "line 5: has more cells than the header"),
        ("x.csv", 'prompt,chosen\n"q"r,a\n', "line 2: broken CSV (',' expected after '\"')"),
    ],
)
def test_broken_files_are_told_with_their_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert fault(tmp_path / name) == message


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_other_encodings(name: str, tmp_path: Path) -> None:
    content = {"x.jsonl": GOOD + '{"prompt": "caf\u00e9"}\n', "x.json": '[{"prompt": "q"},\n{"prompt": "caf\u00e9"}]'}
    path = tmp_path / name
    path.write_text(content.get(name, "prompt\ncaf\u00e9\n"), encoding="latin-1")
    assert fault(path) == "line 2: is not UTF-8 text (invalid continuation byte)"
    path.write_text(content.get(name, "prompt\ncaf\u00e9\n"), encoding="utf-16")
    assert fault(path) == "line 1: is not UTF-8 text (invalid start byte)"


def test_an_error_deep_in_a_large_file_is_found_quickly(tmp_path: Path) -> None:
    """`datasets` reads 10 MB at a time, and its own message names neither file nor line."""
    line = json.dumps({"prompt": "q" * 20_000, "chosen": "a", "rejected": "b"}) + "\n"
    path = tmp_path / "large.jsonl"
    path.write_text(line * 560 + line[:-2] + "\n" + line * 40)
    assert path.stat().st_size > 12e6
    start = time.monotonic()
    assert fault(path) == f"line 561: broken JSON (Expecting ',' delimiter, column {len(line) - 1})"
    assert time.monotonic() - start < 10


def test_unreadable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text(GOOD * 10)
    assert fault(path).startswith("Parquet magic bytes not found in footer.")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "no/such/folder", "/no/such/folder"])
def test_unknown_hub_datasets_offline(name: str) -> None:
    start = time.monotonic()
    message = fault(name, "train[:10%]")
    assert time.monotonic() - start < 5
    assert message.startswith(
        "neither a file (.jsonl, .json, .csv, .parquet) nor a Hub dataset that can be loaded, split train[:10%] ("
    )


# ---------------------------------------------------------------------------------------------------- readable oddities


def _read(path: Path) -> list[dict[str, Any]]:
    (part,) = load_mixture(parse_mixture([str(path), "1.0"], ["train"]))
    return rows(part)


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a"}\n\n  \n{"prompt": "b"}\n\n',
        b'{"prompt": "a"}\r\n{"prompt": "b"}',
        b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n',
        b'\xef\xbb\xbf[{"prompt": "a"},\n {"prompt": "b"}]',
        b'\n\n [{"prompt": "a"}, {"prompt": "b"}]\n',
    ],
    ids=["blank lines", "CRLF", "BOM", "BOM before a list", "list after blank lines"],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "X.JSON"])
def test_json_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert _read(tmp_path / name) == [{"prompt": "a"}, {"prompt": "b"}]


def test_json_rows_keep_their_values_and_need_not_be_alike(tmp_path: Path) -> None:
    written = [
        {"prompt": "2024-01-01", "chosen": "007", "extra": None, "deep": [{"a": 1}, "b", 2.5]},
        {"prompt": [{"role": "user", "content": "12"}], "chosen": {"role": "assistant", "content": "\u2028\x85"}},
        {"prompt": "\ud83d", "other": True},
    ]
    (tmp_path / "list.json").write_text(json.dumps(written))
    assert _read(tmp_path / "list.json") == written
    assert _read(tiny.write_jsonl(tmp_path / "lines.jsonl", written)) == written
    unescaped = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written[:2])
    (tmp_path / "unescaped.jsonl").write_text(unescaped, encoding="utf-8")
    assert _read(tmp_path / "unescaped.jsonl") == written[:2]


def _csv(path: Path, table: Sequence[Sequence[str]], **settings: Any) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **settings).writerows(table)
    return path


@pytest.mark.parametrize("settings", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}])
def test_csv_cells_are_text(settings: dict[str, Any], tmp_path: Path) -> None:
    header = ["prompt", "chosen", "rejected"]
    cells = [
        ["12", "007", "1.10"],
        ["2024-01-01", "true", "NA"],
        ['say "hi", please', "two\nlines\n\n", " a\r\nb "],
        ["", "null", "-"],
        ["x" * 200_000, "\u00e9\u2028", "'"],
    ]
    path = _csv(tmp_path / "x.csv", [header, *cells], **settings)
    assert _read(path) == [dict(zip(header, row, strict=True)) for row in cells]


def test_csv_with_bom_blank_lines_and_short_rows(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\n\nq,a,b\n\nq,a\n")
    assert _read(tmp_path / "x.csv") == [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a"},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_names_with_wildcards_are_names(kind: str, tmp_path: Path) -> None:
    for name, value in (("a[1]*", "right"), ("a1x", "wrong")):
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            parquet.write_table(pa.table({"prompt": [value]}), path)
        else:
            path.write_text(f"prompt\n{value}\n" if kind == "csv" else json.dumps({"prompt": value}))
    assert _read(tmp_path / f"a[1]*.{kind}") == [{"prompt": "right"}]


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.write_jsonl(tmp_path / "x.jsonl", [{"prompt": "q"}])
    (part,) = load_mixture(parse_mixture(["~/x.jsonl", "1.0"], ["train"]))
    assert rows(part) == [{"prompt": "q"}]


def test_a_changed_file_is_read_again_and_a_touched_or_moved_one_is_not(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"prompt": "old"}])
    (before,) = load_mixture(parse_mixture([str(path), "1.0"], ["train"]))
    stat = path.stat()
    moved = path.rename(tmp_path / "y.jsonl")
    (after,) = load_mixture(parse_mixture([str(moved), "1.0"], ["train"]))
    assert after.rows.digest == before.rows.digest
    tiny.write_jsonl(path, [{"prompt": "new"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same name, size and time as the old one
    assert _read(path) == [{"prompt": "new"}]


def test_a_local_folder_is_loaded_by_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    parquet.write_table(pa.table({"prompt": ["a", "b"]}), folder / "train.parquet")
    (part,) = load_mixture(parse_mixture([str(folder), "1.0"], ["train"]))
    assert rows(part) == [{"prompt": "a"}, {"prompt": "b"}]
    assert (part.name, part.taken.tolist()) == (f"{folder} (train)", [0, 1])
