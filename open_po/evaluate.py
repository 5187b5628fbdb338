"""Held-out evaluation: preference metrics from log-probs, exact match from generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_po.global_batch import gather_logps
from open_po.losses import LossMix, PairLogps
from open_po.model import Scorer
from open_po.packing import Planner
from open_po.reference import lookup
from open_po.runtime import Runtime
from open_po.tracking import Metrics, PreferenceMeter


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pairs to evaluate on, with their reference log-probs if the loss needs them."""

    planner: Planner
    reference: PairLogps | None


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    held_out: HeldOut,
    loss: LossMix,
    running_means: Sequence[Tensor | None],
    runtime: Runtime,
    *,
    pad: int,
) -> Metrics:
    """The training metrics on held-out pairs taken as one batch, under `eval/`.

    Both responses are scored whatever the loss needs.
    """
    planner = held_out.planner
    training = scorer.training
    scorer.eval()
    packs = planner.packs(range(len(planner.dataset)), rank=runtime.rank, world_size=runtime.world_size)
    scored = [
        (indices, scorer(planner.batch(indices, pad), extras=loss.extras, ld_alpha=loss.ld_alpha)) for indices in packs
    ]
    scorer.train(training)
    order = range(len(planner.dataset))
    policy = gather_logps(scored, order, runtime)
    meter = PreferenceMeter()
    if runtime.is_main:  # every rank has all pairs now; one counts them
        losses = loss(policy, lookup(held_out.reference, order, policy), running_means)
        meter.add(policy, losses, planner.counts(order))
    return {f"eval/{name}": value for name, value in meter.means(runtime).items()}


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
