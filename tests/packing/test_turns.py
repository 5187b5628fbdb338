"""Packs and plans of pairs whose prompts are scored in part, and whose responses are not wholly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_po.data import PreferencePair
from open_po.data.turns import Turns
from open_po.losses import Counts
from open_po.packing import Layout, PackedBatch, Planner, Response, ResponsePlanner, pack
from tests.masked import IGNORED, labels_of
from tests.packs import LAYOUTS, dataset_of, layouts, seen_from


@st.composite
def part(draw: st.DrawFn, *, prompt: bool) -> tuple[list[int], Any]:
    """Few different ids, so that prompts and responses are equal or begin alike, and runs of them."""
    ids = draw(st.lists(st.integers(3, 4), min_size=1, max_size=7))
    ends = sorted(draw(st.lists(st.integers(int(prompt), len(ids)), max_size=4, unique=True)))
    runs = tuple(zip(ends[::2], ends[1::2], strict=False))
    if not prompt and sum(end - start for start, end in runs) == len(ids):
        runs = ()  # something of a response is scored
    return ids, runs


@st.composite
def pair(draw: st.DrawFn) -> PreferencePair:
    parts = [draw(part(prompt=True)), draw(part(prompt=False)), draw(part(prompt=False))]
    return PreferencePair(*(ids for ids, _ in parts), Turns(*(runs for _, runs in parts)))


pairs = st.lists(pair(), min_size=1, max_size=6)


def expected(item: PreferencePair, side: int) -> list[tuple[list[int], int]]:
    """What each label is predicted from, and the label."""
    ids, labels = labels_of(item, side)
    return [(ids[:place], label) for place, label in enumerate(labels) if label != IGNORED]


def scored(batch: PackedBatch, response: int) -> list[tuple[list[int], int]]:
    start, tokens = int(batch.response_start[response]), int(batch.response_tokens[response])
    assert batch.response_id[start : start + tokens].tolist() == [response] * tokens
    predictors, targets = batch.spread(batch.score_index), batch.spread(batch.target_ids)
    found = []
    for number in range(start, start + tokens):
        seen = seen_from(batch, int(predictors[number]))
        assert batch.position_ids[seen].tolist() == list(range(len(seen)))
        found.append((batch.input_ids[seen].tolist(), int(targets[number])))
    return found


@given(pairs, layouts, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_label_is_predicted_from_its_own_context(
    items: list[PreferencePair], layout: Layout, both: bool, with_prompt: bool
) -> None:
    batch = pack(items, layout=layout, pad_token_id=2, with_rejected=both, with_prompt=with_prompt)
    assert int(batch.response_tokens.sum()) == len(batch.spread(batch.target_ids))
    for number, item in enumerate(items):
        chosen, rejected = batch.pairs[number].tolist()
        assert scored(batch, chosen) == expected(item, 0)
        assert scored(batch, rejected) == (expected(item, 1) if both else [])
        if with_prompt:  # what of the prompt is not scored with the response
            assert batch.prompts is not None
            mine = [places for places, _ in expected(item, 0)]
            rest = [(item.prompt_ids[:i], token) for i, token in enumerate(item.prompt_ids) if i]
            assert scored(batch, int(batch.prompts[number])) == [each for each in rest if each[0] not in mine]


@given(pairs, st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_shared_prompt_is_scored_once(items: list[PreferencePair], both: bool) -> None:
    batch = pack(items, layout="shared", pad_token_id=2, with_rejected=both)
    found = {}
    for item in items:
        prompt = (tuple(item.prompt_ids), item.turns.prompt)
        for side in range(1 + both):
            response = (tuple((item.chosen_ids, item.rejected_ids)[side]), item.turns[1 + side])
            found[prompt, response] = item.scored_tokens[1 + side]
    prompts = {prompt: sum(end - start for start, end in prompt[1]) for prompt, _ in found}
    assert len(batch.score_index) == len(batch.target_ids) == sum(found.values()) + sum(prompts.values())
    assert len(batch.input_ids) == sum(len(ids) for ids, _ in prompts) + sum(len(r[0]) for _, r in found)


@given(pairs, st.sampled_from(LAYOUTS[:2]))
@settings(max_examples=150, deadline=None)
def test_the_last_layer_computes_from_the_first_predictor_on(items: list[PreferencePair], layout: Layout) -> None:
    batch = pack(items, layout=layout, pad_token_id=2)
    last = batch.last_layer
    assert last is not None
    assert last.scored_index[last.score_index].tolist() == batch.score_index.tolist()
    wanted = set(batch.score_index.tolist())
    closed = set()
    for segment in batch.segments:
        mine = [place for place in range(segment.start, segment.end) if place in wanted]
        closed |= set(range(mine[0], mine[-1] + 1)) if mine else set()
    assert last.scored_index.tolist() == sorted(closed)
    tokens = torch.cat([last.context_index, last.scored_index])[last.key_order].tolist()
    assert tokens == sorted(set(tokens))
    query = 0
    for segment, queries in zip(last.segments, last.query_lengths, strict=True):
        for end in range(segment.end - queries, segment.end):
            seen = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, end + 1)]
            assert [tokens[place] for place in seen] == seen_from(batch, int(last.scored_index[query]))
            query += 1
    assert query == len(last.scored_index)


@given(pairs, layouts)
@settings(max_examples=80, deadline=None)
def test_counts_and_the_reference_pass_have_the_same_labels(items: list[PreferencePair], layout: Layout) -> None:
    dataset = dataset_of(items)
    planner = Planner(dataset=dataset, max_tokens=40, layout=layout)
    indices = range(len(items))
    chosen = [[label for label in labels_of(item, 0)[1] if label != IGNORED] for item in items]
    rest = sum(len(item.prompt_ids) - 1 - item.scored_tokens[0] for item in items)
    tokens = sum(map(len, chosen))
    assert planner.counts(indices) == Counts(
        pairs=len(items), chosen_tokens=tokens, prompt_and_chosen_tokens=tokens + rest
    )
    by_response = ResponsePlanner(dataset=dataset, layout=layout)
    every = [Response(index, side) for index in indices for side in (0, 1)]
    for units in by_response.packs(by_response.units(every), 40):
        batch = by_response.batch(units, 2)
        for number, response in enumerate(item for unit in units for item in unit.items):
            assert scored(batch, number) == expected(items[response.pair], response.side)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_that_differ_in_what_is_scored_are_two(layout: Layout) -> None:
    items = [
        PreferencePair([5, 6, 7], [8], [9], Turns(prompt=((1, 2),))),
        PreferencePair([5, 6, 7], [8], [9], Turns(prompt=((2, 3),))),
        PreferencePair([5, 6, 7], [8, 8], [9], Turns(chosen=((0, 1),))),
        PreferencePair([5, 6, 7], [8, 8], [9]),
    ]
    batch = pack(items, layout=layout, pad_token_id=2)
    assert batch.num_responses == 7  # the last two share their prompt and the rejected response
    assert len(set(dataset_of(items).prompt_numbers.tolist())) == 3
    assert len(set(dataset_of(items).response_numbers.ravel().tolist())) == 7
