"""Labels of conversations as open-instruct's preference transform masks them, and what `transformers` says of these.

Everything is a label but the messages of others: from where the conversation before such a message ends, to where it
ends itself with the generation prompt, if the assistant is next. Lengths are those of the rendered prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_po.data import PreferencePair
from tests.plain import Plain, Recipe, Scores

IGNORED = -100


def encoded(messages: Sequence[Any], tokenizer: Any, opens: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def masked(messages: Sequence[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation."""
    ids = encoded(messages, tokenizer)
    labels = list(ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        start = len(encoded(messages[:number], tokenizer)) if number else 0
        answered = number + 1 < len(messages) and messages[number + 1]["role"] == "assistant"
        end = len(encoded(messages[: number + 1], tokenizer, opens=answered))
        labels[start:end] = [IGNORED] * (end - start)
    return ids, labels


def labels_of(pair: PreferencePair, side: int) -> tuple[list[int], list[int]]:
    """Ids and labels of prompt and response as `pair` has them."""
    response = (pair.chosen_ids, pair.rejected_ids)[side]
    labels = [IGNORED] * len(pair.prompt_ids) + list(response)
    for start, end in pair.turns.prompt:
        labels[start:end] = pair.prompt_ids[start:end]
    for start, end in pair.turns[1 + side]:
        labels[len(pair.prompt_ids) + start : len(pair.prompt_ids) + end] = [IGNORED] * (end - start)
    return [*pair.prompt_ids, *response], labels


def label_logps(model: Any, ids: Sequence[int], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-prob of each label by the model's own forward, and log of its summed squared probabilities."""
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
    targets = torch.tensor(list(labels)[1:])
    kept = logits[targets != IGNORED]
    return kept.gather(1, targets[targets != IGNORED][:, None])[:, 0], kept.exp().square().sum(-1).log().detach()


class MaskedPlain(Plain):
    """The plain trainer on conversations with masked labels: `pairs` has chosen's and rejected's ids and labels."""

    @staticmethod
    def of_rows(folder: Path, rows: Sequence[Any], recipe: Recipe) -> MaskedPlain:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pairs: Any = [tuple(masked(row[side], tokenizer) for side in ("chosen", "rejected")) for row in rows]
        return MaskedPlain(AutoModelForCausalLM.from_pretrained(folder).eval(), pairs, recipe)

    def score(self, indices: Sequence[int], *, grad: bool) -> Scores:
        found: list[list[Tensor]] = []
        for side in (0, 1):
            with torch.set_grad_enabled(grad):
                by_pair = [label_logps(self.model, *self.pairs[i][side]) for i in indices]  # type: ignore[arg-type]
            found.append([torch.stack([logps.sum() for logps, _ in by_pair])])
            found[-1].append(torch.stack([squares.sum() for _, squares in by_pair]))
            found[-1].append(torch.tensor([len(logps) for logps, _ in by_pair]))
        (chosen, squares, count), (rejected, squares_, count_) = found
        none = torch.zeros(len(chosen))
        return Scores(chosen, rejected, count, count_, squares, squares_, none, none)
