"""Data sets of given lengths, and what a pack's tokens see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from hypothesis import strategies as st

from open_po.data import PairDataset, PreferencePair
from open_po.data.tokenization import response_key
from open_po.output.summary import PartTotals
from open_po.packing import Layout, PackedBatch

LAYOUTS: tuple[Layout, ...] = ("shared", "unshared", "rows")


# Prompts and responses of two tokens that often are equal, or begin alike, and longer ones that hardly ever are.
ids = st.one_of(
    st.lists(st.integers(3, 4), min_size=1, max_size=2),
    st.lists(st.integers(3, 300), min_size=1, max_size=12),
)


pair_lists = st.lists(st.builds(PreferencePair, ids, ids, ids), min_size=1, max_size=8)


layouts = st.sampled_from(LAYOUTS)


def dataset_of(items: Sequence[PreferencePair]) -> PairDataset:
    """The pairs as `load_pairs` would give them."""
    prompts, chosen, rejected, turns = zip(*(vars(pair).values() for pair in items), strict=True)
    scored = [turn.prompt for turn in turns]
    keys = [
        list(map(response_key, prompts, side, scored, [turn[number] for turn in turns]))
        for number, side in ((1, chosen), (2, rejected))
    ]
    numbered: tuple[dict[Any, int], dict[Any, int]] = ({}, {})  # prompts, responses

    def number(kind: int, key: Any) -> int:
        return numbered[kind].setdefault(key, len(numbered[kind]))

    return PairDataset(
        rows=cast(Any, [vars(pair) | {"turns": pair.turns.flat()} for pair in items]),
        places=np.arange(len(items)),
        row_numbers=np.arange(len(items)),
        pair_numbers=np.zeros(len(items), dtype=np.int32),
        prompt_lengths=np.array([len(ids) for ids in prompts]),
        chosen_lengths=np.array([len(ids) for ids in chosen]),
        rejected_lengths=np.array([len(ids) for ids in rejected]),
        scored=np.array([pair.scored_tokens for pair in items]),
        prompt_keys=np.array(
            [response_key(prompt, [], turn) for prompt, turn in zip(prompts, scored, strict=True)], dtype="V16"
        ),
        response_keys=np.array(keys, dtype="V16").T,
        prompt_numbers=np.array(
            [number(0, (tuple(prompt), turn)) for prompt, turn in zip(prompts, scored, strict=True)]
        ),
        response_numbers=np.array([[number(1, key) for key in pair] for pair in zip(*keys, strict=True)]),
        highest_id=300,
        left_out={},
        lost=np.zeros((len(items), 3), dtype=np.int64),
        sources=[
            PartTotals(
                dataset="rows",
                name="the",
                format="text",
                available=len(items),
                rows=len(items),
                repeated=0,
                left_out={},
                pairs=len(items),
            )
        ],
    )


def sized(prompts: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> PairDataset:
    """Pairs of different responses, by the lengths of prompts and of each prompt's chosen and rejected responses."""
    items = []
    for number, (prompt, pairs) in enumerate(prompts):
        for turn, (chosen, rejected) in enumerate(pairs):
            sides = ([10 + 2 * turn + side] * length for side, length in enumerate((chosen, rejected)))
            items.append(PreferencePair([1000 + number] * prompt, *sides))
    return dataset_of(items)


sized_lists = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4)),
    min_size=1,
    max_size=12,
).map(sized)


def seen_from(batch: PackedBatch, position: int) -> list[int]:
    """The places in a pack that the token at `position` sees, itself included, in the order of their positions."""
    if batch.layout == "rows":
        width = len(batch.input_ids) // len(batch.row_lengths)
        return list(range(position - position % width, position + 1))
    (own,) = (segment for segment in batch.segments if segment.start <= position < segment.end)
    return [*range(own.prefix_start, own.prefix_end), *range(own.start, position + 1)]


datasets = st.one_of(pair_lists.map(dataset_of), sized_lists)
