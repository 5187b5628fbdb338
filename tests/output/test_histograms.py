"""Histograms of lengths beside counts made one by one."""

from __future__ import annotations

import io
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from open_po.output.histograms import Column, Histograms, Limit

LENGTHS = st.lists(st.integers(0, 5000), min_size=1, max_size=40)


def histograms(*columns: list[int], limits: tuple[tuple[int, int], ...] = ()) -> Histograms:
    return Histograms(
        columns=[Column(title=f"part {i}", lengths=np.array(lengths)) for i, lengths in enumerate(columns)],
        limits=[Limit(column=column, length=length, text="limit") for column, length in limits],
    )


def shown(item: Histograms, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(item)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@settings(max_examples=60, deadline=None)
@given(one=st.lists(st.integers(1, 5000), min_size=1, max_size=40), limit=st.integers(1, 6000))
def test_every_length_is_in_one_bin(one: list[int], limit: int) -> None:
    other = [length // 2 + 1 for length in one]
    item = histograms(one, other, limits=((0, limit),))
    edges = item.edges()
    assert edges[0] == 0
    assert edges[-1] == max(*one, *other)
    assert len(edges) <= 15
    for row, (low, high) in zip(item.counts(), itertools.pairwise(edges), strict=True):
        assert row.tolist() == [sum(low < length <= high for length in lengths) for lengths in (one, other)]
    (line,) = [line for line in shown(item) if "limit" in line]
    assert f"limit {limit:,}: {sum(length > limit for length in one)} are longer (part 0)" in line


def test_the_printed_table() -> None:
    lines = shown(histograms([1] * 8 + [2] * 4 + [5], [3, 3, 40], limits=((0, 3), (1, 64))))
    assert lines[0].split() == ["tokens", "part", "0", "part", "1"]
    cells = [re.split(r"\s{2,}|(?<=\d) ", line.strip()) for line in lines[1:]]
    assert cells[0][:2] == ["1-3", "12"]
    assert lines[2].endswith("limit 3: 1 are longer (part 0)")
    assert lines[-2].strip().startswith("37-40")
    assert lines[-1].endswith("limit 64: 0 are longer (part 1)")


def test_bars_are_as_long_as_their_counts_say() -> None:
    (_, *lines) = shown(histograms([1] * 800 + [2] * 400 + [3] * 100 + [4]), width=60)
    bars = [line.split()[2] for line in lines]
    eighths = [8 * bar.count("█") + sum(" ▏▎▍▌▋▊▉".index(c) for c in bar if c != "█") for bar in bars]
    assert eighths[1] == pytest.approx(eighths[0] / 2, abs=1)
    assert eighths[2] == pytest.approx(eighths[0] / 8, abs=1)
    assert eighths[3] == 1


@pytest.mark.parametrize("width", [80, 140, 200])
def test_lines_fit(width: int) -> None:
    many = list(range(1, 200_000, 7))
    item = histograms(many, many, many, many, limits=((0, 4096),))
    assert max(map(len, shown(item, width))) <= width
