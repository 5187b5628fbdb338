"""The packs of a whole data set's responses, made from arrays, beside those made from objects; sums over packs."""

from __future__ import annotations

import pickle
import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_po.data import PairDataset
from open_po.packing import Layout, PackingStats, Planner, Response, ResponsePlanner, Sampler, pack_all
from open_po.reference.fill import PackPlanner, Responses
from tests.packs import datasets, layouts, sized


@given(datasets, st.integers(1, 300), st.integers(1, 300), st.integers(1, 4), layouts)
@settings(max_examples=200, deadline=None)
def test_arrays_make_the_packs_that_objects_make(
    dataset: PairDataset, max_tokens: int, budget: int, ranks: int, layout: Layout
) -> None:
    planner = ResponsePlanner(dataset=dataset, layout=layout)
    units = planner.units(Response(pair, side) for pair in range(len(dataset)) for side in (0, 1))
    share = -(-sum(unit.tokens(layout) for unit in units) // ranks)
    expected = planner.packs(units, max(1, min(max_tokens, share)))
    got = pack_all(dataset, layout, max_tokens, budget, ranks)
    assert [pack.by_prompt for pack in got] == [[list(unit.items) for unit in pack] for pack in expected]
    assert [pack.stats for pack in got] == [planner.stats(pack, budget) for pack in expected]
    for pack in got:
        assert pack.numbers.tolist() == [int(dataset.response_numbers[response]) for response in pack.items]
        assert [response for items in pack.by_prompt for response in items] == pack.items


@pytest.mark.parametrize("layout", ["shared", "rows"])
def test_what_an_answer_alone_lacks_is_in_no_pack(layout: Layout) -> None:
    dataset = sized([(5, [(3, 4), (6, 0)]), (2, [(7, 0)])])
    packs = pack_all(dataset, layout, 20, 20)
    found = sorted(tuple(response) for pack in packs for response in pack.items)
    assert found == [(0, 0), (0, 1), (1, 0), (2, 0)]
    planner = PackPlanner(responses=Responses(dataset), layout=layout, budget=20, pad=0)
    batches = [planner.batch(pack) for pack in planner.plan(1)]
    assert sorted(tokens for batch in batches for tokens in batch.response_tokens.tolist()) == [3, 4, 6, 7]
    absent = {int(dataset.response_numbers[pair, 1]) for pair in (1, 2)}
    assert set(np.flatnonzero(planner.responses.absent).tolist()) == absent


def test_a_pack_is_small_on_its_way_to_other_ranks() -> None:
    dataset = sized([(5, [(3, 4)])] * 2000)
    packs = pack_all(dataset, "shared", 100, 100)
    assert len(packs) > 100
    assert all(len(pickle.dumps(pack)) < 2000 for pack in packs)


@given(datasets, st.integers(1, 300), st.integers(1, 4), layouts, st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_the_load_of_a_step_is_that_of_its_packs(
    dataset: PairDataset, budget: int, ranks: int, layout: Layout, both: bool, rng: random.Random
) -> None:
    """Also where a prompt is cut and its parts meet again in one pack."""
    planner = Planner(dataset=dataset, max_tokens=budget, layout=layout, with_rejected=both)
    indices = rng.sample(range(len(dataset)), rng.randint(1, len(dataset)))
    shares = planner.packs_of_all(indices, ranks)
    expected = sum((planner.stats([pack]) for share in shares for pack in share), PackingStats())
    assert planner.loads(indices, ranks) == (expected, max(map(len, shares)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=15), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_whole_prompts_are_drawn_as_written_down(sizes: list[int], global_batch: int, seed: int) -> None:
    """The rule prompt by prompt, with lists: the next prompt that fits into the step's rest, else the next one."""
    numbers = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    plain = Sampler(num_pairs=len(numbers), global_batch=len(numbers), seed=seed).step_pairs(0)
    groups: dict[int, list[int]] = {}
    for index in plain:
        groups.setdefault(int(numbers[index]), []).append(index)
    waiting: defaultdict[int, deque[Any]] = defaultdict(deque)
    for turn, pairs in enumerate(groups.values()):
        waiting[len(pairs)].append((turn, pairs))
    drawn: list[int] = []
    while waiting:
        room = global_batch - len(drawn) % global_batch
        fitting = [size for size in waiting if size <= room or room == global_batch]
        size = min(fitting or waiting, key=lambda size: waiting[size][0][0])
        drawn += waiting[size].popleft()[1]
        if not waiting[size]:
            del waiting[size]
    sampler = Sampler(num_pairs=len(numbers), global_batch=global_batch, seed=seed, prompt_numbers=numbers)
    assert [index for step in range(sampler.steps_per_epoch) for index in sampler.step_pairs(step)] == drawn
