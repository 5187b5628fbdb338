"""An optimizer that steps in the backward pass changes nothing but how many gradients there are at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import open_po.distributed.in_backward as in_backward
import open_po.training.run as run
from open_po.distributed.layers import LayersPlacement
from open_po.model.activations import checkpoint_gradients
from open_po.model.lora import attach_lora
from tests import cli, scoring, tiny
from tests.distributed import steps

# 9 pairs in steps of 4, 4 and 1; some steps are several packs.
STEPS = {"num_epochs": 2, "max_train_steps": 5, "weight_decay": 0.1, "max_grad_norm": 0, "max_tokens_per_batch": 130}


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient waits for another."""
    monkeypatch.setattr(in_backward, "_TOGETHER", 1)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(9))


def step_counts(folder: Path, step: str) -> set[float]:
    state = torch.load(folder / "checkpoints" / step / "optimizer.pt", weights_only=True)["state"]
    return {float(each["step"]) for each in state.values()}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        # Gemma's head is tied to its embedding: one parameter, two gradients.
        pytest.param("gemma2", {"gradient_checkpointing": True}, id="tied"),
        pytest.param(
            "llama",
            {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.3, "loss_type": "aot"},
            id="lora",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.usefixtures("one_by_one")
def test_weights_are_those_of_the_ordinary_way_and_resume(
    architecture: str, fields: dict[str, Any], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, metrics too; and a run may go on in the other way from where it was stopped."""
    folder = tiny.make_model_folder(tmp_path / "model", architecture)
    fields = STEPS | fields | {"lr_scheduler_type": "cosine", "checkpointing_steps": 3}
    plain = cli.train(folder, pairs, tmp_path / "plain", optimizer_in_backward="off", **fields)
    assert "optimizer_in_backward" not in capsys.readouterr().out
    fused = cli.train(folder, pairs, tmp_path / "fused", optimizer_in_backward="on", **fields)
    assert capsys.readouterr().out.count("optimizer_in_backward: gradients of a step of 2 packs add up first") == 1
    assert cli.distance(cli.weights(plain), cli.weights(folder)) > 0.05
    assert cli.equal(cli.weights(fused), cli.weights(plain))
    assert cli.without_perf(cli.metrics(fused)) == cli.without_perf(cli.metrics(plain))
    assert step_counts(fused, "step_000003") == {3.0}, "each weight is updated once a step"
    if architecture == "gemma2":
        return  # one resumed run will do
    resume = fused / "checkpoints" / "step_000003"
    mixed = cli.train(
        folder, pairs, tmp_path / "mixed", optimizer_in_backward="off", resume_from_checkpoint=resume, **fields
    )
    assert cli.equal(cli.weights(mixed), cli.weights(plain))


@pytest.mark.parametrize(
    ("optimizer", "together"), [("adamw", 1), ("adamw", 10_000), ("adamw", 2**25), ("rmsprop", 1), ("sgd", 10_000)]
)
def test_every_optimizer_and_any_number_at_a_time(
    optimizer: str, together: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_backward, "_TOGETHER", together)
    ends = []
    for switch in ("auto", "off"):
        scorer = scoring.load(llama, steps.BFLOAT16)
        train = {"optimizer": optimizer, "weight_decay": 0.1 if optimizer == "adamw" else 0.0}
        engine = steps.engine_of(scorer, steps.rules(optimizer_in_backward=switch), train=train)
        norms = []
        for packs in (steps.ONE, steps.THREE, steps.THREE[:1]):
            steps.backward(engine, scorer, packs)
            norms.append(engine.update())
        ends.append((norms, dict(scorer.named_parameters())))
    (norms, fused), (expected, plain) = ends
    assert norms == expected
    assert cli.equal(fused, plain)


class Live:
    """Bytes of gradients that parameters hold each time an optimizer steps, which is when most are there."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self.most = 0
        step = optimizer.step

        def counting(*args: Any) -> Any:
            self.most = max(self.most, sum(p.grad.nbytes for p in parameters if p.grad is not None))
            return step(*args)

        optimizer.step = counting  # type: ignore[method-assign]


@pytest.mark.parametrize("way", ["plain", "checkpointing", "layers"])
def test_no_more_gradients_than_a_layer_s_are_held(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", num_hidden_layers=6)
    most = {}
    for switch in ("auto", "off"):
        scorer = scoring.load(folder)
        if way == "checkpointing":
            checkpoint_gradients(scorer)
            scorer.train()
        if way == "layers":
            scorer.place(LayersPlacement(scorer, scorer.decoder_layers(), [scoring.CPU] * 2))
        parameters = list(scorer.parameters())
        layer = sum(p.nbytes for p in scorer.decoder_layers()[0].parameters())
        largest = max(p.nbytes for p in parameters)
        monkeypatch.setattr(in_backward, "_TOGETHER", layer)
        engine = steps.engine_of(scorer, steps.rules(optimizer_in_backward=switch), kind="single")
        live = Live(engine.optimizer, parameters)
        steps.backward(engine, scorer, steps.ONE)
        engine.update()
        most[switch] = live.most
    everything = sum(p.nbytes for p in parameters)
    print(way, most, "layer", layer, "largest", largest, "all", everything)
    assert most["off"] == everything
    assert most["auto"] < layer + largest
    assert everything > 3 * (layer + largest) / 2, "the model is too small for this to mean anything"


def test_adapters(llama: Path) -> None:
    """Only they have gradients, and hooks."""
    from open_po.config import ModelConfig

    ends = []
    for switch in ("on", "off"):
        torch.manual_seed(0)
        scorer = scoring.load(llama)
        fields = {"lora_rank": 4, "lora_alpha": 16.0, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
        attach_lora(scorer, ModelConfig(model_name_or_path=str(llama), use_lora=True, **fields))  # type: ignore[arg-type]
        engine = steps.engine_of(scorer, steps.rules(optimizer_in_backward=switch))
        for _ in range(2):
            steps.backward(engine, scorer, steps.ONE)
            engine.update()
        ends.append({name: p for name, p in scorer.named_parameters() if p.requires_grad})
    assert ends[0]
    assert cli.equal(*ends)


# -------------------------------------------------------------------------------------------------------- not finite


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose embedding, the last to get one, has a gradient that is not finite in the third step."""
    make, steps_seen = run.make_optimizer, 0

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal steps_seen
        steps_seen += 1
        return gradient * math.inf if steps_seen == 3 else gradient

    def make_optimizer(parameters: Any, config: Any, layers: Any) -> Any:
        parameters = list(parameters)
        parameters[0].register_hook(poison)
        return make(parameters, config)

    monkeypatch.setattr(run, "make_optimizer", make_optimizer)


@pytest.mark.parametrize("waits", [True, False])
def test_a_gradient_that_is_not_finite_stops_the_run_with_the_truth(
    waits: bool,
    llama: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where weights have changed by then it says so, and that the last checkpoint is what to go on from."""
    if not waits:
        monkeypatch.setattr(in_backward, "_TOGETHER", 1)
    poisoned(monkeypatch)
    fields = STEPS | {"max_tokens_per_batch": 2000, "checkpointing_steps": 1}
    line = cli.failure(capsys, cli.arguments(llama, pairs, tmp_path / "run", **fields))
    assert line.startswith("error: step 3: the gradient is not finite, stopped ")
    assert cli.checkpoints(tmp_path / "run") == ["step_000001", "step_000002"]
    if waits:
        assert "stopped before the update; pairs: " in line
    else:
        assert "stopped after the update had begun in the backward pass (optimizer_in_backward); pairs: " in line
        assert line.endswith("; go on from the last checkpoint, if any, with --resume_from_checkpoint auto")


@pytest.mark.usefixtures("one_by_one")
def test_a_loss_that_is_not_finite_changes_no_weight(llama: Path) -> None:
    scorer = scoring.load(llama)
    engine = steps.engine_of(scorer, steps.rules())
    before = {name: p.detach().clone() for name, p in scorer.named_parameters()}
    with engine.step(packs=1), engine.pack(last=True):
        engine.backward(steps.value(scorer, steps.ONE[0]) * math.nan)
    assert math.isnan(engine.update())
    assert not engine.weights_changed
    assert cli.equal(before, dict(scorer.named_parameters()))
    steps.backward(engine, scorer, steps.ONE)
    assert math.isfinite(engine.update())
    assert engine.weights_changed


def test_clipping_contradicts_it(llama: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = cli.arguments(llama, pairs, tmp_path / "run", optimizer_in_backward="on")
    assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        "config error: optimizer_in_backward: on cannot clip, which needs all gradients first; set max_grad_norm to 0, "
        "got 1.0\n"
    )
