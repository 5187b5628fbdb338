"""Engines by themselves: a model, an optimizer, and steps of packs that are the same each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_po.config import TrainConfig
from open_po.distributed.engine import Engine
from open_po.distributed.parallelism import Parallelism
from open_po.distributed.runtime import Runtime
from open_po.distributed.single import SingleEngine
from open_po.distributed.update import UpdateRules
from open_po.model.scorer import Scorer
from open_po.packing import PackedBatch, pack
from open_po.training.optimizer import make_optimizer
from tests import scoring

BFLOAT16 = dataclasses.replace(scoring.BFLOAT16, weights_dtype=torch.bfloat16)
# Of 9 pairs: three packs, and one.
THREE = [pack(scoring.ALL[i : i + 3], layout="rows", pad_token_id=2) for i in (0, 3, 6)]
ONE = [pack(scoring.ALL, layout="rows", pad_token_id=2)]


def runtime(**fields: Any) -> Runtime:
    return dataclasses.replace(Runtime.start(0), parallelism=Parallelism(**{"kind": "single"} | fields))


def rules(**fields: Any) -> UpdateRules:
    return UpdateRules(**{"max_grad_norm": 0.0} | fields)


def maker(**fields: Any) -> Callable[..., Optimizer]:
    return partial(make_optimizer, config=TrainConfig(**{"learning_rate": 1e-3, "weight_decay": 0.1} | fields))


def engine_of(
    scorer: nn.Module, update: UpdateRules, *, train: dict[str, Any] | None = None, **parallelism: Any
) -> SingleEngine:
    return SingleEngine(scorer, maker(**train or {}), runtime(**parallelism), rules=update)


def value(scorer: Scorer, batch: PackedBatch) -> Tensor:
    """The loss of a pack, some function of its scores."""
    scores = scoring.as_matrix(scorer.score(batch).logps)
    return (scores * scoring.WEIGHTS[: len(scores)].to(scores.device)).sum() / 100


def backward(engine: Engine, scorer: Scorer, packs: Sequence[PackedBatch]) -> None:
    with engine.step(packs=len(packs)):
        for number, batch in enumerate(packs):
            with engine.pack(last=number == len(packs) - 1):
                engine.backward(value(scorer, batch))


def pack_gradients(folder: Path, packs: Sequence[PackedBatch], numerics: Any = BFLOAT16) -> dict[str, list[Tensor]]:
    """Each pack's own gradients, by the weight's name, from a model that no engine has."""
    scorer = scoring.load(folder, numerics)
    found: dict[str, list[Tensor]] = {}
    for batch in packs:
        scorer.zero_grad()
        value(scorer, batch).backward()
        for name, parameter in scorer.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, []).append(parameter.grad.clone())
    return found
