"""What a run's plan is made of: the models that are loaded, the engine that there is; and what is noted of budgets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from open_po.config import RunConfig, load_config
from open_po.data.run_data import Data
from open_po.distributed.parallelism import Parallelism
from open_po.distributed.runtime import Runtime
from open_po.memory_plan import MemoryPlan, ModelBytes, TrainingShape, WeightBytes, usable
from open_po.model import run_plan, token_budget
from open_po.model.numerics import frozen_numerics
from open_po.model.run_plan import plan_of_run, planned_pass_tokens
from open_po.model.scorer import Scorer
from open_po.model.token_budget import Demand, budget_book
from tests import scoring
from tests.commands.test_plan import Lines

GPU = torch.device("cuda", 0)
CARD, WEIGHTS = 24e9, 10**9
DATA = cast(
    Data,
    SimpleNamespace(
        train=SimpleNamespace(
            prompt_lengths=np.full(8, 100),
            chosen_lengths=np.full(8, 100),
            rejected_lengths=np.full(8, 100),
            scored=np.zeros((8, 3), dtype=np.int64),
        )
    ),
)


def config_of(words: str = "") -> RunConfig:
    return load_config(f"--model_name_or_path model --mixer_list data 1.0 {words}".split())


def runtime_of(world_size: int = 1, **parallelism: Any) -> Runtime:
    return cast(
        Runtime,
        SimpleNamespace(
            device=GPU,
            world_size=world_size,
            local_world_size=world_size,
            parallelism=Parallelism(**{"kind": "single"} | parallelism),
            from_main=lambda action: action(),
        ),
    )


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[TrainingShape]:
    """A card of 24 GB, and plans of a billion weights, whose shapes are noted."""
    noted: list[TrainingShape] = []

    def plan_memory(config: RunConfig, device: str, *, card: float, shape: TrainingShape, **_: Any) -> MemoryPlan:
        noted.append(shape)
        size = float(WEIGHTS * shape.weight)
        weights = WeightBytes(parameters=WEIGHTS, trained=WEIGHTS, size=size, trained_size=size)
        nothing = WeightBytes(parameters=0, trained=0, size=0.0, trained_size=0.0)
        return MemoryPlan(shape, ModelBytes(layers=(weights,), around=nothing), Lines(), card)

    monkeypatch.setattr(run_plan, "plan_memory", plan_memory)
    monkeypatch.setattr(run_plan, "card_bytes", lambda device: CARD)
    monkeypatch.setattr(run_plan, "room_bytes", lambda device: usable(CARD))
    monkeypatch.setattr(run_plan, "_known", {})
    return noted


def test_a_model_that_only_scores_is_planned_as_it_is_loaded() -> None:
    """Its weights are bfloat16 on CUDA, those of a policy that trains float32: two bytes of room a weight more."""
    config, tokens = config_of(), dict[int, int | None]()
    for name in (torch.bfloat16, torch.float32):
        numerics = dataclasses.replace(frozen_numerics(config.model, GPU), weights_dtype=name)
        scorer = cast(Scorer, SimpleNamespace(numerics=numerics, placement=SimpleNamespace(team=None)))
        tokens[name.itemsize] = planned_pass_tokens(config, runtime_of(), DATA, scorer)
    for size, found in tokens.items():
        free = usable(CARD) - size * WEIGHTS - 0.8e9 - 34e6  # but for the context and the workspace
        assert found == pytest.approx(free / (1.06 * 0.5e6), rel=0.02), size


def test_a_team_that_divides_a_model_is_planned_with_its_parts() -> None:
    config = config_of()
    numerics = frozen_numerics(config.model, GPU)
    team = SimpleNamespace(world_size=4)
    scorer = cast(Scorer, SimpleNamespace(numerics=numerics, placement=SimpleNamespace(team=team)))
    found = planned_pass_tokens(config, runtime_of(8, kind="ddp"), DATA, scorer)
    # A quarter of two bytes a weight, and its only layer gathered twice, as the next one would be.
    free = usable(CARD) - 2 * WEIGHTS / 4 - 1.06 * 2 * 2 * WEIGHTS - 0.8e9 - 34e6
    assert found == pytest.approx(free / (1.06 * 0.5e6), rel=0.02)


def test_what_the_launcher_has_asked_for_is_planned(shapes: list[TrainingShape]) -> None:
    """`accelerate launch` may say what no field of the configuration does."""
    config = config_of()
    plan_of_run(config, runtime_of(4, kind="zero3", offload_optimizer=True, offload_param=True), DATA)
    plan_of_run(config, runtime_of(4, kind="fsdp", reshard_after_forward=False), DATA)
    plan_of_run(config, runtime_of(4, kind="fsdp"), DATA)
    offloaded, kept, dropped = shapes
    assert (offloaded.engine, offloaded.optimizer, offloaded.optimizer_host) == ("zero3", 0.0, 20.0)
    assert offloaded.offload_weights
    assert not dropped.offload_weights
    assert dropped.optimizer == 8.0
    assert (kept.gathered_stay, dropped.gathered_stay) == (True, False)


def test_a_budget_is_noted_for_one_engine_and_one_room(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand = Demand(together=16_000, total=10**9, pair=500, longest=900)
    scorer = scoring.load(llama)

    def book(room: float, **spread: Any) -> token_budget.BudgetBook:
        monkeypatch.setattr(token_budget, "room_bytes", lambda device: room)
        return budget_book(tmp_path, "reference", scorer, demand, runtime_of(**spread))

    assert book(77.6e9).keep(40_960) == 40_960
    assert book(77.7e9).read() == 40_960, "other processes take some megabytes more or less"
    assert book(23.3e9).read() is None
    assert book(77.6e9, kind="ddp", world_size=2).read() is None
    assert book(77.6e9, kind="fsdp", world_size=2).keep(8192) == 8192
    assert book(77.6e9, kind="fsdp", world_size=8).read() is None
    assert book(77.6e9).read() == 40_960
