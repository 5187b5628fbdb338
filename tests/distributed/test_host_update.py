"""An optimizer in the host's memory takes the steps that it would take on the device."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import open_po.distributed.host_update as host_update
from open_po.distributed.single import SingleEngine
from open_po.distributed.transfers import Transfers
from open_po.errors import ConfigError, UserError
from open_po.optimizers import OPTIMIZERS
from tests import cli, scoring, tiny
from tests.distributed import steps
from tests.distributed.test_parallelism import chosen

STEPS = {"num_epochs": 2, "max_train_steps": 5, "max_tokens_per_batch": 130, "checkpointing_steps": 3}


class LateTransfers(Transfers):
    """Copies that are made as late as a GPU's stream may make them: when somebody waits."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.pending.append((source, target))

    def wait_on_host(self) -> None:
        for source, target in self.pending:
            target.copy_(source)
        self.pending.clear()

    wait_on_devices = wait_on_host


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_update, "make_transfers", lambda tensors: LateTransfers())


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"weight_decay": 0.1, "max_grad_norm": 0.05}, id="adamw_clipped"),
        pytest.param(
            {"optimizer": "rmsprop", "use_lora": True, "lora_rank": 4}, id="rmsprop_lora", marks=pytest.mark.slow
        ),
        pytest.param({"optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": 0}, id="sgd", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("late")
def test_float32_weights_are_those_of_the_ordinary_way_and_resume(
    fields: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    """Bit for bit, metrics too; and its checkpoints are those of the ordinary way."""
    pairs = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(9))
    fields = STEPS | fields
    plain = cli.train(llama, pairs, tmp_path / "plain", **fields)
    hosted = cli.train(llama, pairs, tmp_path / "hosted", offload_optimizer=True, **fields)
    assert cli.distance(cli.weights(plain), cli.weights(llama)) > 0.02
    assert cli.equal(cli.weights(hosted), cli.weights(plain))
    assert cli.without_perf(cli.metrics(hosted)) == cli.without_perf(cli.metrics(plain))
    ways = ((hosted, False), (plain, True))
    for source, offload in ways[:1] if "weight_decay" in fields else ways:  # one will do for the fast test
        resume = source / "checkpoints" / "step_000003"
        output = tmp_path / f"resumed_{offload}"
        cli.train(llama, pairs, output, offload_optimizer=offload, resume_from_checkpoint=resume, **fields)
        assert cli.equal(cli.weights(output), cli.weights(plain))


class Masters:
    """Training of bfloat16 weights through float32 ones, as plainly as it can be said."""

    def __init__(self, folder: Path, learning_rate: float, limit: float) -> None:
        self.scorer = scoring.load(folder, steps.BFLOAT16)
        self.weights = [torch.nn.Parameter(p.detach().float()) for p in self.scorer.parameters()]
        decayed = [{"params": [w], "weight_decay": 0.1 if w.ndim >= 2 else 0.0} for w in self.weights]
        self.optimizer = torch.optim.AdamW(decayed, lr=learning_rate, fused=True)
        self.limit = limit

    def step(self, packs: Any) -> float:
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        for batch in packs:
            self.scorer.zero_grad()
            steps.value(self.scorer, batch).backward()
            for weight, parameter in zip(self.weights, self.scorer.parameters(), strict=True):
                assert weight.grad is not None
                assert parameter.grad is not None
                weight.grad += parameter.grad
        norm = torch.nn.utils.get_total_norm([w.grad for w in self.weights if w.grad is not None])
        for weight in self.weights:  # they travel in the precision of the model's weights
            assert weight.grad is not None
            weight.grad = weight.grad.bfloat16().float() * min(1.0, float(self.limit / (norm + 1e-6)))
        self.optimizer.step()
        with torch.no_grad():
            for weight, parameter in zip(self.weights, self.scorer.parameters(), strict=True):
                parameter.copy_(weight)
        return float(norm)


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-6])
@pytest.mark.usefixtures("late")
def test_bfloat16_weights_are_float32_ones_rounded(learning_rate: float, llama: Path, tmp_path: Path) -> None:
    expected = Masters(llama, learning_rate, limit=0.5)
    engine, scorer = hosted(llama, learning_rate)
    start = {name: parameter.detach().clone() for name, parameter in scorer.named_parameters()}
    for packs in (steps.THREE, steps.ONE, steps.THREE[:1]):
        steps.backward(engine, scorer, packs)
        assert all(parameter.grad is None for parameter in scorer.parameters()), "gradients wait for the update"
        assert engine.update() == pytest.approx(expected.step(packs), rel=1e-5)
    masters = list(engine._updated().values())
    for mine, theirs, device, like in zip(
        masters, expected.weights, scorer.parameters(), expected.scorer.parameters(), strict=True
    ):
        assert mine.dtype == torch.float32
        assert torch.equal(device, mine.bfloat16())
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-3 * learning_rate)
        assert device.dtype == like.dtype == torch.bfloat16
    moved = sum(float((m.detach().double() - start[n].double()).abs().max()) for n, m in engine._updated().items())
    assert moved > 0, "small updates are kept"


def hosted(folder: Path, learning_rate: float) -> tuple[SingleEngine, Any]:
    scorer = scoring.load(folder, steps.BFLOAT16)
    train = {"learning_rate": learning_rate}
    return steps.engine_of(scorer, steps.rules(max_grad_norm=0.5), train=train, offload_optimizer=True), scorer


def test_a_checkpoint_has_the_float32_weights(llama: Path, tmp_path: Path) -> None:
    """At 1e-6 the weights on the device hardly change: what a resumed run goes on from is on the host."""
    first, scorer = hosted(llama, 1e-6)
    steps.backward(first, scorer, steps.THREE)
    first.update()
    first.save(tmp_path)
    second, other = hosted(llama, 1e-6)
    second.load(tmp_path)
    for engine, model in ((first, scorer), (second, other)):
        steps.backward(engine, model, steps.ONE)
        engine.update()
    assert cli.equal(second._updated(), first._updated())
    assert cli.equal(dict(other.named_parameters()), dict(scorer.named_parameters()))
    without = steps.engine_of(scoring.load(llama, steps.BFLOAT16), steps.rules())
    with pytest.raises(UserError, match="its weights are float32, those that this run updates bfloat16; set dtype, "):
        without.load(tmp_path)


@pytest.mark.usefixtures("late")
def test_gradients_that_are_not_finite_change_nothing(llama: Path) -> None:
    engine, scorer = hosted(llama, 1e-2)
    steps.backward(engine, scorer, steps.ONE)
    engine.update()
    before = {name: weight.detach().clone() for name, weight in engine._updated().items()}
    states = [value.clone() for state in engine.optimizer.state.values() for value in state.values()]
    with engine.step(packs=1), engine.pack(last=True):
        engine.backward(steps.value(scorer, steps.ONE[0]) * math.inf)
    assert not math.isfinite(engine.update())
    assert not engine.weights_changed
    assert cli.equal(engine._updated(), before)
    after = [value for state in engine.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, states, strict=True))


@pytest.mark.parametrize(
    ("fields", "ranks", "said"),
    [
        ({"parallel": "fsdp"}, 2, "fsdp offloads weights and optimizer together; set offload_param"),
        ({"optimizer": "sgd", "weight_decay": 0}, 1, "on the host by adamw, rmsprop, not by sgd; use adamw"),
        ({"optimizer_in_backward": "on", "max_grad_norm": 0}, 1, "has gradients leave for the host there; use auto"),
    ],
)
def test_what_does_not_go_with_it(
    fields: dict[str, Any], ranks: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", dataclasses.replace(OPTIMIZERS["sgd"], on_host=False))
    with pytest.raises(ConfigError) as error:
        chosen({"offload_optimizer": True} | fields, ranks=ranks)
    assert said in str(error.value)


def test_engines_that_take_it() -> None:
    for fields, ranks in (({}, 1), ({"parallel": "ddp"}, 2), ({}, 2), ({"parallel": "zero2"}, 2)):
        found = chosen({"offload_optimizer": True} | fields, ranks=ranks)
        assert found.offload_optimizer
        assert not found.is_free, "fsdp, which a run that does not fit gets, cannot"
