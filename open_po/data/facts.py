"""What to know of tokenised pairs before training on them: their special tokens, and what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from open_po.data.dataset import PairDataset
from open_po.data.keys import key_numbers, may_be_shared
from open_po.data.token_rows import IdColumn

# How a response ends: with one EOS, with several, with one and other tokens behind it; or without because it was
# truncated, or though it was not. Of a rejected response that there is not: "absent".
Ending = Literal["once", "repeated", "followed", "cut", "missing", "absent"]
_CHUNK = 10_000  # rows


@dataclass(frozen=True)
class _Column:
    """Token ids of several rows, and questions about each of them."""

    rows: IdColumn

    @property
    def ids(self) -> NDArray[np.int32]:
        return self.rows.ids

    def count(self, hits: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of each row's tokens are among `hits`."""
        sums = np.concatenate([[0], np.cumsum(hits)])
        counts: NDArray[np.int64] = sums[self.rows.ends] - sums[self.rows.starts]
        return counts

    def run(self, token: int, *, at_end: bool = False) -> NDArray[np.int64]:
        """How often each row has `token` in a row, at its beginning or its end."""
        starts, ends = self.rows.starts, self.rows.ends
        lengths = ends - starts
        runs = np.zeros(len(lengths), dtype=np.int64)
        going = np.arange(len(lengths))
        while len(going := going[runs[going] < lengths[going]]):
            place = ends[going] - 1 - runs[going] if at_end else starts[going] + runs[going]
            going = going[self.ids[place] == token]
            runs[going] += 1
        return runs

    def behind_last(self, token: int) -> NDArray[np.int64]:
        """How many tokens stand behind each row's last `token`; all of them where there is none."""
        places = np.flatnonzero(self.ids == token)
        before = np.searchsorted(places, self.rows.ends)  # how many places come before the row's end
        last = np.where(before > 0, places[np.maximum(before - 1, 0)] if len(places) else -1, -1)
        behind: NDArray[np.int64] = self.rows.ends - 1 - np.maximum(last, self.rows.starts - 1)
        return behind


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """BOS, EOS and unknown tokens of P pairs."""

    leading_bos: NDArray[np.int64]  # [P] how many BOS the prompt begins with
    inner_bos: NDArray[np.bool_]  # [P] whether there is another further on; none are looked for if BOS is EOS
    endings: NDArray[np.str_]  # [P, 2] of chosen and rejected, each an `Ending`
    behind_eos: NDArray[np.int64]  # [P, 2] tokens behind the last EOS
    unknown: NDArray[np.int64]  # [P] tokens that stand for what the tokenizer does not know

    def ended(self, side: int, ending: Ending) -> int:
        """How many responses of a side, 0 for chosen and 1 for rejected, end so."""
        return int((self.endings[:, side] == ending).sum())


def special_tokens(dataset: PairDataset, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of all pairs."""
    bos, eos, unknown = (
        -1 if token is None else int(token)  # no token has this id
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    )
    if unknown in (bos, eos):
        unknown = -1  # some tokenizers have one token for all, and know every byte
    parts: dict[str, list[NDArray[np.int64]]] = {"leading": [], "bos": [], "unknown": [], "run": [], "behind": []}
    for found_columns in dataset.columns(_CHUNK):
        columns = list(map(_Column, found_columns))
        parts["leading"].append(columns[0].run(bos))
        parts["bos"].append(np.sum([c.count(c.ids == bos) for c in columns], axis=0))
        parts["unknown"].append(np.sum([c.count(c.ids == unknown) for c in columns], axis=0))
        parts["run"].append(np.stack([c.run(eos, at_end=True) for c in columns[1:]], 1))
        parts["behind"].append(np.stack([c.behind_last(eos) for c in columns[1:]], 1))
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    lengths = np.stack([dataset.chosen_lengths, dataset.rejected_lengths], 1)
    tests = [lengths == 0, found["run"] == 1, found["run"] > 1, dataset.lost[:, 1:] > 0, found["behind"] < lengths]
    inner = found["bos"] > found["leading"]
    return SpecialTokens(
        leading_bos=found["leading"],
        inner_bos=inner if bos != eos else np.zeros_like(inner),
        endings=np.select(tests, ["absent", "once", "repeated", "cut", "followed"], "missing"),
        behind_eos=found["behind"],
        unknown=found["unknown"],
    )


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What pairs have in common."""

    prompts: int  # distinct
    in_company: int  # pairs whose prompt another one has too
    most: int  # pairs of one prompt
    responses: int  # distinct, by prompt
    repeated: int  # pairs that came before
    contradicted: int  # pairs whose responses another one has the other way round


def shared(dataset: PairDataset) -> Shared:
    """What the pairs have in common."""
    by_prompt = np.unique(dataset.prompt_numbers, return_counts=True)[1]
    numbers = dataset.response_numbers.astype(np.int64)
    many = int(numbers.max()) + 1
    pairs, swapped = numbers @ np.array([many, 1]), numbers @ np.array([1, many])
    return Shared(
        prompts=len(by_prompt),
        in_company=int(by_prompt[by_prompt > 1].sum()),
        most=int(by_prompt.max()),
        responses=len(np.unique(np.append(numbers[:, 0], numbers[dataset.rejected_lengths > 0, 1]))),
        repeated=len(pairs) - len(np.unique(pairs)),
        contradicted=int(np.isin(pairs, swapped).sum()),
    )


def known_prompts(dataset: PairDataset, others: PairDataset) -> int:
    """How many distinct prompts of `dataset` are prompts of `others` too."""
    hits, their_hits = may_be_shared(dataset.prompt_keys, others.prompt_keys)
    mine, theirs = dataset.prompt_keys[hits], others.prompt_keys[their_hits]
    numbers = key_numbers(np.concatenate([mine, theirs]))
    return len(np.intersect1d(numbers[: len(mine)], numbers[len(mine) :]))


def known_pairs(dataset: PairDataset, others: PairDataset) -> int:
    """How many pairs of `dataset` are in `others` too: the same prompt and responses, whichever is preferred."""
    hits, their_hits = may_be_shared(dataset.response_keys, others.response_keys)
    mine, theirs = dataset.response_keys[hits.all(1)], others.response_keys[their_hits.all(1)]
    numbers = np.sort(key_numbers(np.concatenate([mine, theirs]).ravel()).reshape(-1, 2), 1)
    pairs = numbers @ np.array([int(numbers.max(initial=0)) + 1, 1])
    return int(np.isin(pairs[: len(mine)], pairs[len(mine) :]).sum())


def tell_known(held_out: PairDataset, training: PairDataset) -> str | None:
    """One line if held-out pairs or prompts are trained on; None if none are."""
    prompts = known_prompts(held_out, training)
    if not prompts:
        return None
    pairs, distinct = known_pairs(held_out, training), len(np.unique(held_out.prompt_numbers))
    return (
        f"{pairs:,} of {len(held_out):,} pairs are trained on too, and {prompts:,} of {distinct:,} prompts; figures on "
        "them tell of memory"
    )
