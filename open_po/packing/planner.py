"""Cutting pairs, or the responses of a reference pass, into packs of at most a budget of tokens.

All plans are deterministic, and every rank knows every rank's share.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from open_po.data import PairDataset
from open_po.losses import Counts
from open_po.packing.batch import Group, Layout, PackedBatch, pack, pack_responses

Item = TypeVar("Item")  # a pair's index, or a response


class Response(NamedTuple):
    """One response of a data set: side 0 is a pair's chosen one, 1 its rejected one."""

    pair: int
    side: int


@dataclass(frozen=True)
class PromptUnit(Generic[Item]):
    """What belongs to one prompt, and so in one pack; lengths in tokens."""

    items: tuple[Item, ...]
    prompt: int
    responses: tuple[int, ...]  # of each distinct one

    @property
    def row(self) -> int:
        """Tokens of the prompt with its longest response."""
        return self.prompt + max(self.responses)

    def tokens(self, layout: Layout) -> int:
        """Tokens to compute, without padding."""
        return self.prompt * (1 if layout == "shared" else len(self.responses)) + sum(self.responses)


@dataclass(frozen=True)
class PackingStats:
    """What packs compute, and what the same pairs cost otherwise; in tokens."""

    packs: int = 0
    over_budget: int = 0  # packs of what cannot be cut and needs more than the budget
    budget: int = 0  # what the packs had room for
    computed: int = 0  # through the model, padding included
    padding: int = 0  # part of `computed`
    prompts_repeated: int = 0  # prompt tokens, were each prompt computed with each response
    prompts_computed: int = 0
    padding_otherwise: int = 0  # padding, were these packs batches of rows of one width

    def __add__(self, other: PackingStats) -> PackingStats:
        return PackingStats(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(PackingStats)))

    def summary(self) -> dict[str, float]:
        """How many packs, and from 0 to 1: how full they are, and what sharing prompts and not padding save."""
        repeated = self.computed - self.padding + self.prompts_repeated - self.prompts_computed
        otherwise = repeated + self.padding_otherwise
        return {
            "packs": self.packs,
            "packs_over_budget": self.over_budget,
            "fill": self.computed / max(self.budget, 1),
            "prompt_tokens_saved": (self.prompts_repeated - self.prompts_computed) / max(self.prompts_repeated, 1),
            "padding_avoided": (self.padding_otherwise - self.padding) / max(otherwise, 1),
        }


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Cuts a step's pairs into packs of at most `max_tokens` tokens, padding included.

    Pairs of one prompt share a pack. Those that need more than the budget together are cut pair by pair, and a pair
    that needs more goes alone.
    """

    dataset: PairDataset
    max_tokens: int
    layout: Layout
    with_rejected: bool = True
    with_prompt: bool = False

    def counts(self, indices: Sequence[int]) -> Counts:
        """What the losses of a step on the pairs `indices` are divided by."""
        data = self.dataset
        index = list(indices)
        earlier, chosen, _ = data.scored[index].sum(0).tolist()  # of the prompts, with each response
        # A prompt's first token is predicted by nothing.
        prompts = int(data.prompt_lengths[index].sum()) - len(index)
        return Counts(pairs=len(index), chosen_tokens=earlier + chosen, prompt_and_chosen_tokens=prompts + chosen)

    def packs(self, indices: Sequence[int], *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """This rank's packs of the pairs `indices`, balanced. Empty if there are fewer pairs than ranks."""
        return self._cut(self._shares(indices, world_size)[rank])

    def packs_of_all(self, indices: Sequence[int], world_size: int) -> list[list[list[int]]]:
        """Every rank's packs of the pairs `indices`."""
        return [self._cut(share) for share in self._shares(indices, world_size)]

    def pair_tokens(self) -> NDArray[np.int64]:
        """Tokens of each pair of the data in a pack of its own."""
        data, sides = self.dataset, 2 if self.with_rejected else 1
        longest = data.chosen_lengths
        if self.with_rejected:
            longest = np.maximum(longest, data.rejected_lengths)
        if self.layout == "rows":
            return sides * (data.prompt_lengths + longest)
        tokens = data.prompt_lengths * (1 if self.layout == "shared" else sides) + data.chosen_lengths
        return tokens + data.rejected_lengths if self.with_rejected else tokens

    def rounds(self, indices: Sequence[int], world_size: int) -> int:
        """How many packs the rank has that has the most."""
        return max(map(len, self.packs_of_all(indices, world_size)))

    def smallest(self, indices: Sequence[int], count: int) -> list[list[int]]:
        """`count` packs that cost as little as can be: each the pair of `indices` with the fewest tokens."""
        if count <= 0:
            return []
        return [[min(indices, key=lambda index: self._unit([index]).tokens(self.layout))]] * count

    def _shares(self, indices: Sequence[int], world_size: int) -> list[list[PromptUnit[int]]]:
        by_prompt = _by_key(sorted(indices), lambda index: int(self.dataset.prompt_numbers[index]))
        units = [unit for items in by_prompt for unit in _split(items, self._unit, self.layout, self.max_tokens)]
        return _shares(units, self._unit, self.layout, world_size)

    def _cut(self, share: list[PromptUnit[int]]) -> list[list[int]]:
        cut = _rows(share, self.max_tokens) if self.layout == "rows" else _balanced(share, self.layout, self.max_tokens)
        return [[index for unit in units for index in unit.items] for units in cut]

    def stats(self, packs: Iterable[Sequence[int]]) -> PackingStats:
        """What `packs` compute, in tokens, and what the same pairs would cost otherwise."""
        return sum((self._stats(indices) for indices in packs), PackingStats())

    def _stats(self, indices: Sequence[int]) -> PackingStats:
        by_prompt = _by_key(indices, lambda index: int(self.dataset.prompt_numbers[index]))
        units = [self._unit(items) for items in by_prompt]
        sides = 2 if self.with_rejected else 1
        return _stats(units, self.layout, self.max_tokens, sides * sum(unit.prompt * len(unit.items) for unit in units))

    def batch(self, indices: Sequence[int], pad_token_id: int) -> PackedBatch:
        """The tensors of one pack."""
        return pack(
            [self.dataset[index] for index in indices],
            layout=self.layout,
            pad_token_id=pad_token_id,
            with_rejected=self.with_rejected,
            with_prompt=self.with_prompt,
        )

    def _unit(self, pairs: Sequence[int]) -> PromptUnit[int]:
        data, lengths = self.dataset, {}
        for index in pairs:
            chosen, rejected = data.response_numbers[index].tolist()
            lengths[chosen] = int(data.chosen_lengths[index])
            if self.with_rejected:
                lengths[rejected] = int(data.rejected_lengths[index])
        return PromptUnit(tuple(pairs), int(data.prompt_lengths[pairs[0]]), tuple(lengths.values()))


@dataclass(frozen=True, kw_only=True)
class ResponsePlanner:
    """Cuts responses, each distinct one once and those of one prompt together, into packs; the longest come first."""

    dataset: PairDataset
    layout: Layout

    def units(self, responses: Iterable[Response]) -> list[PromptUnit[Response]]:
        """The prompts with the distinct ones of `responses`."""
        numbers = self.dataset.response_numbers
        distinct = {int(numbers[response]): response for response in responses}
        by_prompt = _by_key(distinct.values(), lambda response: int(self.dataset.prompt_numbers[response.pair]))
        return [self._unit(items) for items in by_prompt]

    def packs(self, units: Iterable[PromptUnit[Response]], max_tokens: int) -> list[list[PromptUnit[Response]]]:
        """Packs of at most `max_tokens`, longest rows first; a prompt above that is cut by response."""
        parts = (part for unit in units for part in _split(unit.items, self._unit, self.layout, max_tokens))
        return _rows(parts, max_tokens) if self.layout == "rows" else _filled(parts, self.layout, max_tokens)

    def stats(self, units: Sequence[PromptUnit[Response]], max_tokens: int) -> PackingStats:
        """What a pack computes, in tokens, and what its responses would cost otherwise."""
        repeated = sum(unit.prompt * len(unit.responses) for unit in units)
        return _stats(units, self.layout, max_tokens, repeated)

    def batch(self, units: Sequence[PromptUnit[Response]], pad_token_id: int) -> PackedBatch:
        """The tensors of one pack; its responses are those of the units, in their order."""
        groups = [
            Group.of([self.dataset[response.pair] for response in unit.items], [item.side for item in unit.items])
            for unit in units
        ]
        return pack_responses(groups, layout=self.layout, pad_token_id=pad_token_id)

    def _unit(self, responses: Sequence[Response]) -> PromptUnit[Response]:
        data = self.dataset
        sides = (data.chosen_lengths, data.rejected_lengths)
        lengths = tuple(int(sides[response.side][response.pair]) for response in responses)
        return PromptUnit(tuple(responses), int(data.prompt_lengths[responses[0].pair]), lengths)


def _by_key(items: Iterable[Item], key: Callable[[Item], int]) -> list[list[Item]]:
    """`items` with equal keys together, in order of appearance."""
    found: dict[int, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def _split(
    items: Sequence[Item], make: Callable[[Sequence[Item]], PromptUnit[Item]], layout: Layout, max_tokens: int
) -> list[PromptUnit[Item]]:
    """One prompt's items as one unit, or as several that fit in the budget as far as they can."""
    whole = make(items)
    if len(items) == 1 or _size([whole], layout) <= max_tokens:
        return [whole]
    parts: list[PromptUnit[Item]] = []
    while items:
        # The most items that fit, found by doubling and halving: adding them one by one would be quadratic.
        most = 1
        while most < len(items) and _size([make(items[: 2 * most])], layout) <= max_tokens:
            most *= 2
        sizes = range(most + 1, min(2 * most, len(items)) + 1)
        most += bisect_right(sizes, max_tokens, key=lambda count: _size([make(items[:count])], layout))
        parts.append(make(items[:most]))
        items = items[most:]
    return parts


def _size(units: Sequence[PromptUnit[Item]], layout: Layout) -> int:
    """Tokens of a pack, padding included."""
    if layout == "rows":
        return max(unit.row for unit in units) * sum(len(unit.responses) for unit in units)
    return sum(unit.tokens(layout) for unit in units)


def _stats(units: Sequence[PromptUnit[Item]], layout: Layout, max_tokens: int, prompts_repeated: int) -> PackingStats:
    rows = sum(len(unit.responses) for unit in units)
    unshared = sum(unit.tokens("unshared") for unit in units)
    padding = max(unit.row for unit in units) * rows - unshared
    computed = _size(units, layout)
    return PackingStats(
        packs=1,
        over_budget=int(computed > max_tokens),
        budget=max(max_tokens, computed),
        computed=computed,
        padding=padding if layout == "rows" else 0,
        prompts_repeated=prompts_repeated,
        prompts_computed=sum(unit.tokens(layout) - sum(unit.responses) for unit in units),
        padding_otherwise=padding,
    )


def _longest_first(
    units: Iterable[PromptUnit[Item]], size: Callable[[PromptUnit[Item]], int]
) -> list[PromptUnit[Item]]:
    return sorted(units, key=lambda unit: (-size(unit), unit.items))


def _shares(
    units: Sequence[PromptUnit[Item]],
    make: Callable[[Sequence[Item]], PromptUnit[Item]],
    layout: Layout,
    world_size: int,
) -> list[list[PromptUnit[Item]]]:
    """Each rank's units: the longest first, to whoever has the fewest tokens so far.

    While there are fewer prompts than ranks the longest that can be is cut in two, so that no rank is idle that need
    not be.
    """
    units = list(units)
    while len(units) < world_size and (several := [unit for unit in units if len(unit.items) > 1]):
        longest = max(several, key=lambda unit: unit.tokens(layout))
        units.remove(longest)
        half = len(longest.items) // 2
        units += [make(longest.items[:half]), make(longest.items[half:])]
    return _spread(_longest_first(units, lambda unit: unit.tokens(layout)), layout, world_size)


def _spread(longest_first: Iterable[PromptUnit[Item]], layout: Layout, bins: int) -> list[list[PromptUnit[Item]]]:
    shares: list[list[PromptUnit[Item]]] = [[] for _ in range(bins)]
    loads = [(0, number) for number in range(bins)]
    for unit in longest_first:
        load, number = loads[0]
        shares[number].append(unit)
        heapq.heapreplace(loads, (load + unit.tokens(layout), number))
    return shares


def _balanced(units: Iterable[PromptUnit[Item]], layout: Layout, max_tokens: int) -> list[list[PromptUnit[Item]]]:
    """As few packs as hold the units, all of about the same size: full ones and a small rest would be slower."""
    longest_first = _longest_first(units, lambda unit: unit.tokens(layout))
    alone = [[unit] for unit in longest_first if unit.tokens(layout) > max_tokens]
    rest = longest_first[len(alone) :]
    bins = -(-sum(unit.tokens(layout) for unit in rest) // max_tokens)
    while True:  # ends at one unit a pack at the latest
        packs = _spread(rest, layout, bins)
        if all(_size(pack, layout) <= max_tokens for pack in packs):
            return alone + packs
        bins = min(bins + 1 + bins // 20, len(rest))


def _filled(units: Iterable[PromptUnit[Item]], layout: Layout, max_tokens: int) -> list[list[PromptUnit[Item]]]:
    """Packs filled one after the other, longest rows first, so that memory runs out at the start or never."""
    packs: list[list[PromptUnit[Item]]] = []
    room = 0
    for unit in _longest_first(units, lambda unit: unit.row):
        tokens = unit.tokens(layout)
        if not packs or tokens > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(unit)
        room -= tokens
    return packs


def _rows(units: Iterable[PromptUnit[Item]], max_tokens: int) -> list[list[PromptUnit[Item]]]:
    """Packs of rows of like length, so that little is padded."""
    packs: list[list[PromptUnit[Item]]] = []
    width = rows = 0
    for unit in _longest_first(units, lambda unit: unit.row):
        rows += len(unit.responses)
        if not packs or rows * width > max_tokens:
            packs.append([])
            width, rows = unit.row, len(unit.responses)
        packs[-1].append(unit)
    return packs
