"""Optimizers on CUDA, against the CPU and after a stop. Run with `pytest tests/gpu -m gpu`; see docs/gpu_checks.md."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from open_po.optimizers import OPTIMIZERS
from tests import cli
from tests.optimizers.test_optimizers import HERE, give_gradients, make, model, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXACT = [name for name in HERE if name not in ("adamw_sr", "adamw_8bit", "muon")]  # the GPU draws other numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_steps_are_those_of_a_cpu(name: str, dtype: torch.dtype) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        weights = model(dtype).to(device)
        optimizer = make(name, weights)
        for step in range(12):
            host = model(dtype)
            give_gradients(host, step)
            for weight, same in zip(weights, host, strict=True):
                weight.grad = same.grad.to(device)
            optimizer.step()
        ends.append(values(weights.cpu(), None if name != "adamw_kahan" else optimizer).cpu())
    moved = (ends[0] - values(model(dtype))).norm()
    assert (ends[1] - ends[0]).norm() <= (1e-4 if dtype == torch.float32 else 0.02) * moved


@pytest.mark.parametrize("name", ["adamw_kahan", "adamw_sr", "adamw_8bit"])
def test_small_updates_are_kept_and_a_step_is_fast(name: str) -> None:
    weight = nn.Parameter(torch.full((8192, 8192), 0.02, dtype=torch.bfloat16, device="cuda"))
    optimizer = make(name, nn.ParameterList([weight]), learning_rate=1e-7, weight_decay=0.0, layers=[])
    before = torch.cuda.memory_allocated()
    for step in range(40):
        weight.grad = torch.ones_like(weight)
        torch.cuda.synchronize()
        start = time.monotonic()
        optimizer.step()
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
        if step == 0:
            states = torch.cuda.memory_allocated() - before - weight.nbytes
    print(f"{name}: {seconds / weight.numel() * 1e12:.1f} ms for 1e9 parameters")
    assert states / weight.numel() == pytest.approx(OPTIMIZERS[name].state_bytes(2), abs=0.05)
    assert seconds < 0.1
    moved = values(nn.ParameterList([weight]), optimizer).double() - float(torch.tensor(0.02).bfloat16())
    assert float(moved.mean()) == pytest.approx(-4e-6, rel=0.02)


@pytest.mark.parametrize("name", ["adamw_kahan", "adamw_sr", "adamw_8bit", "adamw_paged", "adafactor", "muon"])
def test_a_resumed_run_is_the_same(name: str, llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Trained twice, the second time in two parts; `adamw_paged` keeps states in pages again."""
    fields = {"optimizer": name, "num_epochs": 2, "checkpointing_steps": 3, "save_dtype": "float32"}
    whole = cli.train(llama, pairs_file, tmp_path / "whole", **fields)
    checkpoint = whole / "checkpoints" / cli.checkpoints(whole)[-1]
    again = cli.train(llama, pairs_file, tmp_path / "again", resume_from_checkpoint=checkpoint, **fields)
    assert cli.equal(cli.weights(again), cli.weights(whole))
