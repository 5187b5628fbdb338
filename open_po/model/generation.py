"""Greedy answers, a batch at a time, by transformers' own `generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils import GENERATION_CONFIG_NAME


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to be answered in one batch, side by side, padded on the left."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], 0 for padding
    max_new_tokens: int
    ends: Sequence[int]  # tokens that end an answer
    pad: int
    on_token: Callable[[], object] | None = None  # called when every answer has one more

    @staticmethod
    def of(
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        ends: Sequence[int],
        pad: int,
        on_token: Callable[[], object] | None = None,
    ) -> Prompts:
        """A batch of prompts' token ids."""
        width = max(map(len, prompts))
        rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return Prompts(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(masks),
            max_new_tokens=max_new_tokens,
            ends=ends,
            pad=pad,
            on_token=on_token,
        )

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        ids, mask = self.input_ids.to(device), self.attention_mask.to(device)
        return dataclasses.replace(self, input_ids=ids, attention_mask=mask)


@torch.no_grad()
def answer_greedily(model: PreTrainedModel, prompts: Prompts, *, lockstep: bool = False) -> Tensor:
    """The tokens of the answers, [B, at most `max_new_tokens`], as far as the longest goes; see `answer_ids`.

    Settings that came with the model, a penalty or a temperature, are left aside. With `lockstep` all ranks go on until
    the last is done.
    """
    settings = GenerationConfig(
        max_new_tokens=prompts.max_new_tokens,
        do_sample=False,
        eos_token_id=list(prompts.ends),
        pad_token_id=prompts.pad,
    )
    watched = StoppingCriteriaList([] if prompts.on_token is None else [_Watch(prompts.on_token)])
    with _own_settings(model, settings):
        tokens: Tensor = model.generate(  # type: ignore[operator]
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            generation_config=settings,
            stopping_criteria=watched,
            synced_gpus=lockstep,
        )
    return tokens[:, prompts.input_ids.shape[1] :]


def answer_ids(tokens: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """The answers among generated tokens [B, N]: each without the token that ended it, and what came after."""
    found = []
    for row in tokens.tolist():
        end = next((position for position, token in enumerate(row) if token in ends), len(row))
        found.append(row[:end])
    return found


def end_tokens(settings: GenerationConfig | None, eos: int) -> list[int]:
    """What ends an answer: the tokenizer's EOS and what the settings that come with a model name."""
    named: Any = None if settings is None else settings.eos_token_id
    return sorted({eos, *(named if isinstance(named, list) else [] if named is None else [named])})


def generation_settings(folder: Path, trust_remote_code: bool) -> GenerationConfig:
    """The settings that come with the model of a folder, as it has them when it is loaded. Raises OSError."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


@contextmanager
def _own_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """`generate` fills what settings leave open from those of the model."""
    theirs = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = theirs


class _Watch(StoppingCriteria):
    """Stops nothing, and tells of every token."""

    def __init__(self, on_token: Callable[[], object]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self._on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
