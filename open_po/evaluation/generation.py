"""Generated answers compared with expected ones."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_po.data.tokenizer import pad_token_id
from open_po.model.generation import Prompts, answer_greedily, answer_ids, end_tokens


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
) -> float:
    """Share of prompts whose greedy answer is exactly the expected one, white space at the ends aside."""
    ends, pad = end_tokens(model, tokenizer.eos_token_id), pad_token_id(tokenizer)
    right = 0
    for start in range(0, len(prompts), batch_size):
        ids = tokenizer(list(prompts[start : start + batch_size]))["input_ids"]
        batch = Prompts.of(ids, max_new_tokens=max_new_tokens, ends=ends, pad=pad)
        tokens = answer_greedily(model, batch.to(model.device))
        texts = tokenizer.batch_decode(answer_ids(tokens, ends), skip_special_tokens=True)
        pairs = zip(texts, answers[start : start + batch_size], strict=True)
        right += sum(text.strip() == answer.strip() for text, answer in pairs)
    return right / len(prompts)
