"""What goes into packs: prompts with their items, shared out and put together within a budget of tokens."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Generic, NamedTuple, TypeVar

from open_po.packing.batch import Layout

Item = TypeVar("Item")  # a pair's index, or a response


class PromptUnit(NamedTuple, Generic[Item]):
    """What belongs to one prompt, and so in one pack; lengths in tokens."""

    items: tuple[Item, ...]
    prompt: int
    responses: tuple[int, ...]  # of each distinct one
    answers: int  # all of those together

    @property
    def row(self) -> int:
        """Tokens of the prompt with its longest response."""
        return self.prompt + max(self.responses)

    def tokens(self, layout: Layout) -> int:
        """Tokens to compute, without padding."""
        return self.prompt * (1 if layout == "shared" else len(self.responses)) + self.answers


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

    @staticmethod
    def of_pack(
        layout: Layout,
        budget: int,
        *,
        rows: int,
        width: int,
        packed: int,
        unshared: int,
        prompts_repeated: int,
        prompts_computed: int,
    ) -> PackingStats:
        """Of one pack: its responses, the tokens of its longest row, those that its layout has, and without sharing."""
        padding = width * rows - unshared
        computed = width * rows if layout == "rows" else packed
        return PackingStats(
            packs=1,
            over_budget=int(computed > budget),
            budget=max(budget, computed),
            computed=computed,
            padding=padding if layout == "rows" else 0,
            prompts_repeated=prompts_repeated,
            prompts_computed=prompts_computed,
            padding_otherwise=padding,
        )

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


def by_key(items: Iterable[Item], key: Callable[[Item], int]) -> list[list[Item]]:
    """`items` with equal keys together, in order of appearance."""
    found: dict[int, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def split(
    whole: PromptUnit[Item], make: Callable[[Sequence[Item]], PromptUnit[Item]], layout: Layout, max_tokens: int
) -> list[PromptUnit[Item]]:
    """One prompt's items as they are, or as several units that fit in the budget as far as they can."""
    items: Sequence[Item] = whole.items
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


def figures(units: Sequence[PromptUnit[Item]], layout: Layout, max_tokens: int, prompts_repeated: int) -> PackingStats:
    """What a pack computes; `prompts_repeated` as in `PackingStats`."""
    return PackingStats.of_pack(
        layout,
        max_tokens,
        rows=sum(len(unit.responses) for unit in units),
        width=max(unit.row for unit in units),
        packed=sum(unit.tokens(layout) for unit in units),
        unshared=sum(unit.tokens("unshared") for unit in units),
        prompts_repeated=prompts_repeated,
        prompts_computed=sum(unit.tokens(layout) - unit.answers for unit in units),
    )


def _longest_first(
    units: Iterable[PromptUnit[Item]], size: Callable[[PromptUnit[Item]], int]
) -> list[PromptUnit[Item]]:
    return sorted(units, key=lambda unit: (-size(unit), unit.items))


def shares(
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


def balanced(units: Iterable[PromptUnit[Item]], layout: Layout, max_tokens: int) -> list[list[PromptUnit[Item]]]:
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


def filled(units: Iterable[PromptUnit[Item]], layout: Layout, max_tokens: int) -> list[list[PromptUnit[Item]]]:
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


def like_rows(units: Iterable[PromptUnit[Item]], max_tokens: int) -> list[list[PromptUnit[Item]]]:
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
