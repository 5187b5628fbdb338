"""Greedy answers to a few held-out prompts, the same ones at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_po.config import TrainConfig
from open_po.data import PairDataset
from open_po.data.tokenizer import pad_token_id
from open_po.distributed.runtime import Runtime
from open_po.evaluation.generation import Greedy, turn_ends
from open_po.model.generation import end_tokens
from open_po.model.scorer import Scorer
from open_po.output.metrics import GENERATED_LENGTH, HELD_OUT, Metrics
from open_po.output.progress import Progress
from open_po.output.samples import Sample


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The answers of one evaluation, and what they add to its figures; empty where a rank gets none."""

    samples: list[Sample] = field(default_factory=list)
    metrics: Metrics = field(default_factory=dict)


class AnswerSampler:
    """Answers held-out prompts with the model as it is, and changes nothing of it: no dropout, no random number."""

    def __init__(self, dataset: PairDataset, tokenizer: PreTrainedTokenizerBase, train: TrainConfig) -> None:
        """`sample_during_eval` of the data's prompts, all different, from its whole length."""
        self._tokenizer, self._pad = tokenizer, pad_token_id(tokenizer)
        _, firsts = np.unique(dataset.prompt_numbers, return_index=True)
        spread = np.linspace(0, len(firsts) - 1, min(train.sample_during_eval, len(firsts))).round().astype(int)
        self.indices = np.sort(firsts)[spread].tolist()
        pairs = [dataset[index] for index in self.indices]
        self._origins = [dataset.origins[index] for index in self.indices]
        self._prompts = [pair.prompt_ids for pair in pairs]
        parts = zip(*((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs), strict=True)
        self._texts: list[list[str]] = [  # prompts as they are seen, chosen and rejected answers as they are read
            tokenizer.batch_decode(list(part), skip_special_tokens=number > 0) for number, part in enumerate(parts)
        ]
        self._turn_ends = turn_ends(tokenizer, (pair.chosen_ids for pair in pairs))
        self._longest, self._budget = train.sample_max_new_tokens, train.token_budget

    def sample(self, scorer: Scorer, step: int, runtime: Runtime) -> Samples:
        """The answers after so many steps, and their mean length; all ranks call this.

        Where ranks divide the weights all of them answer all prompts, else rank 0 alone, and the others get none.
        """
        if scorer.lockstep:
            answers = self._answers(scorer, runtime)
        else:
            answers = runtime.on_main(self._answers, scorer, runtime) or []
        if not answers:
            return Samples()
        texts = self._tokenizer.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
        samples = [
            Sample(training_step=step, prompt=prompt, answer=answer, chosen=chosen, rejected=rejected, origin=origin)
            for answer, prompt, chosen, rejected, origin in zip(texts, *self._texts, self._origins, strict=True)
        ]
        lengths = [length for _, length in answers]
        return Samples(samples=samples, metrics={HELD_OUT + GENERATED_LENGTH: sum(lengths) / len(lengths)})

    def _answers(self, scorer: Scorer, runtime: Runtime) -> list[tuple[list[int], int]]:
        """Of each prompt the answer's tokens, and how many there were with the one that ended it."""
        ends = sorted({*end_tokens(scorer.base.generation_config, self._tokenizer.eos_token_id), *self._turn_ends})
        greedy = Greedy(ends=ends, pad=self._pad, max_new_tokens=self._longest, budget=self._budget)
        batches = greedy.batches(scorer, [len(prompt) for prompt in self._prompts])
        found: dict[int, tuple[list[int], int]] = {}
        total = sum(batch.max_new_tokens for batch in batches)
        with Progress(runtime.console, "Samples", total=total, unit="tokens") as bar:
            done = 0
            for batch in batches:
                prompts: Sequence[Sequence[int]] = [self._prompts[index] for index in batch.indices]
                answers = greedy.answer(scorer, prompts, batch.max_new_tokens, lambda: bar.advance(1))
                for index, answer in zip(batch.indices, answers, strict=True):
                    found[index] = (answer, min(len(answer) + 1, batch.max_new_tokens))
                done += batch.max_new_tokens
                bar.advance(done - bar.done)  # answers that ended sooner
        return [found[index] for index in range(len(self._prompts))]
