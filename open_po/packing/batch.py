"""The tensors of one forward pass: prompts and responses laid end to end, and where their scored tokens stand.

Letters in shapes: P pairs, R responses, T packed tokens, N scored tokens, U of them computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_po.data import PreferencePair
from open_po.data.turns import Runs

# How responses find their prompt. `shared`: [prompt | response | response ...], every prompt once. `unshared`: each
# response behind a prompt of its own, nothing padded. `rows`: the same as rows of one width, padded on the right, for
# models that must run with their own attention.
Layout = Literal["shared", "unshared", "rows"]


class Group(NamedTuple):
    """One prompt and different responses to it, as token ids. The responses are scored, and with each of them `scored`.

    Responses that differ in what of them is `skipped` are different ones.
    """

    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]
    scored: Runs = ()  # tokens of the prompt
    skipped: Sequence[Runs] = ()  # tokens of each response that are not scored; empty: none of any

    def alone(self) -> Iterator[Group]:
        """Each response in a group of its own."""
        for number, response in enumerate(self.responses):
            yield Group(self.prompt_ids, [response], self.scored, self.skipped[number : number + 1])

    @staticmethod
    def of(pairs: Sequence[PreferencePair], sides: Sequence[int]) -> Group:
        """Of pairs of one prompt one response each, chosen (0) or rejected (1)."""
        chosen = [
            (pair.rejected_ids, pair.turns.rejected) if side else (pair.chosen_ids, pair.turns.chosen)
            for pair, side in zip(pairs, sides, strict=True)
        ]
        responses, skipped = zip(*chosen, strict=True)
        return Group(pairs[0].prompt_ids, responses, pairs[0].turns.prompt, skipped)


class Segment(NamedTuple):
    """Tokens `start` to `end` of a pack, which see one another causally and all of `prefix_start` to `prefix_end`.

    The prefix stands right before them in position, so that prefix and tokens together are one sequence.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True, kw_only=True)
class LastLayer:
    """What a model's last layer must compute: S tokens, and keys and values of C others.

    They are those of a segment from the first that predicts a scored one to the last.
    """

    scored_index: Tensor  # [S] positions in T, ascending
    context_index: Tensor  # [C] the same; tokens that those see besides themselves
    key_order: Tensor  # [C + S] for these tokens in order of position: where in [context | scored] each stands
    segments: tuple[Segment, ...]  # of these tokens, counted in that order
    query_lengths: tuple[int, ...]  # such tokens of each segment, its last ones
    score_index: Tensor  # [U] position in S of the hidden state that predicts each scored token

    def to(self, device: torch.device) -> LastLayer:
        """A copy with its tensors on `device`."""
        return replace(self, **_moved(self, device))


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Groups laid out for one forward pass. Every response begins at position `len(prompt)`, wherever it stands."""

    layout: Layout
    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T]
    segments: tuple[Segment, ...]  # what sees what; none in `rows`, whose rows are a batch to the model
    row_lengths: tuple[int, ...]  # `rows`: tokens of each row without padding, which stands behind them
    score_index: Tensor  # [U] position in T of the hidden state that predicts each scored token
    target_ids: Tensor  # [U] the scored tokens
    repeats: Tensor | None  # [N] place in U, where scored tokens of a shared prompt belong to several responses
    response_id: Tensor  # [N] the response, 0..R-1, that each scored token belongs to
    response_start: Tensor  # [R] where in N a response's tokens begin; they stand together, in order
    response_tokens: Tensor  # [R] how many they are
    pairs: Tensor  # [P, 2] chosen and rejected response of each pair
    prompts: Tensor | None  # [P] the prompt of each pair as a response of its own, if it is scored
    last_layer: LastLayer | None  # None in `rows`
    token_weights: Tensor  # [T] in how many responses of the pairs a token takes part; 0 for padding

    @property
    def num_responses(self) -> int:
        """R, responses without tokens included."""
        return len(self.response_tokens)

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of the pairs, the prompt counted with each response: the same in any layout."""
        return int(self.token_weights.sum())

    def spread(self, computed: Tensor) -> Tensor:
        """What was computed for U tokens, for the N that are scored."""
        return computed if self.repeats is None else computed[self.repeats]

    def to(self, device: torch.device) -> PackedBatch:
        """A copy of the batch with its tensors on `device`."""
        last_layer = None if self.last_layer is None else self.last_layer.to(device)
        return replace(self, last_layer=last_layer, **_moved(self, device))


def _moved(tensors: LastLayer | PackedBatch, device: torch.device) -> dict[str, Any]:
    """The tensors among the fields, on `device`."""
    found = {name: value for name, value in vars(tensors).items() if isinstance(value, Tensor)}
    return {name: value.to(device, non_blocking=True) for name, value in found.items()}


def pack(
    pairs: Sequence[PreferencePair],
    *,
    layout: Layout,
    pad_token_id: int,
    with_rejected: bool = True,
    with_prompt: bool = False,
) -> PackedBatch:
    """Lay pairs out. Pairs of one prompt become one group, a response that several of them share is there once.

    Without `with_rejected`, or where there is none, a rejected response is left unscored: 0 tokens, sum 0.
    `with_prompt` scores each prompt's tokens as well, but the first and those that are scored with its responses.
    """
    groups, index = group_pairs(pairs, with_rejected=with_rejected)
    return _lay_out(groups, index, layout, pad_token_id, with_prompt)


def pack_responses(groups: Sequence[Group], *, layout: Layout, pad_token_id: int) -> PackedBatch:
    """Lay responses out that are scored on their own, without pairs: response r is the r-th of all groups."""
    return _lay_out(groups, [], layout, pad_token_id, with_prompt=False)


_Ids = tuple[tuple[int, ...], Runs]  # of a prompt or a response, and what of it is scored, or is not


class PairIndex(NamedTuple):
    """A pair's group and responses; responses are counted over all groups, -1 is none."""

    group: int
    chosen: int
    rejected: int


def group_pairs(pairs: Sequence[PreferencePair], *, with_rejected: bool = True) -> tuple[list[Group], list[PairIndex]]:
    """Distinct prompts with their distinct responses, in order of appearance, and where each pair finds its own."""
    found: dict[_Ids, dict[_Ids, int]] = {}
    places: list[tuple[_Ids, int, int]] = []
    for pair in pairs:
        prompt = (tuple(pair.prompt_ids), pair.turns.prompt)
        responses = found.setdefault(prompt, {})
        chosen = responses.setdefault((tuple(pair.chosen_ids), pair.turns.chosen), len(responses))
        rejected = -1
        if with_rejected and pair.rejected_ids:
            rejected = responses.setdefault((tuple(pair.rejected_ids), pair.turns.rejected), len(responses))
        places.append((prompt, chosen, rejected))
    number = {prompt: position for position, prompt in enumerate(found)}
    before = np.cumsum([0, *(len(responses) for responses in found.values())]).tolist()
    index = [
        PairIndex(number[p], before[number[p]] + chosen, -1 if rejected < 0 else before[number[p]] + rejected)
        for p, chosen, rejected in places
    ]
    groups = [
        Group(prompt, [ids for ids, _ in responses], scored, [skipped for _, skipped in responses])
        for (prompt, scored), responses in found.items()
    ]
    return groups, index


class _Place(NamedTuple):
    """Where in a pack a prompt and one response to it begin."""

    prompt: int
    response: int


def _lay_out(
    groups: Sequence[Group], index: Sequence[PairIndex], layout: Layout, pad_token_id: int, with_prompt: bool
) -> PackedBatch:
    width = max(len(group.prompt_ids) + len(response) for group in groups for response in group.responses)
    places, segments, ends = _places(groups, layout, width)
    total = len(ends) * width if layout == "rows" else ends[-1]
    uses = np.bincount([r for pair in index for r in pair[1:] if r >= 0], minlength=len(places))
    rows = [row for group in groups for row in group.alone()]  # in the order in which responses are counted
    input_ids, position_ids, weights = _tokens(rows, places, uses, np.full(total, pad_token_id, dtype=np.int64))
    scored = [_response_scores(place, row) for place, row in zip(places, rows, strict=True)]
    prompts, unscored = None, len(scored)
    if with_prompt:
        first = np.cumsum([0, *(len(group.responses) for group in groups)])
        scored += [_prompt_scores(places[first[g]], group) for g, group in enumerate(groups)]
        prompts = torch.tensor([unscored + pair.group for pair in index], dtype=torch.int64)
        unscored = len(scored)
    if any(pair.rejected < 0 for pair in index):  # a response without tokens, for the pairs that lack one
        scored.append((np.arange(0), np.arange(0)))
    sides = [[pair.chosen, pair.rejected if pair.rejected >= 0 else unscored] for pair in index]
    counts = np.array([len(where) for where, _ in scored])
    targets = np.concatenate([target for _, target in scored])
    score_index = np.concatenate([where for where, _ in scored])
    repeats = None
    if layout == "shared" and any(group.scored for group in groups):
        targets, first, repeats = np.unique(targets, return_index=True, return_inverse=True)
        score_index = score_index[first]
    return PackedBatch(
        layout=layout,
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segments=tuple(segments),
        row_lengths=tuple(ends) if layout == "rows" else (),
        score_index=torch.from_numpy(score_index),
        target_ids=torch.from_numpy(input_ids[targets]),
        repeats=None if repeats is None else torch.from_numpy(repeats),
        response_id=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        response_start=torch.from_numpy(np.cumsum(counts) - counts),
        response_tokens=torch.from_numpy(counts),
        pairs=torch.tensor(sides, dtype=torch.int64).view(-1, 2),
        prompts=prompts,
        last_layer=None if layout == "rows" else _last_layer(segments, score_index),
        token_weights=torch.from_numpy(weights),
    )


def _tokens(
    rows: Sequence[Group], places: Sequence[_Place], uses: NDArray[np.int64], input_ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`input_ids`, nothing but padding yet, with the rows in their places; positions; and `token_weights`."""
    position_ids, weights = np.zeros_like(input_ids), np.zeros_like(input_ids)
    for place, row, used in zip(places, rows, uses, strict=True):
        length = len(row.prompt_ids)
        prompt = slice(place.prompt, place.prompt + length)
        answer = slice(place.response, place.response + len(row.responses[0]))
        input_ids[prompt], input_ids[answer] = row.prompt_ids, row.responses[0]
        position_ids[prompt] = np.arange(length)
        position_ids[answer] = length + np.arange(len(row.responses[0]))
        weights[prompt] += used
        weights[answer] += used
    return input_ids, position_ids, weights


def _places(groups: Sequence[Group], layout: Layout, width: int) -> tuple[list[_Place], list[Segment], list[int]]:
    """Where each response stands, the segments, and the end of each (`rows`: the length of each row)."""
    places: list[_Place] = []
    segments: list[Segment] = []
    ends: list[int] = []
    end = 0
    for group in groups:
        prompt = end
        for number, response in enumerate(group.responses):
            shares = layout == "shared" and number > 0
            prompt = len(ends) * width if layout == "rows" else prompt if shares else end
            start = end if shares else prompt + len(group.prompt_ids)
            end = start + len(response)
            places.append(_Place(prompt, start))
            ends.append(end - prompt if layout == "rows" else end)
            if layout != "rows":
                segments.append(
                    Segment(start, end, prompt, prompt + len(group.prompt_ids))
                    if shares
                    else Segment(prompt, end, prompt, prompt)
                )
    return places, segments, ends


def _last_layer(segments: Sequence[Segment], score_index: NDArray[np.int64]) -> LastLayer:
    predictors = np.unique(score_index)
    # Of a segment the tokens up to its last predictor matter: its end predicts nothing, and nothing else sees it.
    kept: list[tuple[Segment, int]] = []  # and its end
    queries: list[NDArray[np.int64]] = []
    for segment in segments:
        first, behind = np.searchsorted(predictors, (segment.start, segment.end)).tolist()
        if behind > first:
            end = int(predictors[behind - 1]) + 1
            kept.append((segment, end))
            # All from the first predictor on, since queries are a segment's last tokens.
            queries.append(np.arange(predictors[first], end))
    scored = np.concatenate(queries)
    tokens = np.concatenate([np.arange(segment.start, end) for segment, end in kept])
    context = np.setdiff1d(tokens, scored, assume_unique=True)
    shortened = []
    for segment, end in kept:
        start, prefix = np.searchsorted(tokens, (segment.start, segment.prefix_start)).tolist()
        shortened.append(
            Segment(start, start + end - segment.start, prefix, prefix + segment.prefix_end - segment.prefix_start)
        )
    return LastLayer(
        scored_index=torch.from_numpy(scored),
        context_index=torch.from_numpy(context),
        key_order=torch.from_numpy(np.argsort(np.concatenate([context, scored]))),
        segments=tuple(shortened),
        query_lengths=tuple(map(len, queries)),
        score_index=torch.from_numpy(np.searchsorted(scored, score_index)),
    )


def _response_scores(place: _Place, row: Group) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions whose hidden states predict the scored tokens of a response and its prompt, and those tokens' own."""
    tokens = place.response + np.arange(len(row.responses[0]))
    predictors = tokens - 1
    predictors[0] = place.prompt + len(row.prompt_ids) - 1  # the prompt's end predicts every response's first token
    if row.skipped and row.skipped[0]:
        skipped = _positions(row.skipped[0])
        tokens, predictors = np.delete(tokens, skipped), np.delete(predictors, skipped)
    if row.scored:
        earlier = place.prompt + _positions(row.scored)
        tokens, predictors = np.concatenate([earlier, tokens]), np.concatenate([earlier - 1, predictors])
    return predictors, tokens


def _prompt_scores(place: _Place, group: Group) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `_response_scores`, of a prompt's tokens that no response has, but the first, which nothing predicts."""
    others = np.setdiff1d(np.arange(1, len(group.prompt_ids)), _positions(group.scored), assume_unique=True)
    tokens = place.prompt + others
    return tokens - 1, tokens


def _positions(runs: Runs) -> NDArray[np.int64]:
    return np.concatenate([np.arange(0), *(np.arange(first, behind) for first, behind in runs)])
