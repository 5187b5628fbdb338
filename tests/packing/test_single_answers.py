"""Pairs without a rejected response, among others: packed and planned as if they were rows of one answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_po.data import PreferencePair
from open_po.packing import Layout, Planner, Sampler, pack, plan_epoch
from tests.packs import LAYOUTS, dataset_of, layouts

ids = st.lists(st.integers(3, 6), min_size=1, max_size=4)
pair_lists = st.lists(st.builds(PreferencePair, ids, ids, st.just([]) | ids), min_size=1, max_size=6)


@given(pair_lists, layouts)
@settings(max_examples=100, deadline=None)
def test_packs_hold_the_responses_that_there_are(items: list[PreferencePair], layout: Layout) -> None:
    batch = pack(items, layout=layout, pad_token_id=2)
    for pair, (chosen, rejected) in zip(items, batch.pairs.tolist(), strict=True):
        for number, expected in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
            assert batch.target_ids[batch.response_id == number].tolist() == expected
            assert int(batch.response_tokens[number]) == len(expected)
    sides = [(p, r) for p in items for r in (p.chosen_ids, p.rejected_ids) if r]
    assert batch.tokens == sum(len(pair.prompt_ids) + len(response) for pair, response in sides)
    distinct = {(tuple(pair.prompt_ids), tuple(response)) for pair, response in sides}
    assert len(batch.target_ids) == sum(len(response) for _, response in distinct)


# Every other one with one answer alone, and three of one prompt.
MIXED = dataset_of(
    [
        PreferencePair(prompt, [20 + number] * (1 + number % 4), [] if number % 2 else [40 + number] * (1 + number % 3))
        for number, prompt in enumerate([[number + 3] * (1 + number % 5) for number in range(9)] + [[90, 91]] * 3)
    ]
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_count_the_tokens_that_packs_have(layout: Layout) -> None:
    everything = range(len(MIXED))
    planner = Planner(dataset=MIXED, max_tokens=24, layout=layout)
    alone = [len(pack([MIXED[i]], layout=layout, pad_token_id=2).input_ids) for i in everything]
    assert planner.pair_tokens().tolist() == alone
    packs = planner.packs(everything)
    batches = [planner.batch(indices, 2) for indices in packs]
    stats = planner.stats(packs)
    assert sorted(index for indices in packs for index in indices) == list(everything)
    assert stats.computed == sum(len(batch.input_ids) for batch in batches)
    pairs = [MIXED[index] for index in everything]
    assert stats.prompts_repeated == sum(len(p.prompt_ids) * (2 if p.rejected_ids else 1) for p in pairs)
    epoch = plan_epoch(planner, Sampler(num_pairs=len(MIXED), global_batch=12, seed=0), ranks=1)
    assert epoch.tokens_otherwise == sum(batch.tokens for batch in batches)
