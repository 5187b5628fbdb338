"""Runs with every optimizer: bfloat16 weights, several ranks, and a stop between steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from open_po.config import TrainConfig
from open_po.distributed import parallelism
from open_po.model.numerics import Numerics
from open_po.optimizers import OPTIMIZERS
from open_po.training.optimizer import long_warmup, lost_updates
from open_po.training.trainer import Trainer
from tests import cli, tiny

Capture = pytest.CaptureFixture[str]
KEEPING = ["adamw_kahan", "adamw_sr", "adamw_8bit"]
HERE = [name for name, spec in OPTIMIZERS.items() if not spec.needs_cuda]
ON_RANKS = [(engine, name) for engine in ("ddp", "fsdp") for name in HERE if engine in OPTIMIZERS[name].parallel]
SLOW = pytest.mark.slow
# 9 pairs in steps of 4, 4 and 1, twice
FIELDS: dict[str, Any] = {"dtype": "bfloat16", "save_dtype": "float32", "num_epochs": 2, "checkpointing_steps": 2}
FIELDS |= {"max_tokens_per_batch": 60, "learning_rate": 1e-3}
RESUMED = FIELDS | {"resume_from_checkpoint": "auto"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny.text_rows(9))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose rows divide into blocks of 64."""
    return tiny.make_model_folder(
        tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, num_key_value_heads=4
    )


def dying(step: int) -> Callable[..., object]:
    """For forked runs: SIGKILL when `step` steps are done."""

    def prepare(*rank: int) -> None:
        inner = Trainer.train_step

        def stepping(self: Trainer) -> Any:
            if self.state.progress.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(self)

        Trainer.train_step = stepping  # type: ignore[method-assign]

    return prepare


def same(one: Path, other: Path) -> None:
    assert cli.equal(cli.weights(one), cli.weights(other))
    assert cli.without_perf(cli.metrics(one)) == cli.without_perf(cli.metrics(other))


@pytest.mark.parametrize("name", [name if name == "adamw_sr" else pytest.param(name, marks=SLOW) for name in HERE])
@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=SLOW)])
def test_killed_and_resumed(name: str, in_background: bool, model: Path, pairs: Path, tmp_path: Path) -> None:
    fields = RESUMED | {"optimizer": name, "async_checkpointing": in_background}
    if name not in KEEPING:
        fields |= {"weights_dtype": "bfloat16"}
    whole = cli.train(model, pairs, tmp_path / "whole", **fields)
    words = cli.arguments(model, pairs, tmp_path / "killed", **fields)
    assert cli.forked(words, dying(3)) == -signal.SIGKILL
    assert cli.checkpoints(tmp_path / "killed") == ["step_000002"]
    assert cli.main(words) == 0
    same(tmp_path / "killed", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), ON_RANKS)
def test_killed_ranks_resume(engine: str, name: str, model: Path, pairs: Path, tmp_path: Path) -> None:
    fields = RESUMED | {"optimizer": name, "parallel": engine, "per_device_train_batch_size": 2}
    assert cli.forked_ranks(cli.arguments(model, pairs, tmp_path / "whole", **fields)) == [0, 0]
    words = cli.arguments(model, pairs, tmp_path / "killed", **fields)
    assert cli.forked_ranks(words, dying(3)) == [-signal.SIGKILL] * 2
    assert cli.forked_ranks(words) == [0, 0]
    same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), ON_RANKS)
def test_two_ranks_take_the_steps_of_one(engine: str, name: str, model: Path, pairs: Path, tmp_path: Path) -> None:
    """In float32, where two ranks and one differ by rounding alone; sgd at a rate that moves it."""
    fields = FIELDS | {"dtype": "float32", "optimizer": name, "max_grad_norm": 0}
    fields |= {"learning_rate": {"sgd": 0.05, "adafactor": 0.02}.get(name, 1e-3), "checkpointing_steps": None}
    alone = cli.train(model, pairs, tmp_path / "alone", **fields)
    two = fields | {"parallel": engine, "per_device_train_batch_size": 2}
    assert cli.forked_ranks(cli.arguments(model, pairs, tmp_path / "two", **two)) == [0, 0]
    # 8-bit codes of moments that differ in their last bits differ now and then, as do Muon's bfloat16 products.
    share = {"adamw_8bit": 0.02, "muon": 0.05}.get(name, 1e-4)
    cli.assert_close_weights(cli.weights(tmp_path / "two"), cli.weights(alone), cli.weights(model), share)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", KEEPING)
def test_bfloat16_weights_on_two_ranks(engine: str, name: str, model: Path, pairs: Path, tmp_path: Path) -> None:
    """Ranks with whole copies round alike; with parts of the weights each rounds its own."""
    fields = FIELDS | {"optimizer": name, "learning_rate": 1e-2}
    alone = cli.train(model, pairs, tmp_path / "alone", **fields)
    two = fields | {"parallel": engine, "per_device_train_batch_size": 2}
    assert cli.forked_ranks(cli.arguments(model, pairs, tmp_path / "two", **two)) == [0, 0]
    start, mine, theirs = (cli.weights(path) for path in (model, tmp_path / "two", alone))
    moved = torch.cat([(theirs[key] - start[key]).flatten() for key in start])
    other = torch.cat([(mine[key] - start[key]).flatten() for key in start])
    assert float(torch.cosine_similarity(moved, other, 0)) > 0.95
    for step, again in zip(cli.steps(tmp_path / "two"), cli.steps(alone), strict=True):
        assert step["train_loss"] == pytest.approx(again["train_loss"], rel=0.05, abs=0.02)
        assert 0 < step["optim/update_fraction"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "count"), [("fsdp", 1), ("fsdp", 3)])
def test_8_bit_states_go_to_other_ranks(engine: str, count: int, model: Path, pairs: Path, tmp_path: Path) -> None:
    fields = RESUMED | {"optimizer": "adamw_8bit", "parallel": engine, "per_device_train_batch_size": 2}
    fields |= {"dtype": "float32"}
    assert cli.forked_ranks(cli.arguments(model, pairs, tmp_path / "whole", **fields)) == [0, 0]
    words = cli.arguments(model, pairs, tmp_path / "moved", **fields)
    assert cli.forked_ranks(words, dying(3)) == [-signal.SIGKILL] * 2
    assert cli.forked_ranks(words, count=count) == [0] * count
    start = cli.weights(model)
    cli.assert_close_weights(cli.weights(tmp_path / "moved"), cli.weights(tmp_path / "whole"), start, share=0.02)


# ------------------------------------------------------------------------------------------------ optim/update_fraction


def fractions(folder: Path) -> list[float]:
    return [step["optim/update_fraction"] for step in cli.steps(folder)]


@pytest.mark.slow
def test_the_share_of_weights_that_change(llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Of all of them, by comparing checkpoints; a tiny model is sampled as a whole."""
    fields = FIELDS | {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "checkpointing_steps": 1}
    fields |= {"keep_last_n_checkpoints": 99, "warmup_ratio": 0.0, "max_train_steps": 3}
    shares = {}
    for name in ("adamw", "adamw_kahan", "adamw_sr"):
        folder = cli.train(llama, pairs, tmp_path / name, optimizer=name, weights_dtype="bfloat16", **fields)
        shares[name] = fractions(folder)
        if name == "adamw_kahan":
            continue
        for step in (2, 3):
            before, after = (
                torch.cat([value.flatten() for value in load_file(path / "weights.safetensors").values()])
                for path in (folder / "checkpoints" / f"step_{number:06d}" for number in (step - 1, step))
            )
            assert shares[name][step - 1] == pytest.approx(float((before != after).float().mean()), abs=1e-6)
    assert max(shares["adamw"]) < 0.05  # rounded away
    assert min(shares["adamw_kahan"]) > 0.5  # a token that is not in the step has no gradient
    # By chance a weight of 0.15 goes to the next number, 2^-10 further, in one of a thousand steps of 1e-6.
    assert all(0 < share < 0.05 for share in shares["adamw_sr"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_the_share_is_the_same_on_ranks(engine: str, model: Path, pairs: Path, tmp_path: Path) -> None:
    fields = {"num_epochs": 2, "learning_rate": 1e-3}
    alone = fractions(cli.train(model, pairs, tmp_path / "alone", **fields))
    words = cli.arguments(
        model, pairs, tmp_path / "two", parallel=engine, **fields | {"per_device_train_batch_size": 2}
    )
    assert cli.forked_ranks(words) == [0, 0]
    assert fractions(tmp_path / "two") == pytest.approx(alone, abs=2e-3)
    assert 0.3 < min(alone) < max(alone) < 1


# ------------------------------------------------------------------------------------------------------- what is told


def test_a_plain_optimizer_of_bfloat16_weights_is_warned_of(
    llama: Path, pairs: Path, tmp_path: Path, capsys: Capture
) -> None:
    fields = {"dtype": "bfloat16", "weights_dtype": "bfloat16", "max_train_steps": 1}
    cli.train(llama, pairs, tmp_path / "lost", learning_rate=5e-7, **fields)
    said = [line for line in capsys.readouterr().out.splitlines() if "Warning" in line]
    line = (
        "Warning: weights in bfloat16 lose most updates of adamw at a learning rate of 5e-07, since numbers near 0.02 "
        "are 0.0001 apart there; use optimizer adamw_kahan or adamw_sr or adamw_8bit, or weights_dtype float32"
    )
    assert said == [line]

    def told(weights: torch.dtype, rate: float, optimizer: str = "adamw") -> str | None:
        numerics = Numerics(compute_dtype=torch.bfloat16, weights_dtype=weights, use_liger=False)
        return lost_updates(TrainConfig(learning_rate=rate, optimizer=optimizer), numerics)

    assert told(torch.bfloat16, 5e-7) == line
    assert "most updates of adafactor at a learning rate of 0.001 of their size, since" in (
        told(torch.bfloat16, 1e-3, "adafactor") or ""
    )
    assert told(torch.bfloat16, 1e-2, "adafactor") is None
    assert told(torch.float32, 5e-7) is told(torch.bfloat16, 1e-4) is told(torch.bfloat16, 5e-7, "adamw_sr") is None


def test_a_warmup_that_the_run_does_not_come_to_the_end_of(
    llama: Path, pairs: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = cli.train(llama, pairs, tmp_path / "run", learning_rate=1e-3, warmup_steps=8, max_train_steps=2)
    line = (
        "Warning: warmup_steps 8 is more than the run's 2 steps; the learning rate rises to 25% of learning_rate and "
        "no further"
    )
    assert [said for said in capsys.readouterr().out.splitlines() if "Warning" in said] == [line]
    assert [record["learning_rate"] for record in cli.steps(output)] == pytest.approx([1e-3 / 8, 2e-3 / 8])
    assert long_warmup(TrainConfig(warmup_steps=8), 2) == line
    assert long_warmup(TrainConfig(warmup_steps=2), 2) is long_warmup(TrainConfig(warmup_ratio=0.9), 1) is None


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"optimizer": "adamw_paged"}, "optimizer: adamw_paged needs CUDA, which is not here; use adamw"),
        (
            {"optimizer": "muon", "parallel": "zero2"},
            "optimizer: muon does not go with parallel zero2; use adamw, or parallel single, ddp, fsdp, layers",
        ),
        (
            {"weights_dtype": "bfloat16", "parallel": "zero3"},
            "weights_dtype: bfloat16 does not go with parallel zero3, whose optimizer keeps float32 weights; use fsdp, "
            "or leave it out",
        ),
    ],
)
def test_what_does_not_go_together(
    fields: dict[str, Any], line: str, model: Path, pairs: Path, tmp_path: Path, capfd: Capture
) -> None:
    assert cli.forked(cli.arguments(model, pairs, tmp_path / "run", **fields)) == 2
    assert [said for said in capfd.readouterr().err.splitlines() if "error" in said] == [f"config error: {line}"]


def test_a_package_that_is_missing_is_named(
    model: Path, pairs: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_po.optimizers.spec.find_spec", lambda name: None)
    assert cli.main(cli.arguments(model, pairs, tmp_path / "run", optimizer="adamw_8bit")) == 2
    assert capsys.readouterr().err == (
        "config error: optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or "
        "use adamw\n"
    )


@pytest.mark.slow
def test_layers_by_their_stand_in(model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices that are the CPU: the optimizer sees weights of both."""
    monkeypatch.setattr(parallelism.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("open_po.distributed.layers.visible_gpus", lambda: [torch.device("cpu")] * 2)
    fields = FIELDS | {"optimizer": "adamw_kahan", "checkpointing_steps": None}
    alone = cli.train(model, pairs, tmp_path / "alone", **fields)
    dealt = cli.train(model, pairs, tmp_path / "dealt", parallel="layers", **fields)
    assert cli.equal(cli.weights(dealt), cli.weights(alone))
