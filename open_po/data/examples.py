"""Which pairs to look at first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from open_po.data.dataset import PairDataset
from open_po.data.facts import SpecialTokens


@dataclass(frozen=True, kw_only=True)
class Example:
    """A pair worth a look."""

    index: int
    reasons: list[str]


def choose_examples(dataset: PairDataset, special: SpecialTokens, count: int) -> list[Example]:
    """At most `count` pairs, the most telling first, each with every reason to look at it."""
    chosen: dict[int, list[str]] = {}
    for index, reason in _candidates(dataset, special):
        if index in chosen:
            chosen[index].append(reason)
        elif len(chosen) < count:
            chosen[index] = [reason]
    for index in range(len(dataset)):
        if len(chosen) >= count:
            break
        chosen.setdefault(index, ["the next in order"])
    return [Example(index=index, reasons=reasons) for index, reasons in chosen.items()]


def _candidates(dataset: PairDataset, special: SpecialTokens) -> Iterator[tuple[int, str]]:
    firsts = _first_of_each(dataset)
    yield from firsts[:1]
    odd = (special.endings == "missing").any(1)
    if odd.any():
        yield int(odd.argmax()), "a response ends without EOS"
    if (special.leading_bos > 1).any():
        yield int((special.leading_bos > 1).argmax()), "its prompt begins with more than one BOS"
    lost = dataset.lost
    if lost.any():
        index = int(lost.sum(1).argmax())
        yield index, f"it loses the most to truncation, {int(lost[index].sum()):,} tokens"
    yield dataset.longest_pair, f"it is the longest, {dataset.longest_row:,} tokens of prompt and longer response"
    yield from firsts[1:]
    numbers, counts = np.unique(dataset.prompt_numbers, return_counts=True)
    if counts.max() > 1:
        most = int((dataset.prompt_numbers == numbers[counts.argmax()]).argmax())
        yield most, f"{counts.max():,} pairs have its prompt"
    if (earlier := dataset.scored[:, 0]).any():
        yield int(earlier.argmax()), f"most of its prompt is scored, {int(earlier.max()):,} tokens"
    apart = np.abs(dataset.chosen_lengths - dataset.rejected_lengths) * (dataset.rejected_lengths > 0)
    if apart.any():
        yield int(apart.argmax()), f"its responses differ most in length, by {int(apart.max()):,} tokens"


def _first_of_each(dataset: PairDataset) -> list[tuple[int, str]]:
    """The first pair of every source that has one."""
    ends = np.cumsum([source.pairs for source in dataset.sources])
    return [
        (int(end) - source.pairs, f"it is the first of {source.name}")
        for end, source in zip(ends, dataset.sources, strict=True)
        if source.pairs
    ]
