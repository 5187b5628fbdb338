"""Properties of the sampler, the planner and the pack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_po.data import PreferencePair
from open_po.packing import Planner, Sampler, pack

ids = st.lists(st.integers(3, 300), min_size=1, max_size=12)
pairs = st.builds(PreferencePair, ids, ids, ids)


@dataclass
class Lengths:
    """The part of a PairDataset that planning reads."""

    prompt_lengths: np.ndarray
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray


def lengths_of(items: list[PreferencePair]) -> Lengths:
    parts = zip(*[(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in items], strict=True)
    return Lengths(*(np.array(part) for part in parts))


@given(st.lists(pairs, min_size=1, max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_scored_token_is_predicted_from_the_one_before_it(items: list[PreferencePair], both: bool) -> None:
    batch = pack(items, pad_token_id=2, with_rejected=both)
    rows = batch.input_ids.view(-1, batch.row_width)
    got: dict[int, list[int]] = {}
    contexts: dict[int, list[list[int]]] = {}
    for position, target, response in zip(
        batch.score_index.tolist(), batch.target_ids.tolist(), batch.response_id.tolist(), strict=True
    ):
        row, column = divmod(position, batch.row_width)
        got.setdefault(response, []).append(target)
        contexts.setdefault(response, []).append(rows[row, : column + 1].tolist())
    for number, pair in enumerate(items):
        sides = [pair.chosen_ids, pair.rejected_ids] if both else [pair.chosen_ids]
        for response_id, response in zip(batch.pairs[number].tolist(), sides, strict=False):
            assert got[response_id] == response
            assert contexts[response_id] == [pair.prompt_ids + response[:i] for i in range(len(response))]
    scored = sum(len(p.chosen_ids) + (len(p.rejected_ids) if both else 0) for p in items)
    assert len(batch.target_ids) == scored
    assert batch.tokens == scored + sum(len(p.prompt_ids) * (2 if both else 1) for p in items)
    assert batch.num_responses == 2 * len(items)


@given(st.lists(pairs, min_size=1, max_size=30), st.integers(1, 200), st.integers(1, 5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_pair_is_lost_or_doubled_and_the_budget_holds(
    items: list[PreferencePair], budget: int, world_size: int, both: bool
) -> None:
    planner = Planner(dataset=lengths_of(items), max_tokens=budget, with_rejected=both)
    shares = [planner.packs(range(len(items)), rank=rank, world_size=world_size) for rank in range(world_size)]
    placed = [index for share in shares for group in share for index in group]
    assert sorted(placed) == list(range(len(items)))
    for group in (group for share in shares for group in share):
        batch = pack([items[index] for index in group], pad_token_id=2, with_rejected=both)
        assert len(batch.input_ids) <= budget or len(group) == 1
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1, "ranks get the same number of pairs"


def test_ranks_get_nearly_the_same_tokens() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 0.8, (3, 256)).astype(int) + 1
    planner = Planner(dataset=Lengths(*lengths), max_tokens=4096)
    loads = [
        sum(planner.row_length(i) for group in planner.packs(range(256), rank=r, world_size=4) for i in group)
        for r in range(4)
    ]
    assert max(loads) / min(loads) < 1.05


def test_like_lengths_share_a_pack() -> None:
    items = [PreferencePair([5] * 4, [7] * n, [8] * n) for n in (1, 30, 2, 29, 3, 28)]
    planner = Planner(dataset=lengths_of(items), max_tokens=6 * 34)
    assert planner.packs(range(6)) == [[1, 3, 5], [4, 2, 0]]


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_pair_once(num_pairs: int, global_batch: int, seed: int) -> None:
    sampler = Sampler(num_pairs=num_pairs, global_batch=global_batch, seed=seed)
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        batches = [sampler.step_pairs(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(num_pairs))
        assert all(len(batch) == global_batch for batch in batches[:-1])
        assert sampler.epochs(steps.stop) == epoch + 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, again = (Sampler(num_pairs=40, global_batch=8, seed=1) for _ in range(2))
    assert [first.step_pairs(s) for s in range(10)] == [again.step_pairs(s) for s in range(10)]
    assert first.step_pairs(0) != first.step_pairs(5), "another order every epoch"
    assert first.step_pairs(0) != Sampler(num_pairs=40, global_batch=8, seed=2).step_pairs(0)
    assert first.epochs(7) == pytest.approx(1.4)


def test_moving_a_batch_keeps_what_is_no_tensor() -> None:
    batch = pack([PreferencePair([5], [6], [7])], pad_token_id=2)
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.pairs.device.type == "meta"
    assert (moved.row_width, moved.tokens) == (batch.row_width, batch.tokens)
