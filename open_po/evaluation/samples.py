"""Greedy answers to a few held-out prompts, the same ones at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_po.config import TrainConfig
from open_po.data import PairDataset
from open_po.data.tokenizer import pad_token_id
from open_po.distributed.runtime import Runtime
from open_po.model.generation import Prompts, end_tokens
from open_po.model.scorer import Scorer
from open_po.output.progress import Progress
from open_po.output.samples import Sample

_ENDING = 2  # tokens of a response among which the one that ends a turn stands, with a line's end behind it


class AnswerSampler:
    """Answers held-out prompts with the model as it is, and changes nothing of it: no dropout, no random number."""

    def __init__(self, dataset: PairDataset, tokenizer: PreTrainedTokenizerBase, train: TrainConfig) -> None:
        """`sample_during_eval` of the data's prompts, all different, from its whole length."""
        self._tokenizer, self._pad = tokenizer, pad_token_id(tokenizer)
        _, firsts = np.unique(dataset.prompt_numbers, return_index=True)
        spread = np.linspace(0, len(firsts) - 1, min(train.sample_during_eval, len(firsts))).round().astype(int)
        self.indices = np.sort(firsts)[spread].tolist()
        pairs = [dataset[index] for index in self.indices]
        self._origins = [dataset.origin(index) for index in self.indices]
        self._prompts = [pair.prompt_ids for pair in pairs]
        parts = zip(*((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs), strict=True)
        self._texts: list[list[str]] = [  # prompts as they are seen, chosen and rejected answers as they are read
            tokenizer.batch_decode(list(part), skip_special_tokens=number > 0) for number, part in enumerate(parts)
        ]
        special = set(tokenizer.all_special_ids)
        self._turn_ends = {token for pair in pairs for token in pair.chosen_ids[-_ENDING:] if token in special}
        self._longest, self._budget = train.sample_max_new_tokens, train.token_budget

    def sample(self, scorer: Scorer, step: int, runtime: Runtime) -> list[Sample]:
        """The answers after so many steps; all ranks call this.

        Where ranks divide the weights all of them answer all prompts, else rank 0 alone, and the others get none.
        """
        if scorer.lockstep:
            answers = self._answers(scorer, runtime)
        else:
            answers = runtime.on_main(self._answers, scorer, runtime) or []
        return [
            Sample(training_step=step, prompt=prompt, answer=answer, chosen=chosen, rejected=rejected, origin=origin)
            for answer, prompt, chosen, rejected, origin in zip(answers, *self._texts, self._origins, strict=False)
        ]

    def _answers(self, scorer: Scorer, runtime: Runtime) -> list[str]:
        ends = sorted({*end_tokens(scorer.base, self._tokenizer.eos_token_id), *self._turn_ends})
        longest = max(map(len, self._prompts))
        room = scorer.positions
        tokens = self._longest if room is None else min(self._longest, room - longest)
        size = 1 if scorer.row_by_row else max(1, self._budget // (longest + tokens))
        batches = [self._prompts[start : start + size] for start in range(0, len(self._prompts), size)]
        texts: list[str] = []
        with Progress(runtime.console, "Samples", total=tokens * len(batches), unit="tokens") as bar:
            for number, batch in enumerate(batches, start=1):
                texts += self._decoded(scorer, batch, tokens, ends, bar)
                bar.advance(number * tokens - bar.done)  # answers that ended sooner
        return texts

    def _decoded(
        self, scorer: Scorer, batch: Sequence[Sequence[int]], tokens: int, ends: Sequence[int], bar: Progress
    ) -> list[str]:
        prompts = Prompts.of(batch, max_new_tokens=tokens, ends=ends, pad=self._pad, on_token=lambda: bar.advance(1))
        found: list[str] = self._tokenizer.batch_decode(scorer.answer(prompts), skip_special_tokens=True)
        return found
