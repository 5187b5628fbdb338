"""Answers that the model gives to held-out prompts while it is trained: the records of a run's samples.jsonl."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer; its fields are those of a line of samples.jsonl."""

    training_step: int  # optimizer steps done before
    prompt: str  # as the model sees it, special tokens too
    answer: str  # greedy
    chosen: str
    rejected: str
    origin: str  # of the held-out row
