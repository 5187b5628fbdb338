"""Gradients and optimizers on a CUDA device (on CPUs: tests/distributed)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import open_po.distributed.host_update as host_update
from open_po.distributed.gradient_sums import step_gradients
from open_po.distributed.transfers import StreamTransfers, Transfers
from open_po.model.load import load_scorer
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource
from tests import cli, scoring, tiny
from tests.distributed import steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 30 million weights: transfers take longer than the work of the host on small ones."""
    return tiny.make_model_folder(
        tmp_path_factory.mktemp("model"), hidden_size=512, intermediate_size=1536, num_hidden_layers=8
    )


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def load(folder: Path) -> Scorer:
    return load_scorer(ModelSource(name=str(folder)), steps.BFLOAT16, torch.device("cuda"))


def test_streams_change_no_bit_of_an_update_on_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for make in (lambda tensors: StreamTransfers([torch.device("cuda", 0)]), lambda tensors: Transfers()):
        monkeypatch.setattr(host_update, "make_transfers", make)
        scorer = load(folder)
        engine = steps.engine_of(scorer, steps.rules(max_grad_norm=0.5), offload_optimizer=True)
        for packs in (steps.THREE, steps.ONE, steps.ONE):
            steps.backward(engine, scorer, packs)
            assert all(parameter.grad is None for parameter in scorer.parameters())
            engine.update()
        ends.append((engine._updated(), dict(scorer.named_parameters())))
    assert cli.equal(ends[0][0], ends[1][0])
    assert cli.equal(ends[0][1], ends[1][1])
    for name, weight in ends[0][1].items():
        assert torch.equal(weight.cpu(), ends[0][0][name].bfloat16())


def test_the_host_takes_the_steps_of_the_device(folder: Path) -> None:
    """AdamW of float32 weights on the CPU, against PyTorch's on the GPU: the same but for the last digits."""
    moved = []
    for offload in (True, False):
        source = ModelSource(name=str(folder))
        scorer = load_scorer(source, scoring.FLOAT32, torch.device("cuda"))
        start = {name: p.detach().clone() for name, p in scorer.named_parameters()}
        engine = steps.engine_of(scorer, steps.rules(max_grad_norm=0.5), offload_optimizer=offload)
        for packs in (steps.THREE, steps.ONE):
            steps.backward(engine, scorer, packs)
            engine.update()
        moved.append({name: p.detach() - start[name] for name, p in scorer.named_parameters()})
    size = sum(float(value.square().sum()) for value in moved[1].values()) ** 0.5
    assert cli.distance(moved[0], moved[1]) <= 1e-3 * size


def test_an_update_in_the_backward_pass_is_the_same_and_holds_no_gradients(folder: Path) -> None:
    ends, peaks = [], []
    for switch in ("on", "off"):
        scorer = load(folder)
        engine = steps.engine_of(scorer, steps.rules(optimizer_in_backward=switch))
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps.backward(engine, scorer, steps.ONE)
            norm = engine.update()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        ends.append((norm, dict(scorer.named_parameters())))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert cli.equal(ends[0][1], ends[1][1])
    gradients = sum(p.nbytes for p in ends[0][1].values())
    waiting = min(gradients, 2**25 + max(p.nbytes for p in ends[0][1].values()))
    print(
        f"peak above what was there: {peaks[0] / 1e6:.1f} MB and {peaks[1] / 1e6:.1f} MB, gradients {gradients / 1e6}"
    )
    assert peaks[1] - peaks[0] >= 0.8 * (gradients - waiting)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_several_packs(dtype: str, folder: Path) -> None:
    scorer = load(folder)
    singly: dict[str, torch.Tensor] = {}
    for batch in steps.THREE:
        scorer.zero_grad()
        steps.value(scorer, batch).backward()
        for name, parameter in scorer.named_parameters():
            assert parameter.grad is not None
            singly[name] = singly.get(name, 0) + parameter.grad.double()
    engine = steps.engine_of(scorer, steps.rules(grad_dtype=dtype))
    steps.backward(engine, scorer, steps.THREE)
    got = step_gradients(engine._parameters, engine._sums)
    for name, parameter in scorer.named_parameters():
        error = float((got[parameter].double() - singly[name]).norm() / singly[name].norm())
        assert error <= (1e-5 if dtype == "float32" else 1e-2), name
