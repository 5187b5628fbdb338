"""Properties of the sampler, the planners and the pack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_po.data import PairDataset, PreferencePair
from open_po.losses import Counts
from open_po.model.scorer import Scorer
from open_po.packing import (
    Group,
    Layout,
    PackedBatch,
    PackingStats,
    Planner,
    Response,
    ResponsePlanner,
    Sampler,
    group_pairs,
    pack,
    pack_responses,
    plan_epoch,
)
from tests import tiny
from tests.packs import LAYOUTS, dataset_of, datasets, ids, layouts, pair_lists, seen_from, sized, sized_lists
from tests.scoring import load

# -------------------------------------------------------------------------------------------------------------- packs


def scored(batch: PackedBatch, response: int) -> list[tuple[list[int], int]]:
    """What each token of a response is predicted from, and the token."""
    start, tokens = int(batch.response_start[response]), int(batch.response_tokens[response])
    assert batch.response_id[start : start + tokens].tolist() == [response] * tokens
    found = []
    for number in range(start, start + tokens):
        places = seen_from(batch, int(batch.score_index[number]))
        assert batch.position_ids[places].tolist() == list(range(len(places)))
        found.append((batch.input_ids[places].tolist(), int(batch.target_ids[number])))
    return found


def expected_scores(prompt: Sequence[int], response: Sequence[int]) -> list[tuple[list[int], int]]:
    return [([*prompt, *response[:i]], token) for i, token in enumerate(response)]


def row_of(batch: PackedBatch, response: int) -> list[int]:
    """Where a response's prompt and tokens stand; rows and segments come in the order of responses."""
    if batch.layout == "rows":
        start = response * (len(batch.input_ids) // len(batch.row_lengths))
        return list(range(start, start + batch.row_lengths[response]))
    return seen_from(batch, batch.segments[response].end - 1)


def assert_whole(batch: PackedBatch) -> None:
    """Segments lie end to end, nothing else is seen, and every response's tokens stand together."""
    if batch.layout == "rows":
        assert batch.segments == ()
        width = len(batch.input_ids) // len(batch.row_lengths)
        assert len(batch.input_ids) == width * len(batch.row_lengths)
        assert width == max(batch.row_lengths), "no wider than needed"
    else:
        assert batch.row_lengths == ()
        assert [segment.start for segment in batch.segments] == [0, *(s.end for s in batch.segments[:-1])]
        assert batch.segments[-1].end == len(batch.input_ids)
    assert int(batch.response_tokens.sum()) == len(batch.target_ids) == len(batch.score_index)
    assert torch.equal(batch.response_start, batch.response_tokens.cumsum(0) - batch.response_tokens)


@given(pair_lists, layouts, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_scored_token_is_predicted_from_its_own_context(
    items: list[PreferencePair], layout: Layout, both: bool, with_prompt: bool
) -> None:
    batch = pack(items, layout=layout, pad_token_id=2, with_rejected=both, with_prompt=with_prompt)
    assert batch.layout == layout
    assert_whole(batch)
    weights = torch.zeros_like(batch.token_weights)
    for number, pair in enumerate(items):
        chosen, rejected = batch.pairs[number].tolist()
        assert scored(batch, chosen) == expected_scores(pair.prompt_ids, pair.chosen_ids)
        assert scored(batch, rejected) == (expected_scores(pair.prompt_ids, pair.rejected_ids) if both else [])
        for response, expected in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids))[: 1 + both]:
            places = row_of(batch, response)
            assert batch.input_ids[places].tolist() == [*pair.prompt_ids, *expected]
            weights[places] += 1
        if with_prompt:
            assert batch.prompts is not None
            start, *rest = pair.prompt_ids
            expected = [([start, *rest[:i]], token) for i, token in enumerate(rest)]
            assert scored(batch, int(batch.prompts[number])) == expected
    assert (batch.prompts is None) == (not with_prompt)
    assert torch.equal(batch.token_weights, weights)
    sides = [(p, r) for p in items for r in (p.chosen_ids, p.rejected_ids)[: 1 + both]]
    assert batch.tokens == sum(len(pair.prompt_ids) + len(response) for pair, response in sides)


@given(pair_lists, layouts, st.booleans())
@settings(max_examples=100, deadline=None)
def test_nothing_is_computed_twice(items: list[PreferencePair], layout: Layout, both: bool) -> None:
    batch = pack(items, layout=layout, pad_token_id=2, with_rejected=both)
    sides = [(tuple(p.prompt_ids), tuple(r)) for p in items for r in (p.chosen_ids, p.rejected_ids)[: 1 + both]]
    responses, prompts = set(sides), {prompt for prompt, _ in sides}
    rows = [len(prompt) + len(response) for prompt, response in responses]
    expected = {
        "shared": sum(map(len, prompts)) + sum(len(response) for _, response in responses),
        "unshared": sum(rows),
        "rows": max(rows) * len(rows),
    }
    assert len(batch.input_ids) == expected[layout]
    assert len(batch.target_ids) == sum(len(response) for _, response in responses)


@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=5), layouts)
@settings(max_examples=100, deadline=None)
def test_responses_without_pairs_keep_their_order(drawn: list[tuple[Any, Any]], layout: Layout) -> None:
    groups = [Group(*group) for group in drawn]
    batch = pack_responses(groups, layout=layout, pad_token_id=2)
    assert_whole(batch)
    every = [(group.prompt_ids, response) for group in groups for response in group.responses]
    assert batch.num_responses == len(every)
    for number, (prompt, response) in enumerate(every):
        assert scored(batch, number) == expected_scores(prompt, response)
    assert batch.pairs.shape == (0, 2)


def test_a_pack_by_hand() -> None:
    """Two pairs of one prompt that share the rejected response, and one of another prompt."""
    pairs = [
        PreferencePair([5, 6], [7, 8], [9]),
        PreferencePair([15], [16], [17, 18]),
        PreferencePair([5, 6], [10], [9]),
    ]
    batch = pack(pairs, layout="shared", pad_token_id=2, with_prompt=True)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 15, 16, 17, 18]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 2, 0, 1, 1, 2]
    assert [tuple(segment) for segment in batch.segments] == [
        (0, 4, 0, 0),
        (4, 5, 0, 2),
        (5, 6, 0, 2),
        (6, 8, 6, 6),
        (8, 10, 6, 7),
    ]
    assert batch.pairs.tolist() == [[0, 1], [3, 4], [2, 1]]
    assert batch.response_tokens.tolist() == [2, 1, 1, 1, 2, 1, 0]  # the last two are the prompts
    assert batch.prompts is not None
    assert batch.prompts.tolist() == [5, 6, 5]
    assert batch.score_index.tolist() == [1, 2, 1, 1, 6, 6, 8, 0]
    assert batch.target_ids.tolist() == [7, 8, 9, 10, 16, 17, 18, 6]
    assert batch.token_weights.tolist() == [4, 4, 1, 1, 2, 1, 2, 1, 1, 1]
    assert batch.tokens == 18


def test_moving_a_batch_keeps_what_is_no_tensor() -> None:
    batch = pack([PreferencePair([5], [6], [7])], layout="shared", pad_token_id=2)
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.pairs.device.type == moved.token_weights.device.type == "meta"
    assert (moved.layout, moved.segments, moved.prompts) == ("shared", batch.segments, None)
    assert moved.num_responses == 2


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    """Models with plain attention, with windows and soft-caps, and with experts."""
    found = {}
    for name in ("llama", "gemma2", "mixtral"):
        folder = tmp_path_factory.mktemp(name)
        tiny.make_model(folder, name, **tiny.SHARING[name])
        found[name] = load(folder)
    return found


@given(
    st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=4),
    layouts,
    st.sampled_from(["llama", "gemma2", "mixtral"]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_no_response_sees_another(
    scorers: dict[str, Scorer], drawn: list[tuple[Any, Any]], layout: Layout, name: str, data: Any
) -> None:
    """Another token changes the scores of its own response from there on, and none of any other response."""
    scorer = scorers[name]
    scorer.use_layout(layout)
    every = [(g, r) for g, (_, responses) in enumerate(drawn) for r in range(len(responses))]
    number = data.draw(st.integers(0, len(every) - 1))
    group, turn = every[number]
    changed = [(prompt, [list(response) for response in responses]) for prompt, responses in drawn]
    place = data.draw(st.integers(0, len(drawn[group][1][turn]) - 1))
    changed[group][1][turn][place] = 310

    def scores(groups: list[tuple[Any, Any]]) -> list[torch.Tensor]:
        batch = pack_responses([Group(*group) for group in groups], layout=layout, pad_token_id=2)
        with scorer.as_reference():
            return list(scorer.token_logprobs(batch).split(batch.response_tokens.tolist()))

    for other, (before, after) in enumerate(zip(scores(drawn), scores(changed), strict=True)):
        same = place if other == number else len(before)
        torch.testing.assert_close(before[:same], after[:same], rtol=0, atol=1e-5 if name == "mixtral" else 1e-6)
        if other == number:
            assert before[place] != after[place]


# ------------------------------------------------------------------------------------------------------ plans of pairs


def plans(planner: Planner, indices: Sequence[int], world_size: int) -> list[list[list[int]]]:
    """Each rank's packs."""
    return [planner.packs(indices, rank=rank, world_size=world_size) for rank in range(world_size)]


def size_of(batch: PackedBatch) -> int:
    return len(batch.input_ids)


@given(datasets, st.integers(1, 300), st.integers(1, 5), layouts, st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_no_pair_is_lost_or_doubled_and_the_budget_holds(
    dataset: PairDataset, budget: int, world_size: int, layout: Layout, both: bool, random: Any
) -> None:
    indices = random.sample(range(len(dataset)), random.randint(1, len(dataset)))
    planner = Planner(dataset=dataset, max_tokens=budget, layout=layout, with_rejected=both)
    shares = plans(planner, indices, world_size)
    packs = [pack for share in shares for pack in share]
    assert sorted(index for pack in packs for index in pack) == sorted(indices)
    assert all(packs)
    for pack_ in packs:
        assert len(pack_) == 1 or size_of(planner.batch(pack_, 2)) <= budget
    shuffled = random.sample(indices, len(indices))
    assert plans(planner, shuffled, world_size) == shares, "the order of the indices makes no difference"
    prompts = {int(dataset.prompt_numbers[index]) for index in indices}
    for prompt in prompts if len(prompts) >= world_size else ():
        family = [index for index in sorted(indices) if dataset.prompt_numbers[index] == prompt]
        if size_of(planner.batch(family, 2)) <= budget:
            assert any(set(family) <= set(pack) for pack in packs), "pairs of one prompt share a pack where they can"


@given(sized_lists, st.integers(20, 300), st.integers(1, 5), st.sampled_from(LAYOUTS[:2]))
@settings(max_examples=150, deadline=None)
def test_ranks_and_packs_are_balanced(dataset: PairDataset, budget: int, world_size: int, layout: Layout) -> None:
    """Two of them differ by no more than the longest thing that could be moved."""
    planner = Planner(dataset=dataset, max_tokens=budget, layout=layout)
    shares = plans(planner, range(len(dataset)), world_size)

    def tokens(indices: Sequence[int]) -> int:
        return size_of(planner.batch(indices, 2)) if indices else 0

    numbers = dataset.prompt_numbers
    packs = [pack for share in shares for pack in share]
    longest = max(tokens([i for i in pack if numbers[i] == prompt]) for pack in packs for prompt in numbers[pack])
    loads = [sum(map(tokens, share)) for share in shares]
    assert max(loads) - min(loads) <= longest
    for share in shares:
        if share:
            assert max(map(tokens, share)) - min(map(tokens, share)) <= longest


def test_ranks_get_nearly_the_same_tokens() -> None:
    rng = np.random.default_rng(0)
    lengths = (rng.lognormal(5, 0.8, (256, 3)).astype(int) + 1).tolist()
    dataset = sized([(prompt, [(chosen, rejected)]) for prompt, chosen, rejected in lengths])
    for layout in LAYOUTS:
        planner = Planner(dataset=dataset, max_tokens=4096, layout=layout)
        loads = [sum(len(p) and planner.stats([p]).computed for p in share) for share in plans(planner, range(256), 4)]
        assert max(loads) / min(loads) < 1.05, layout
        shares = planner.stats(planner.packs(range(256))).summary()
        assert shares["fill"] > (0.8 if layout == "rows" else 0.9), layout


def test_like_lengths_share_a_pack_of_rows() -> None:
    dataset = sized([(4, [(n, n)]) for n in (1, 30, 2, 29, 3, 28)])
    planner = Planner(dataset=dataset, max_tokens=6 * 34, layout="rows")
    assert planner.packs(range(6)) == [[1, 3, 5], [4, 2, 0]]


def test_packs_without_padding_are_of_about_the_same_size() -> None:
    dataset = sized([(4, [(n, n)]) for n in (1, 30, 2, 29, 3, 28)])
    planner = Planner(dataset=dataset, max_tokens=80, layout="shared")
    assert [planner.stats([pack]).computed for pack in planner.packs(range(6))] == [70, 70, 70]


def test_a_prompt_with_too_many_pairs_is_cut_by_pair() -> None:
    """Its prompt of 10 tokens comes again with every part; a pair that is too long goes alone."""
    dataset = sized([(10, [(5, 5), (6, 6), (4, 4), (40, 40)])])
    planner = Planner(dataset=dataset, max_tokens=33, layout="shared")
    assert {tuple(pack): planner.stats([pack]).computed for pack in planner.packs(range(4))} == {
        (3,): 90,
        (0, 1): 32,
        (2,): 18,
    }


@given(datasets, st.integers(1, 300), layouts, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_loads_count_what_the_tensors_hold(
    dataset: PairDataset, budget: int, layout: Layout, both: bool, with_prompt: bool
) -> None:
    planner = Planner(dataset=dataset, max_tokens=budget, layout=layout, with_rejected=both, with_prompt=with_prompt)
    packs = planner.packs(range(len(dataset)))
    expected = PackingStats()
    for indices in packs:
        batch, pairs = planner.batch(indices, 2), [dataset[index] for index in indices]
        groups, _ = group_pairs(pairs, with_rejected=both)
        responses = [(len(g.prompt_ids), len(g.prompt_ids) + len(r)) for g in groups for r in g.responses]
        width, rows = max(row for _, row in responses), sum(row for _, row in responses)
        computed = size_of(batch)
        expected += PackingStats(
            packs=1,
            over_budget=int(computed > budget),
            budget=max(budget, computed),
            computed=computed,
            padding=int((batch.token_weights == 0).sum()),
            prompts_repeated=(1 + both) * sum(len(pair.prompt_ids) for pair in pairs),
            prompts_computed=sum(len(g.prompt_ids) * (1 if layout == "shared" else len(g.responses)) for g in groups),
            padding_otherwise=width * len(responses) - rows,
        )
    assert planner.stats(packs) == expected
    assert expected.padding == 0 or layout == "rows"


def test_shares_by_hand() -> None:
    """Two prompts of 10 and 4 tokens, with pairs of (2, 6) and (4, 4), and a second pair of the first prompt."""
    dataset = sized([(10, [(2, 6), (1, 1)]), (4, [(4, 4)])])
    planner = Planner(dataset=dataset, max_tokens=64, layout="shared")
    load = planner.stats(planner.packs(range(3)))
    # 14 prompt tokens and 18 of responses, instead of 48 and 18; in rows 6 x 16, of which 30 would be padding.
    assert load == PackingStats(1, 0, 64, 32, 0, 48, 14, 30)
    assert load.summary() == pytest.approx(
        {"packs": 1, "packs_over_budget": 0, "fill": 0.5, "prompt_tokens_saved": 34 / 48, "padding_avoided": 30 / 96}
    )
    assert PackingStats().summary() == {
        "packs": 0,
        "packs_over_budget": 0,
        "fill": 0,
        "prompt_tokens_saved": 0,
        "padding_avoided": 0,
    }


@given(pair_lists)
@settings(max_examples=50, deadline=None)
def test_counts_are_those_of_the_pairs(items: list[PreferencePair]) -> None:
    planner = Planner(dataset=dataset_of(items), max_tokens=100, layout="shared")
    counts = planner.counts(range(len(items)))
    chosen = sum(len(pair.chosen_ids) for pair in items)
    prompts = sum(len(pair.prompt_ids) - 1 for pair in items)
    assert counts == Counts(pairs=len(items), chosen_tokens=chosen, prompt_and_chosen_tokens=chosen + prompts)


# -------------------------------------------------------------------------------------------------- plans of responses


@given(datasets, st.integers(1, 300), layouts, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_every_distinct_response_is_computed_once(
    dataset: PairDataset, budget: int, layout: Layout, random: Any
) -> None:
    every = [Response(pair, side) for pair in range(len(dataset)) for side in (0, 1)]
    wanted = random.sample(every, random.randint(1, len(every)))
    planner = ResponsePlanner(dataset=dataset, layout=layout)
    numbers = [int(dataset.response_numbers[response]) for response in wanted]
    placed: list[int] = []
    rows: list[int] = []
    for pack_ in planner.packs(planner.units(wanted), budget):
        responses = [response for unit in pack_ for response in unit.items]
        placed += [int(dataset.response_numbers[response]) for response in responses]
        batch = planner.batch(pack_, 2)
        assert size_of(batch) <= budget or len(responses) == 1
        load = planner.stats(pack_, budget)
        assert (load.computed, load.budget) == (size_of(batch), max(budget, size_of(batch)))
        assert load.padding == (len(batch.input_ids) - sum(batch.row_lengths) if layout == "rows" else 0)
        assert load.prompts_repeated == sum(int(dataset.prompt_lengths[r.pair]) for r in responses)
        for number, response in enumerate(responses):
            pair = dataset[response.pair]
            ids = (pair.chosen_ids, pair.rejected_ids)[response.side]
            assert scored(batch, number) == expected_scores(pair.prompt_ids, ids)
        rows.append(max(len(scored(batch, n)[-1][0]) for n in range(len(responses))))
    assert rows == sorted(rows, reverse=True), "the longest rows come first"
    assert sorted(placed) == sorted(set(numbers))


def test_a_prompt_with_too_many_responses_is_cut_by_response() -> None:
    dataset = sized([(10, [(5, 6), (7, 8)]), (2, [(1, 1)])])
    planner = ResponsePlanner(dataset=dataset, layout="shared")
    packs = planner.packs(planner.units([Response(pair, side) for pair in range(3) for side in (0, 1)]), 26)
    assert [[unit.items for unit in pack] for pack in packs] == [
        [((1, 0), (1, 1))],
        [((0, 0), (0, 1)), ((2, 0), (2, 1))],
    ]
    assert [planner.stats(pack, 26).computed for pack in packs] == [25, 25]


def test_no_rank_is_idle_while_a_prompt_can_be_cut() -> None:
    dataset = sized([(10, [(5, 6), (7, 8), (3, 4)]), (2, [(1, 1)])])
    for layout in get_args(Layout):
        planner = Planner(dataset=dataset, max_tokens=1000, layout=layout)
        packs = [planner.packs(range(4), rank=rank, world_size=4) for rank in range(4)]
        assert sorted(indices for rank in packs for indices in rank) == [[0], [1], [2], [3]]
    planner = Planner(dataset=dataset, max_tokens=1000, layout="shared")
    two = [planner.packs(range(4), rank=rank, world_size=2) for rank in range(2)]
    assert two == [[[0, 1, 2]], [[3]]], "prompts stay whole where there are enough"


# ------------------------------------------------------------------------------------------------------------ sampler


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_pair_once(num_pairs: int, global_batch: int, seed: int) -> None:
    assert_epochs(Sampler(num_pairs=num_pairs, global_batch=global_batch, seed=seed))


def assert_epochs(sampler: Sampler) -> list[list[int]]:
    """Two epochs hold every pair once, in steps of the exact size; the steps of the first."""
    epochs = []
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        batches = [sampler.step_pairs(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(sampler.num_pairs))
        assert all(len(batch) == sampler.global_batch for batch in batches[:-1])
        assert sampler.epochs(steps.stop) == epoch + 1
        epochs.append(batches)
    return epochs[0]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, again = (Sampler(num_pairs=40, global_batch=8, seed=1) for _ in range(2))
    assert [first.step_pairs(s) for s in range(10)] == [again.step_pairs(s) for s in range(10)]
    assert first.step_pairs(0) != first.step_pairs(5), "another order every epoch"
    assert first.step_pairs(0) != Sampler(num_pairs=40, global_batch=8, seed=2).step_pairs(0)
    assert first.epochs(7) == pytest.approx(1.4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=15), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_whole_prompts_are_drawn(sizes: list[int], global_batch: int, seed: int) -> None:
    """A prompt is split only if it is larger than a step, or if nothing that is left fits into the step's rest."""
    numbers = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    settings = {"num_pairs": len(numbers), "global_batch": global_batch, "seed": seed}
    sampler = Sampler(**settings, prompt_numbers=numbers)
    batches = assert_epochs(sampler)
    order = [int(numbers[index]) for batch in batches for index in batch]
    for prompt, size in enumerate(sizes):
        where = [place for place, number in enumerate(order) if number == prompt]
        assert where == list(range(where[0], where[0] + size)), "a prompt's pairs come together"
        room = global_batch - where[0] % global_batch
        if size > room:
            later = set(order[where[-1] + 1 :])
            assert room == global_batch or all(sizes[other] > room for other in later)
    again = Sampler(**settings, prompt_numbers=numbers)
    assert [again.step_pairs(step) for step in reversed(range(len(batches)))] == batches[::-1], "it keeps no state"


def test_prompts_of_one_pair_each_are_drawn_as_without_prompts() -> None:
    settings = {"num_pairs": 30, "global_batch": 4, "seed": 3}
    plain, grouped = Sampler(**settings), Sampler(**settings, prompt_numbers=np.arange(30))
    assert [plain.step_pairs(step) for step in range(16)] == [grouped.step_pairs(step) for step in range(16)]


@pytest.mark.parametrize("size", [3, 4, 5, 10])
def test_a_prompt_of_many_pairs_comes_early_or_late_as_others_do(size: int) -> None:
    """Whether it fits into a step or not: where it begins is a matter of the seed."""
    numbers = np.array([0] * size + list(range(1, 41)))
    begins = []
    for seed in range(60):
        sampler = Sampler(num_pairs=len(numbers), global_batch=4, seed=seed, prompt_numbers=numbers)
        order = [int(numbers[i]) for step in range(sampler.steps_per_epoch) for i in sampler.step_pairs(step)]
        begins.append(order.index(0) / 40)
    assert np.mean(begins) < 0.6


def test_a_pair_above_the_budget_does_not_cut_the_others_smaller() -> None:
    items = [PreferencePair([5] * 10, [7] * 400, [8] * 400)]
    items += [PreferencePair([9 + n] * 10, [7] * 5, [8] * 5) for n in range(20)]
    packs = Planner(dataset=dataset_of(items), max_tokens=100, layout="shared").packs(range(21))
    assert packs[0] == [0]
    assert sorted(map(len, packs[1:])) == [5, 5, 5, 5]


# --------------------------------------------------------------------------------------------------------------- epoch


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("with_rejected", [True, False])
def test_an_epoch_is_planned_as_it_is_computed(ranks: int, with_rejected: bool) -> None:
    dataset = sized([(5, [(3, 4), (2, 6)]), (9, [(1, 2)]), (4, [(8, 3), (3, 3), (2, 9)]), (7, [(5, 5)])])
    planner = Planner(dataset=dataset, max_tokens=24, layout="shared", with_rejected=with_rejected)
    sampler = Sampler(num_pairs=len(dataset), global_batch=3, seed=1)
    plan = plan_epoch(planner, sampler, ranks)
    # Step by step, each rank for itself; a pack's tokens counted in its tensors.
    passes = packs = computed = 0
    for step in range(sampler.steps_per_epoch):
        shares = [planner.packs(sampler.step_pairs(step), rank=r, world_size=ranks) for r in range(ranks)]
        passes += max(map(len, shares))
        packs += sum(map(len, shares))
        computed += sum(planner.batch(indices, 0).input_ids.numel() for share in shares for indices in share)
    assert (plan.forward_passes, plan.packing.packs, plan.packing.computed) == (passes, packs, computed)
    pairs = [dataset[index] for index in range(len(dataset))]
    alone = sum(
        len(pair.prompt_ids) + len(response)
        for pair in pairs
        for response in ([pair.chosen_ids, pair.rejected_ids] if with_rejected else [pair.chosen_ids])
    )
    assert plan.tokens_otherwise == alone
