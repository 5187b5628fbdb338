"""Generated answers compared with expected ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
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
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        generated = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs = zip(texts, answers[start : start + batch_size], strict=True)
        right += sum(text.strip() == answer.strip() for text, answer in pairs)
    return right / len(prompts)
