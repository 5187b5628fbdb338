"""Which pairs make a step, how they are cut into packs, and the tensors of a pack.

Letters in shapes: P pairs, R responses, T packed tokens, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_po.data import PairDataset, PreferencePair
from open_po.losses import Counts


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Pairs laid out for one forward pass.

    Layout `rows`: each scored response is one row of `row_width` tokens, its prompt before it, padding after it, so
    T = rows x row_width. Padding stands behind everything a causal model reads for a scored token, and no index below
    points into it.
    """

    input_ids: Tensor  # [T] int64
    row_width: int
    row_lengths: tuple[int, ...]  # tokens of each row, without padding
    score_index: Tensor  # [N] position in T of the hidden state that predicts each scored token
    target_ids: Tensor  # [N] the scored tokens
    response_id: Tensor  # [N] the response, 0..R-1, that each scored token belongs to; equal ones stand together
    in_tail: Tensor  # [N] whether the token stands where the pair's other response has ended
    pairs: Tensor  # [P, 2] chosen and rejected response of each pair
    prompts: Tensor | None  # [P] the prompt of each pair as a response of its own, if it is scored
    tokens: int  # prompt and response tokens of all rows, without padding

    @property
    def num_responses(self) -> int:
        """R"""
        return len(self.pairs) * (2 if self.prompts is None else 3)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def pack(
    pairs: Sequence[PreferencePair], *, pad_token_id: int, with_rejected: bool = True, with_prompt: bool = False
) -> PackedBatch:
    """Lay pairs out in rows.

    Without `with_rejected` the rejected responses are left unscored: 0 tokens, sum 0. `with_prompt` scores each
    prompt's tokens but the first as well, in the chosen response's row.
    """
    rows: list[tuple[PreferencePair, list[int], int, int | None]] = []  # pair, response, its id, its prompt's id
    for number, pair in enumerate(pairs):
        prompt_id = 2 * len(pairs) + number if with_prompt else None
        rows.append((pair, pair.chosen_ids, 2 * number, prompt_id))
        if with_rejected:
            rows.append((pair, pair.rejected_ids, 2 * number + 1, None))
    width = max(len(pair.prompt_ids) + len(response) for pair, response, _, _ in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    score_index, response_id, in_tail = [], [], []
    for row, (pair, response, response_number, prompt_id) in enumerate(rows):
        start, end = len(pair.prompt_ids), len(pair.prompt_ids) + len(response)
        input_ids[row, :end] = torch.tensor(pair.prompt_ids + response)
        first = start if prompt_id is None else 1
        positions = torch.arange(first, end)
        score_index.append(row * width + positions - 1)  # each token is predicted by the one before it
        of_prompt = positions < start
        response_id.append(torch.where(of_prompt, -1 if prompt_id is None else prompt_id, response_number))
        in_tail.append(positions >= start + min(len(pair.chosen_ids), len(pair.rejected_ids)))
    index, flat = torch.cat(score_index), input_ids.flatten()
    return PackedBatch(
        input_ids=flat,
        row_width=width,
        row_lengths=tuple(len(pair.prompt_ids) + len(response) for pair, response, _, _ in rows),
        score_index=index,
        target_ids=flat[index + 1],
        response_id=torch.cat(response_id),
        in_tail=torch.cat(in_tail),
        pairs=torch.arange(2 * len(pairs)).view(-1, 2),
        prompts=2 * len(pairs) + torch.arange(len(pairs)) if with_prompt else None,
        tokens=sum(len(pair.prompt_ids) + len(response) for pair, response, _, _ in rows),
    )


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Cuts pairs into packs of at most `max_tokens` tokens, padding included; a pair above that goes alone.

    Pairs of like length share a pack, so that little is padded. The cut is deterministic, and every rank knows every
    rank's share.
    """

    dataset: PairDataset
    max_tokens: int
    with_rejected: bool = True
    with_prompt: bool = False

    def row_length(self, index: int) -> int:
        """Tokens of the pair's longer row."""
        response = self.dataset.chosen_lengths[index]
        if self.with_rejected:
            response = max(response, self.dataset.rejected_lengths[index])
        return int(self.dataset.prompt_lengths[index] + response)

    def counts(self, indices: Sequence[int]) -> Counts:
        """What the losses of a step on the pairs `indices` are divided by."""
        data = self.dataset
        index = list(indices)
        chosen, prompts = int(data.chosen_lengths[index].sum()), int(data.prompt_lengths[index].sum())
        # A prompt's first token is predicted by nothing.
        return Counts(pairs=len(index), chosen_tokens=chosen, prompt_and_chosen_tokens=chosen + prompts - len(index))

    def packs(self, indices: Sequence[int], *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """This rank's packs of the pairs `indices`, longest first. Empty if there are fewer pairs than ranks."""
        longest_first = sorted(indices, key=lambda index: (-self.row_length(index), index))
        rows_per_pair = 2 if self.with_rejected else 1
        packs: list[list[int]] = []
        width = 0
        for index in _deal(longest_first, rank, world_size):
            if packs and (len(packs[-1]) + 1) * rows_per_pair * width <= self.max_tokens:
                packs[-1].append(index)
            else:
                packs.append([index])
                width = self.row_length(index)
        return packs

    def batch(self, indices: Sequence[int], pad_token_id: int) -> PackedBatch:
        """The tensors of one pack."""
        pairs = [self.dataset[index] for index in indices]
        return pack(pairs, pad_token_id=pad_token_id, with_rejected=self.with_rejected, with_prompt=self.with_prompt)


def _deal(longest_first: Sequence[int], rank: int, world_size: int) -> list[int]:
    """One rank's share, dealt back and forth (0 1 1 0 0 1 ...) so that all ranks get nearly the same tokens."""
    turns = [*range(world_size), *reversed(range(world_size))]
    return [index for turn, index in enumerate(longest_first) if turns[turn % len(turns)] == rank]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Which pairs each optimizer step trains on: a new order every epoch, from the seed and the epoch alone.

    It keeps no state, so a resumed run needs nothing but the step number. An epoch's last step may be smaller.
    """

    num_pairs: int
    global_batch: int  # pairs
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_pairs // self.global_batch)

    def step_pairs(self, step: int) -> list[int]:
        """Indices of the pairs of step `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_pairs, generator=generator)
        indices: list[int] = order[position * self.global_batch : (position + 1) * self.global_batch].tolist()
        return indices

    def epochs(self, steps: int) -> float:
        """Epochs done after `steps` steps."""
        whole, rest = divmod(steps, self.steps_per_epoch)
        return whole + min(rest * self.global_batch, self.num_pairs) / self.num_pairs
