"""Metrics that take a model of their own: BERTScore, a reward model's score, the win rate by it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from open_po.errors import UserError, first_line
from open_po.evaluation.metrics.spec import Answered

_BATCH = 16
_SAME = 1e-6  # rewards closer than this are a tie: padding moves the last digits


def bertscore(answered: Answered) -> list[float]:
    """BERTScore F1 (Zhang et al. 2020) by bert-score, in percent, not rescaled; 0 for an empty answer.

    Raises UserError for its model.
    """
    import bert_score

    tools = answered.tools
    model: dict[str, Any] = {"lang": tools.target_language}
    pairs = zip(answered.answers, answered.references, strict=True)
    # Of an empty text its tokenisers make nothing that it could compare.
    full = {number: pair for number, pair in enumerate(pairs) if all(pair)}
    if not full:
        return [0.0] * len(answered)
    try:
        if tools.bertscore_model is not None:
            model = {"model_type": tools.bertscore_model, "num_layers": _layers(tools.bertscore_model)}
        answers, references = map(list, zip(*full.values(), strict=True))
        _, _, f1 = bert_score.score(answers, references, device=tools.device, batch_size=_BATCH, **model)
    except Exception as error:  # of the Hub's client, transformers, or bert-score's tables
        named = tools.bertscore_model or f"the model for {tools.target_language}"
        raise UserError(
            f"metrics: bertscore cannot use {named} ({first_line(error)}); name a folder or a Hub model with "
            "--bertscore_model"
        ) from error
    found = dict(zip(full, f1.tolist(), strict=True))
    return [100.0 * found.get(number, 0.0) for number in range(len(answered))]


def _layers(model: str) -> int:
    """The layer whose states are compared: the one that its authors chose for a model that they know, else the last."""
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    return int(model2layers.get(model) or AutoConfig.from_pretrained(model).num_hidden_layers)


def reward(answered: Answered) -> list[float]:
    """What the reward model gives each answer."""
    return _judge(answered).rewards(answered, answered.answers)


def win_rate(answered: Answered) -> list[float]:
    """100 where the reward model gives the answer more than the reference, 50 where as much, else 0."""
    judge = _judge(answered)
    answers, references = (judge.rewards(answered, texts) for texts in (answered.answers, answered.references))
    return [
        50.0 if abs(answer - reference) < _SAME else 100.0 * (answer > reference)
        for answer, reference in zip(answers, references, strict=True)
    ]


def _judge(answered: Answered) -> RewardModel:
    name = answered.tools.reward_model
    assert name is not None, "asked for by the metric's entry"
    return RewardModel.load(name, answered.tools.device)


class RewardModel:
    """A model that gives a prompt and an answer a number, and remembers what it has given."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self._name, self._model, self._tokenizer = name, model, tokenizer
        self._known: dict[str, float] = {}

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def load(name: str, device: str) -> RewardModel:
        """The model of a folder or the Hub. Raises UserError if it gives no single number."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, output_loading_info=True)
        except Exception as error:  # transformers raises whatever a bad folder makes it
            raise UserError(
                f"--reward_model {name}: no model for sequence classification can be loaded ({first_line(error)})"
            ) from error
        judge, info = model
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"--reward_model {name}: has no weights for {missing[0]}; it is no reward model")
        if judge.config.num_labels != 1:
            raise UserError(f"--reward_model {name}: gives {judge.config.num_labels} numbers, a reward model gives one")
        if judge.config.pad_token_id is None:
            judge.config.pad_token_id = tokenizer.pad_token_id
        return RewardModel(name, judge.to(device).eval(), tokenizer)

    @torch.no_grad()
    def rewards(self, answered: Answered, answers: Sequence[str]) -> list[float]:
        """The reward of each answer to its prompt. Raises UserError if the model reads another chat format."""
        texts = self._texts(answered, answers)
        new = sorted({text for text in texts if text not in self._known}, key=len, reverse=True)
        pads = self._tokenizer.pad_token_id is not None
        size = _BATCH if pads else 1
        for start in range(0, len(new), size):
            batch = new[start : start + size]
            inputs = self._tokenizer(
                batch, add_special_tokens=False, padding=pads, return_tensors="pt", padding_side="right"
            )
            inputs.pop("token_type_ids", None)
            logits = self._model(**inputs.to(self._model.device)).logits
            self._known |= dict(zip(batch, logits[:, 0].float().tolist(), strict=True))
        return [self._known[text] for text in texts]

    def _texts(self, answered: Answered, answers: Sequence[str]) -> list[str]:
        """What the model reads: in its own chat format where it has one, else prompt and answer as they stand."""
        own, theirs = self._tokenizer.chat_template, answered.chat_template
        if own is None or own == theirs:
            begins, ends = self._tokenizer.bos_token or "", self._tokenizer.eos_token or ""
            prompts = [seen if seen.startswith(begins) else begins + seen for seen in answered.seen]
            if theirs is None:  # answers have lost the blank that they began with
                prompts = [prompt if prompt[-1:].isspace() else f"{prompt} " for prompt in prompts]
            return [prompt + answer + ends for prompt, answer in zip(prompts, answers, strict=True)]
        if theirs is not None:
            raise UserError(
                f"--reward_model {self._name}: has another chat template than the model that is evaluated, and would "
                "misread its prompts; take one of the same family, or set chat_template_name"
            )
        return [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False
            )
            for prompt, answer in zip(answered.prompts, answers, strict=True)
        ]
