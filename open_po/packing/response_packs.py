"""All responses of a data set in packs, as arrays: millions of them are planned in seconds, and take no objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from open_po.data import PairDataset
from open_po.packing.batch import Layout
from open_po.packing.planner import Response, ResponsePlanner
from open_po.packing.units import PackingStats, split

_Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ResponsePack:
    """Responses that are computed in one forward pass. As arrays it is small, also on its way to other ranks."""

    responses: _Numbers  # [R, 2] pair and side, those of one prompt together
    numbers: _Numbers  # [R] the responses' numbers
    ends: _Numbers  # [U] behind the last response of each prompt
    stats: PackingStats

    @property
    def items(self) -> list[Response]:
        """The pack's responses."""
        return [Response(*response) for response in self.responses.tolist()]

    @property
    def by_prompt(self) -> list[list[Response]]:
        """The same, those of one prompt in a list."""
        items, ends = self.items, self.ends.tolist()
        return [items[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class _Units:
    """Responses in order, and where among them each unit begins: what belongs to one prompt and goes into one pack."""

    responses: _Numbers  # [R, 2]
    lengths: _Numbers  # [R]
    starts: _Numbers  # [U + 1] and where the last ends
    prompts: _Numbers  # [U] tokens of the prompt

    @property
    def counts(self) -> _Numbers:
        return np.diff(self.starts)

    @property
    def rows(self) -> _Numbers:
        """Tokens of the prompt with its longest response."""
        longest: _Numbers = self.prompts + np.maximum.reduceat(self.lengths, self.starts[:-1])
        return longest

    def tokens(self, layout: Layout) -> _Numbers:
        """Tokens to compute, without padding."""
        times = 1 if layout == "shared" else self.counts
        tokens: _Numbers = self.prompts * times + np.add.reduceat(self.lengths, self.starts[:-1])
        return tokens

    def ordered(self, order: _Numbers) -> _Units:
        """The units in another order."""
        counts = self.counts[order]
        starts = np.concatenate([[0], np.cumsum(counts)])
        index = np.arange(starts[-1]) + np.repeat(self.starts[order] - starts[:-1], counts)
        return _Units(self.responses[index], self.lengths[index], starts, self.prompts[order])


def pack_all(dataset: PairDataset, layout: Layout, max_tokens: int, budget: int, ranks: int = 1) -> list[ResponsePack]:
    """Every distinct response once, in packs of at most `max_tokens`, longest rows first.

    They are small enough that there is one for each of the `ranks`. A prompt that needs more is cut by response.
    `budget` is what the packs' figures call room.
    """
    units = _all_units(dataset)
    max_tokens = max(1, min(max_tokens, -(-int(units.tokens(layout).sum()) // ranks)))
    units = _cut(units, dataset, layout, max_tokens)
    # Longest rows first, so that memory runs out at the start or never.
    firsts = units.responses[units.starts[:-1]]
    units = units.ordered(np.lexsort((firsts[:, 1], firsts[:, 0], -units.rows)))
    ends = np.array(list(_pack_ends(units, layout, max_tokens)), dtype=np.int64)
    return list(_packs(units, ends, dataset, layout, budget))


def _all_units(dataset: PairDataset) -> _Units:
    """All distinct responses, by prompt in the order in which they first appear; none that an answer alone lacks."""
    numbers = dataset.response_numbers.ravel()
    places = np.arange(len(numbers))
    shown = np.empty(int(numbers.max()) + 1, dtype=np.int64)  # by number: where it appears last, as good as any
    first = np.empty_like(shown)
    shown[numbers] = places
    first[numbers[::-1]] = places[::-1]
    sides = np.stack([dataset.chosen_lengths, dataset.rejected_lengths], 1)
    there = sides.ravel()[shown] > 0
    shown, first = shown[there], first[there]
    prompt = dataset.prompt_numbers[shown // 2]
    earliest = np.full(int(prompt.max()) + 1, len(numbers))
    np.minimum.at(earliest, prompt, first)
    order = np.lexsort((first, earliest[prompt]))
    shown, prompt = shown[order], prompt[order]
    responses = np.stack([shown // 2, shown % 2], 1)
    begins = np.flatnonzero(np.concatenate([[True], prompt[1:] != prompt[:-1]]))
    return _Units(
        responses,
        sides[responses[:, 0], responses[:, 1]],
        np.append(begins, len(responses)),
        dataset.prompt_lengths[responses[begins, 0]],
    )


def _cut(units: _Units, dataset: PairDataset, layout: Layout, max_tokens: int) -> _Units:
    """The same with units cut that do not fit, as far as they can be."""
    size = units.rows * units.counts if layout == "rows" else units.tokens(layout)
    wide = np.flatnonzero((size > max_tokens) & (units.counts > 1))
    if not len(wide):
        return units
    planner = ResponsePlanner(dataset=dataset, layout=layout)
    more = []
    for unit in wide.tolist():
        start, end = units.starts[unit : unit + 2]
        whole = planner.unit([Response(*response) for response in units.responses[start:end].tolist()])
        parts = split(whole, planner.unit, layout, max_tokens)
        more.append(start + np.cumsum([len(part.items) for part in parts])[:-1])
    starts = np.sort(np.concatenate([units.starts, *more]))
    of_prompt = np.searchsorted(units.starts, starts[:-1], side="right") - 1
    return _Units(units.responses, units.lengths, starts, units.prompts[of_prompt])


def _pack_ends(units: _Units, layout: Layout, max_tokens: int) -> Iterator[int]:
    """Behind which unit each pack ends; they are filled one after the other."""
    used = 0
    if layout == "rows":
        width = 0
        for place, (row, count) in enumerate(zip(units.rows.tolist(), units.counts.tolist(), strict=True)):
            used += count
            if place and used * width > max_tokens:
                yield place
                used = count
            if used == count:
                width = row
    else:
        for place, tokens in enumerate(units.tokens(layout).tolist()):
            used += tokens
            if place and used > max_tokens:
                yield place
                used = tokens
    yield len(units.prompts)


def _packs(units: _Units, ends: _Numbers, dataset: PairDataset, layout: Layout, budget: int) -> Iterator[ResponsePack]:
    begins = np.concatenate([[0], ends[:-1]])
    numbers = dataset.response_numbers[units.responses[:, 0], units.responses[:, 1]]
    counts, tokens = units.counts, units.tokens(layout)
    answers = np.add.reduceat(units.lengths, units.starts[:-1])
    columns = {
        "rows": np.add.reduceat(counts, begins),
        "unshared": np.add.reduceat(units.prompts * counts + answers, begins),
        "width": np.maximum.reduceat(units.rows, begins),
        "packed": np.add.reduceat(tokens, begins),
        "prompts_computed": np.add.reduceat(tokens - answers, begins),
        "prompts_repeated": np.add.reduceat(units.prompts * counts, begins),
    }
    for begin, end, *figures in zip(
        begins.tolist(), ends.tolist(), *(column.tolist() for column in columns.values()), strict=True
    ):
        start, stop = int(units.starts[begin]), int(units.starts[end])
        yield ResponsePack(
            responses=units.responses[start:stop],
            numbers=numbers[start:stop],
            ends=units.starts[begin + 1 : end + 1] - start,
            stats=PackingStats.of_pack(layout, budget, **dict(zip(columns, figures, strict=True))),
        )
