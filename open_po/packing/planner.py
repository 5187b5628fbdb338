"""Cutting pairs, or the responses of a reference pass, into packs of at most a budget of tokens.

All plans are deterministic, and every rank knows every rank's share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from open_po.data import PairDataset
from open_po.losses import Counts
from open_po.packing.batch import Group, Layout, PackedBatch, pack, pack_responses
from open_po.packing.units import PackingStats, PromptUnit, balanced, by_key, figures, filled, like_rows, shares, split


class Response(NamedTuple):
    """One response of a data set: side 0 is a pair's chosen one, 1 its rejected one."""

    pair: int
    side: int


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
        data, index = self.dataset, list(indices)
        return Counts(
            pairs=len(index),
            chosen_tokens=int(data.chosen_tokens[index].sum()),
            prompt_and_chosen_tokens=int(data.prompt_and_chosen_tokens[index].sum()),
        )

    def packs(self, indices: Sequence[int], *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """This rank's packs of the pairs `indices`, balanced. Empty if there are fewer pairs than ranks."""
        return self._cut(self._shares(indices, world_size)[rank])

    def packs_of_all(self, indices: Sequence[int], world_size: int) -> list[list[list[int]]]:
        """Every rank's packs of the pairs `indices`."""
        return [self._cut(share) for share in self._shares(indices, world_size)]

    def pair_tokens(self) -> NDArray[np.int64]:
        """Tokens of each pair of the data in a pack of its own."""
        data, sides = self.dataset, self._sides(slice(None))
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
        whole = self._units(sorted(indices))
        units = [part for unit in whole for part in split(unit, self._unit, self.layout, self.max_tokens)]
        return shares(units, self._unit, self.layout, world_size)

    def _cut_units(self, share: list[PromptUnit[int]]) -> list[list[PromptUnit[int]]]:
        if self.layout == "rows":
            return like_rows(share, self.max_tokens)
        return balanced(share, self.layout, self.max_tokens)

    def _cut(self, share: list[PromptUnit[int]]) -> list[list[int]]:
        return [[index for unit in units for index in unit.items] for units in self._cut_units(share)]

    def loads(self, indices: Sequence[int], world_size: int) -> tuple[PackingStats, int]:
        """What the packs of all ranks compute, and how many packs the rank has that has the most."""
        by_rank = [self._cut_units(share) for share in self._shares(indices, world_size)]
        packs = [units for cut in by_rank for units in cut]
        rounds = max(map(len, by_rank))
        prompts = len(set(self.dataset.prompt_numbers[np.asarray(indices)].tolist()))
        if sum(map(len, packs)) > prompts:  # parts of one may have met again in a pack
            return self.stats([index for unit in units for index in unit.items] for units in packs), rounds
        return sum(map(self._load, packs), PackingStats()), rounds

    def stats(self, packs: Iterable[Sequence[int]]) -> PackingStats:
        """What `packs` compute, in tokens, and what the same pairs would cost otherwise."""
        return sum((self._stats(indices) for indices in packs), PackingStats())

    def _stats(self, indices: Sequence[int]) -> PackingStats:
        return self._load(self._units(indices))

    def _load(self, units: Sequence[PromptUnit[int]]) -> PackingStats:
        pairs = [pair for unit in units for pair in unit.items]
        repeated = int(self.dataset.prompt_lengths[pairs] @ self._sides(pairs))
        return figures(units, self.layout, self.max_tokens, repeated)

    def batch(self, indices: Sequence[int], pad_token_id: int) -> PackedBatch:
        """The tensors of one pack."""
        return pack(
            [self.dataset[index] for index in indices],
            layout=self.layout,
            pad_token_id=pad_token_id,
            with_rejected=self.with_rejected,
            with_prompt=self.with_prompt,
        )

    def _sides(self, pairs: slice | list[int]) -> NDArray[np.int64]:
        """How many responses of each of `pairs` are computed: some have no rejected one."""
        sides: NDArray[np.int64] = 1 + self.with_rejected * (self.dataset.rejected_lengths[pairs] > 0)
        return sides

    def _units(self, indices: Sequence[int]) -> list[PromptUnit[int]]:
        """The prompts of pairs, in order of appearance."""
        data, index = self.dataset, np.asarray(indices)
        columns = [data.prompt_numbers[index], data.prompt_lengths[index], *data.response_numbers[index].T]
        columns += [data.chosen_lengths[index], data.rejected_lengths[index]]
        found: dict[int, tuple[list[int], int, dict[int, int]]] = {}
        for pair, number, prompt, chosen, rejected, chosen_length, rejected_length in zip(
            index.tolist(), *(column.tolist() for column in columns), strict=True
        ):
            items, _, lengths = found.setdefault(number, ([], prompt, {}))
            items.append(pair)
            lengths[chosen] = chosen_length
            if self.with_rejected and rejected_length:
                lengths[rejected] = rejected_length
        return [
            PromptUnit(tuple(items), prompt, tuple(lengths.values()), sum(lengths.values()))
            for items, prompt, lengths in found.values()
        ]

    def _unit(self, pairs: Sequence[int]) -> PromptUnit[int]:
        (unit,) = self._units(pairs)
        return unit


@dataclass(frozen=True, kw_only=True)
class ResponsePlanner:
    """Cuts responses, each distinct one once and those of one prompt together, into packs; the longest come first."""

    dataset: PairDataset
    layout: Layout

    def units(self, responses: Iterable[Response]) -> list[PromptUnit[Response]]:
        """The prompts with the distinct ones of `responses`."""
        numbers = self.dataset.response_numbers
        distinct = {int(numbers[response]): response for response in responses}
        by_prompt = by_key(distinct.values(), lambda response: int(self.dataset.prompt_numbers[response.pair]))
        return [self.unit(items) for items in by_prompt]

    def packs(self, units: Iterable[PromptUnit[Response]], max_tokens: int) -> list[list[PromptUnit[Response]]]:
        """Packs of at most `max_tokens`, longest rows first; a prompt above that is cut by response."""
        parts = (part for unit in units for part in split(unit, self.unit, self.layout, max_tokens))
        return like_rows(parts, max_tokens) if self.layout == "rows" else filled(parts, self.layout, max_tokens)

    def stats(self, units: Sequence[PromptUnit[Response]], max_tokens: int) -> PackingStats:
        """What a pack computes, in tokens, and what its responses would cost otherwise."""
        repeated = sum(unit.prompt * len(unit.responses) for unit in units)
        return figures(units, self.layout, max_tokens, repeated)

    def batch(self, units: Sequence[PromptUnit[Response]], pad_token_id: int) -> PackedBatch:
        """The tensors of one pack; its responses are those of the units, in their order."""
        groups = [
            Group.of([self.dataset[response.pair] for response in unit.items], [item.side for item in unit.items])
            for unit in units
        ]
        return pack_responses(groups, layout=self.layout, pad_token_id=pad_token_id)

    def unit(self, responses: Sequence[Response]) -> PromptUnit[Response]:
        """`responses`, which have one prompt."""
        data = self.dataset
        sides = (data.chosen_lengths, data.rejected_lengths)
        lengths = tuple(int(sides[response.side][response.pair]) for response in responses)
        return PromptUnit(tuple(responses), int(data.prompt_lengths[responses[0].pair]), lengths, sum(lengths))
