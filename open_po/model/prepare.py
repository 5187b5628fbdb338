"""Models made ready for a run's data: checked, in the layout that suits them, alike on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from open_po.config import RunConfig, Sharing
from open_po.data.run_data import Data
from open_po.distributed.runtime import Runtime
from open_po.model.layout_check import choose_layout
from open_po.model.load import checkpoint_gradients, load_scorer
from open_po.model.lora import attach_lora
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.model_files import policy_source
from open_po.packing import Layout


def set_layout(scorer: Scorer, data: Data, sharing: Sharing, name: str, runtime: Runtime) -> None:
    """Set the scorer to the best layout that it takes, and say which.

    Raises UserError if the model cannot score these pairs, or scores them differently from its own forward.
    """
    longest = max(part.longest_row for part in data.parts)
    scorer.check_ids(data.highest_id)
    scorer.check_length(longest)
    samples = [data.train[index] for index in range(min(2, len(data.train)))]
    samples += [part[index] for part in data.parts for index in [part.longest_pair] if part.longest_row == longest]
    choice = choose_layout(scorer, samples, sharing, longest=longest, pad=data.pad)
    runtime.say(f"{name}: {choice.describe()}")


def load_alike(load: Callable[[], Scorer], runtime: Runtime) -> Scorer:
    """A model on every rank, all with the same layout, since each plans for all."""
    scorer = runtime.on_every_rank(load)
    layouts = runtime.gather(scorer.layout)
    scorer.use_layout(max(layouts, key=get_args(Layout).index))
    if len(set(layouts)) > 1:
        runtime.say(f"The ranks found different layouts ({', '.join(layouts)}); all take {scorer.layout}")
    return scorer


def load_policy(config: RunConfig, numerics: Numerics, runtime: Runtime, data: Data) -> Scorer:
    """The policy at its starting weights, checked against its own forward, with adapters if the run trains them."""
    model = config.model
    scorer = load_scorer(policy_source(config), numerics, runtime.device)
    set_layout(scorer, data, model.prompt_sharing, "Policy", runtime)
    if config.loss.load_balancing_loss:
        scorer.balance_experts()
    if model.gradient_checkpointing:
        checkpoint_gradients(scorer)
    if model.use_lora:
        attach_lora(scorer, model)
    return scorer
