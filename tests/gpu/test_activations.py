"""Offload, compiled layers and tiles on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_po.config import ModelConfig
from open_po.data import PreferencePair
from open_po.model import offload
from open_po.model.activations import checkpoint_gradients, keep_activations
from open_po.model.load import load_scorer
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource
from open_po.packing import pack
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LONG = [PreferencePair([3 + i % 300 for i in range(6000)], [5] * 500, [6] * 499 + [7])]


def scorer_with(folder: Path, compiled: bool = False, **fields: Any) -> Scorer:
    numerics = Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.float32, use_liger=False, compiled=compiled)
    scorer = load_scorer(ModelSource(name=str(folder)), numerics, torch.device("cuda")).train()
    config = ModelConfig(**fields)
    if config.gradient_checkpointing:
        checkpoint_gradients(scorer)
    keep_activations(scorer, config)
    scorer.use_layout("shared")
    return scorer


def step(scorer: Scorer) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the most memory that a step takes on top of what was there."""
    for _ in range(2):
        scorer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scorer.score(pack(LONG, layout="shared", pad_token_id=2)).logps.chosen.sum().backward()
        torch.cuda.synchronize()
    gradients = {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}
    return gradients, torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    tiny.make_model(folder, max_position_embeddings=8192, **sizes)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offload_gives_the_same_gradients_in_less_memory(
    deep: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_IN_FLIGHT_BYTES", 16 * 2**20)
    torch.use_deterministic_algorithms(True, warn_only=True)
    expected, plain = step(scorer_with(deep, gradient_checkpointing=checkpointing))
    got, least = step(scorer_with(deep, gradient_checkpointing=checkpointing, offload_activations=True))
    torch.use_deterministic_algorithms(False)
    print(f"plain {plain / 2**20:.0f} MiB, offload {least / 2**20:.0f} MiB")
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-3 * gradient.norm().clamp(min=1e-6), name
    assert least < 0.8 * plain


def test_tiles_take_less_memory(deep: Path) -> None:
    expected, plain = step(scorer_with(deep))
    got, least = step(scorer_with(deep, mlp_tile_tokens=1024))
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 2e-2 * gradient.norm().clamp(min=1e-6), name
    assert least < 0.7 * plain


def test_compiled_layers_give_the_same_gradients(deep: Path) -> None:
    expected, _ = step(scorer_with(deep))
    got, _ = step(scorer_with(deep, compiled=True))
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 5e-2 * gradient.norm().clamp(min=1e-6), name
