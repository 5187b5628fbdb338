"""Greedy answers to many prompts: how they are batched, what ends them, and what to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from open_po.errors import UserError, is_out_of_memory
from open_po.model.generation import Prompts
from open_po.model.scorer import Scorer

_ENDING = 2  # tokens of a response among which the one that ends a turn stands, with a line's end behind it


def turn_ends(tokenizer: PreTrainedTokenizerBase, responses: Iterable[Sequence[int]]) -> set[int]:
    """The special tokens that responses end with: the end of a turn in a chat format need not be EOS."""
    special = set(tokenizer.all_special_ids)
    return {token for response in responses for token in response[-_ENDING:] if token in special}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts that are answered side by side."""

    indices: Sequence[int]
    max_new_tokens: int  # of each answer


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """How prompts are answered."""

    ends: Sequence[int]  # tokens that end an answer
    pad: int
    max_new_tokens: int
    budget: int  # tokens of a batch, prompts and answers

    def batches(self, scorer: Scorer, lengths: Sequence[int]) -> list[Batch]:
        """Prompts of these lengths in batches of like ones, the longest first.

        Where the model has a table of positions a batch's answers end where its longest row does. Raises UserError for
        a prompt that leaves no room for one.
        """
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        found: list[Batch] = []
        while order:
            longest = lengths[order[0]]
            room = self.max_new_tokens if scorer.positions is None else scorer.positions - longest
            if room < 1:
                raise UserError(
                    f"max_prompt_length: a prompt of {longest} tokens leaves no room for an answer in the model's "
                    f"{scorer.positions} positions; lower it"
                )
            tokens = min(self.max_new_tokens, room)
            size = 1 if scorer.row_by_row else max(1, self.budget // (longest + tokens))
            found.append(Batch(indices=order[:size], max_new_tokens=tokens))
            order = order[size:]
        return found

    def answer(
        self,
        scorer: Scorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        on_token: Callable[[], object] | None = None,
    ) -> list[list[int]]:
        """The answers' token ids to one batch of prompts; in two halves, and so on, if memory runs out."""
        batch = Prompts.of(prompts, max_new_tokens=max_new_tokens, ends=self.ends, pad=self.pad, on_token=on_token)
        try:
            return scorer.answer(batch)
        except RuntimeError as error:
            if len(prompts) == 1 or not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(prompts) // 2
        return [
            answer
            for part in (prompts[:half], prompts[half:])
            for answer in self.answer(scorer, part, max_new_tokens, on_token)
        ]
