"""What models are asked: the prompts of a data set, and what it holds beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from open_po.data.run_data import Data
from open_po.errors import UserError
from open_po.evaluation.generation import turn_ends


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a data set says, for every model the same; texts without white space at their ends."""

    origins: Sequence[str]
    prompts: Sequence[str]  # without special tokens
    seen: Sequence[str]  # as the model reads them
    references: Sequence[str]  # the chosen responses
    rejected: Sequence[str]  # empty where there is none
    groups: NDArray[np.int64]  # equal for equal prompts
    chat_template: str | None

    @staticmethod
    def of(data: Data) -> Texts:
        """As the tokenizer of `data` reads its ids."""
        pairs, tokenizer = [data.train[index] for index in range(len(data.train))], data.tokenizer
        prompts = [pair.prompt_ids for pair in pairs]
        return Texts(
            origins=data.train.origins,
            prompts=read(tokenizer, prompts),
            seen=tokenizer.batch_decode(prompts, clean_up_tokenization_spaces=False),
            references=read(tokenizer, [pair.chosen_ids for pair in pairs]),
            rejected=read(tokenizer, [pair.rejected_ids for pair in pairs]),
            groups=data.train.prompt_numbers,
            chat_template=template if isinstance(template := tokenizer.chat_template, str) else None,
        )


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The prompts as one model's tokenizer has them."""

    tokenizer: PreTrainedTokenizerBase
    pad: int
    prompts: Sequence[Sequence[int]]
    turn_ends: set[int]  # what ends a response in the data

    @staticmethod
    def of(data: Data) -> Questions:
        pairs = [data.train[index] for index in range(len(data.train))]
        ends = turn_ends(data.tokenizer, (pair.chosen_ids for pair in pairs))
        return Questions(
            tokenizer=data.tokenizer, pad=data.pad, prompts=[pair.prompt_ids for pair in pairs], turn_ends=ends
        )

    def keys(self, settings: str) -> list[str]:
        """The name of each prompt's answer by a model under `settings`: answers on disk are found by it."""
        start = hashlib.blake2b(settings.encode(), digest_size=16)
        found = []
        for prompt in self.prompts:
            digest = start.copy()
            digest.update(np.asarray(prompt, dtype="<i4").tobytes())
            found.append(digest.hexdigest())
        return found

    def mean_tokens(self, texts: Sequence[str]) -> float:
        """Mean length of texts in this tokenizer's tokens."""
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return float(np.mean([len(each) for each in ids]))


def read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts without special tokens, nor white space at their ends."""
    found = tokenizer.batch_decode(
        [list(each) for each in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in found]


def refuse_other_rows(name: str, data: Data, first: str, texts: Texts) -> None:
    """Raises UserError unless a model is asked the same rows as the first one."""
    own, theirs = set(data.train.origins), set(texts.origins)
    if list(data.train.origins) == list(texts.origins):
        return
    other = next(iter(sorted(own ^ theirs)), "their order")
    raise UserError(
        f"{name}: its tokenizer leaves out other rows than that of {first} ({other}), so they do not compare; raise "
        "max_seq_length, or evaluate them one by one"
    )
