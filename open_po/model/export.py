"""A trained model as a folder that `transformers` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from open_po.model.scorer import Scorer


def save_model(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write a model that `AutoModelForCausalLM.from_pretrained(folder)` loads, and its tokenizer.

    Adapters are written to `folder/adapter` and merged into the model, which cannot train any further afterwards. Those
    on top of merged ones are only merged: what they belong to is no model that their file could name.
    """
    if scorer.has_adapters:
        adapted = cast(Any, scorer.model)
        if not scorer.holds_adapters:
            adapted.save_pretrained(folder / "adapter")
            (folder / "adapter" / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
        if dtype == torch.float32:  # a bfloat16 base would round the sum that float32 is asked for
            adapted.to(dtype=dtype)
        scorer.model = adapted.merge_and_unload()
    model = scorer.base
    for name, rate in scorer.saved_dropout.items():
        setattr(model.config, name, rate)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
