"""Runs whose token budget is found, and steps in which memory runs out: what they train is what others train."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from open_po.config import load_config
from open_po.distributed.single import SingleEngine
from open_po.model import token_budget
from open_po.training import step_budget
from open_po.training.optimizer import make_optimizer
from open_po.training.step_budget import settle_budget
from tests import cli, scoring
from tests.distributed import steps

ADAPTERS: dict[str, Any] = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2}
STEPS: dict[str, Any] = {"per_device_train_batch_size": 8, "num_epochs": 2, "max_train_steps": 4}
RETRIED = re.compile(
    r"Step (\d+): out of memory in a pack of ([\d,]+) tokens \(max_tokens_per_batch (\d+), [\d.]+ GB were"
)


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return found


def progress(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())["progress"]
    return found


# ------------------------------------------------------------------------------------------------------ what is found


@pytest.fixture
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of these tests, of about 350 tokens, is more than enough to choose from, and there is time for it."""
    monkeypatch.setattr(token_budget, "SMALLEST", 32)
    monkeypatch.setattr(token_budget, "_LEAST", 10.0)
    monkeypatch.setattr(token_budget, "_OF_SHORT", 100.0)


@pytest.mark.slow
@pytest.mark.usefixtures("small_budgets")
def test_a_measurement_leaves_no_trace(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same budget as a number gives the same run, bit for bit: dropout, the layers' weights, the metrics. So does
    what is kept for the next run, and what a checkpoint says."""
    fields = STEPS | ADAPTERS | {"checkpointing_steps": 2, "eval_mixer_list": [pairs_file, "4"]}
    found = cli.train(llama, pairs_file, tmp_path / "found", **fields)
    said = capsys.readouterr().out
    for name in ("max_tokens_per_batch", "reference_max_tokens_per_batch"):
        assert re.search(rf"^{name}: auto, [\d,]+ tokens \(measured: the smallest of 32", said, re.MULTILINE), said
        assert settings(found)[name] in (32, 64, 128, 256, 512, 1024)
    tokens = settings(found)["max_tokens_per_batch"]
    assert cli.summary(found)["train"]["max_tokens_per_batch"] == tokens
    pass_tokens = settings(found)["reference_max_tokens_per_batch"]
    assert cli.summary(found)["reference"]["max_tokens_per_batch"] == pass_tokens
    monkeypatch.setattr(token_budget, "fastest", lambda *_: pytest.fail("measured again"))
    given = {"max_tokens_per_batch": tokens, "reference_max_tokens_per_batch": pass_tokens}
    other = {"reference_cache_dir": tmp_path / "other"}
    for name, changes in (("given", given | other), ("again", {})):
        run = cli.train(llama, pairs_file, tmp_path / name, **fields | changes)
        assert cli.equal(cli.weights(run), cli.weights(found))
        assert cli.without_perf(cli.metrics(run)) == cli.without_perf(cli.metrics(found))
    # On a machine that has measured nothing
    monkeypatch.setattr(step_budget, "_find", lambda *_: pytest.fail("found again"))
    on = {"resume_from_checkpoint": found / "checkpoints" / "step_000002", "reference_cache_dir": tmp_path / "other"}
    resumed = cli.train(llama, pairs_file, tmp_path / "resumed", **fields | on)
    assert cli.equal(cli.weights(resumed), cli.weights(found))
    assert f"max_tokens_per_batch: {tokens} tokens, as before" in capsys.readouterr().out
    assert settings(resumed)["max_tokens_per_batch"] == tokens


@pytest.mark.usefixtures("small_budgets")
def test_ranks_find_one_budget(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Each measures; all take what the slowest says. Gradients that were only timed are in no sum over ranks."""
    fields: dict[str, Any] = {"per_device_train_batch_size": 6, "max_train_steps": 2, "loss_type": "simpo"}
    fields |= {"beta": 2.0, "gamma": 0.5, "reference_cache_dir": None}
    words = cli.arguments(llama, pairs_file, tmp_path / "found", **fields)
    assert cli.forked_ranks(words) == [0, 0]
    tokens = settings(tmp_path / "found")["max_tokens_per_batch"]
    assert tokens in (32, 64, 128, 256)
    given = cli.arguments(llama, pairs_file, tmp_path / "given", **fields, max_tokens_per_batch=tokens)
    assert cli.forked_ranks(given) == [0, 0]
    assert cli.equal(cli.weights(tmp_path / "found"), cli.weights(tmp_path / "given"))


def test_pairs_that_memory_is_not_planned_for_are_told_on_a_gpu() -> None:
    lines: list[str] = []
    planner: Any = SimpleNamespace(
        pair_tokens=lambda: np.array([50, 300, 120, 90]),
        dataset=SimpleNamespace(origin=["a", "b", "c", "d"].__getitem__),
    )

    def settle(device: str, tokens: int) -> int:
        words = f"--model_name_or_path m --mixer_list d 1.0 --max_tokens_per_batch {tokens}"
        runtime: Any = SimpleNamespace(device=torch.device(device), say=lines.append)
        start: Any = SimpleNamespace(resumed=False, state=SimpleNamespace(progress=SimpleNamespace()))
        nothing: Any = None
        return settle_budget(load_config(words.split()), runtime, nothing, planner, nothing, start, nothing)

    assert settle("cpu", 100) == 100, "where memory is not planned"
    assert settle("cuda", 300) == 300
    assert lines == []
    assert settle("cuda", 100) == 100
    assert lines == [
        "max_tokens_per_batch: 2 pairs need more than 100 tokens, alone in packs that are larger than planned: the "
        "longest has 300 (b); max_seq_length shortens it"
    ]
    lines.clear()
    assert settle("cpu", 60) == 60
    assert lines == [
        "max_tokens_per_batch: 3 of 4 pairs need more than 60 tokens, each alone in a pack; 1,024 would hold a few, "
        "auto finds what is fastest"
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_what_training_will_take_is_what_its_states_and_gradients_take(optimizer: str, llama: Path) -> None:
    scorer = scoring.load(llama)
    words = f"--model_name_or_path {llama} --mixer_list d 1.0 --max_seq_length 128 --optimizer {optimizer}"
    config = load_config(words.split())
    weights = list(scorer.parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    made = make_optimizer(weights, config.train, layers=scorer.decoder_layers())
    made.step()
    states = [item for state in made.state.values() for item in state.values() if isinstance(item, Tensor)]
    taken = sum(weight.nbytes for weight in weights) + sum(state.nbytes for state in states if state.dim())
    assert step_budget._to_come(config, scorer, steps.runtime()) == pytest.approx(taken, rel=0.02)


# -------------------------------------------------------------------------------------------------- memory that ends


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the `number`th backward pass of a run end for want of memory, its gradients added already; or each from then
    on."""
    real = SingleEngine.backward

    def arm(number: int, *, always: bool = False) -> None:
        done = 0

        def backward(self: SingleEngine, value: Tensor) -> None:
            nonlocal done
            done += 1
            real(self, value)
            if done == number or (always and done > number):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")

        monkeypatch.setattr(SingleEngine, "backward", backward)

    return arm


@pytest.mark.parametrize("loss", [pytest.param("dpo", marks=pytest.mark.slow), "bco_pair"])
def test_a_first_step_done_again_is_the_step_of_smaller_packs(
    loss: str,
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    fail_at: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit: dropout, metrics, what is counted of packs, means that the loss keeps of all steps."""
    fields = STEPS | ADAPTERS | {"loss_type": loss, "logging_steps": 2, "checkpointing_steps": 2}
    fail_at(2)
    retried = cli.train(llama, pairs_file, tmp_path / "retried", **fields, max_tokens_per_batch=150)
    step, tokens, budget = RETRIED.findall(capsys.readouterr().out)[0]
    assert (step, budget) == ("1", "150")
    smaller = int(tokens.replace(",", "")) // 2
    fail_at(-1)
    plain = cli.train(llama, pairs_file, tmp_path / "plain", **fields, max_tokens_per_batch=smaller)
    assert cli.equal(cli.weights(retried), cli.weights(plain))
    assert cli.without_perf(cli.metrics(retried)) == cli.without_perf(cli.metrics(plain))
    assert cli.summary(retried)["train"]["packing"] == cli.summary(plain)["train"]["packing"]
    assert cli.summary(retried)["train"]["max_tokens_per_batch"] == smaller
    on = {"resume_from_checkpoint": retried / "checkpoints" / "step_000002", "max_tokens_per_batch": 150}
    resumed = cli.train(llama, pairs_file, tmp_path / "resumed", **fields | on)
    assert progress(resumed / "checkpoints" / "step_000004")["max_tokens"] == smaller
    assert cli.equal(cli.weights(resumed), cli.weights(plain))


def test_a_later_step_done_again_changes_no_value(
    llama: Path, pairs_file: Path, tmp_path: Path, fail_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fields = STEPS | {"logging_steps": 2, "max_tokens_per_batch": 150}
    plain = cli.train(llama, pairs_file, tmp_path / "plain", **fields)
    before = capsys.readouterr().out
    assert not RETRIED.search(before)
    passes = cli.summary(plain)["train"]["packing"]["packs"]
    fail_at(round(passes * 0.7))  # in the third of four steps, between two writings of metrics
    retried = cli.train(llama, pairs_file, tmp_path / "retried", **fields)
    assert RETRIED.findall(capsys.readouterr().out)[0][0] == "3"
    cli.assert_close_weights(cli.weights(retried), cli.weights(plain), cli.weights(llama))
    for one, other in zip(cli.steps(retried), cli.steps(plain), strict=True):
        for name, value in cli.without_perf([other])[0].items():
            assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_memory_that_does_not_suffice_is_one_line(
    llama: Path, pairs_file: Path, tmp_path: Path, fail_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def line(number: int, name: str, **fields: Any) -> str:
        fail_at(number, always=True)
        return cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / name, **STEPS | fields))

    said = line(1, "twice", max_tokens_per_batch=400)
    assert re.search(r"Step 1: out of memory in a pack of \d+ tokens .* lower max_tokens_per_batch to \d+, or", said)
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    said = line(1, "alone", max_tokens_per_batch=1)
    assert re.search(r"the pair .*pairs.jsonl row \d+ alone .* lower max_seq_length", said), said


def test_smaller_packs_than_one_hold_gradients_and_that_is_told(
    llama: Path, pairs_file: Path, tmp_path: Path, fail_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Updates in the backward pass leave no gradients; the same step in several packs has them all."""
    fields = STEPS | {"max_tokens_per_batch": 2000, "max_grad_norm": 0}
    words = cli.arguments(llama, pairs_file, tmp_path / "twice", **fields)
    fail_at(1, always=True)
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    added = "in several packs, whose gradients add up in 0.0 GB that one pack spares"
    assert re.search(rf"the step is done again, .* with at most \d+ tokens at a time, {added}; its values", out)
    assert re.search(
        rf"Step 1: .* 2.00 GiB.\), {added}; lower per_device_train_batch_size or gradient_accumulation_steps until a "
        "step is one pack that fits, or set gradient_checkpointing",
        err,
    )
    fail_at(1)
    retried = cli.train(llama, pairs_file, tmp_path / "once", **fields)
    fail_at(-1)
    plain = cli.train(llama, pairs_file, tmp_path / "plain", **fields)
    cli.assert_close_weights(cli.weights(retried), cli.weights(plain), cli.weights(llama))


def test_a_rank_does_not_try_again_while_others_wait(
    llama: Path, pairs_file: Path, tmp_path: Path, fail_at: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    from open_po.distributed.ddp import DdpEngine

    def prepare(rank: int) -> None:
        real = DdpEngine.backward

        def backward(self: DdpEngine, value: Tensor) -> None:
            if rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            real(self, value)

        DdpEngine.backward = backward  # type: ignore[method-assign]

    words = cli.arguments(llama, pairs_file, tmp_path / "run", **STEPS, max_tokens_per_batch=100)
    assert cli.forked_ranks(words, prepare) == [1, 1]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: rank 1: ")]
    assert len(errors) == 1
    assert "lower max_tokens_per_batch to" in errors[0]
