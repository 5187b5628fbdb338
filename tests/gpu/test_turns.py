"""Scored turns on a GPU, in bfloat16 through FlashAttention: prompts whose states the last layer computes in part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from open_po.model.layout_check import choose_layout
from open_po.model.load import load_scorer
from open_po.model.numerics import Numerics
from open_po.model_files import ModelSource
from open_po.packing import pack
from tests import tiny
from tests.model.test_turns import PAIRS, gradients, naive
from tests.scoring import as_matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("liger", [False, True], ids=["torch", "liger"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_scored_turns_equal_transformers(architecture: str, liger: bool, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture, **tiny.SHARING[architecture])
    model = tiny.plain_model(tmp_path)
    expected, _, _ = naive(model)
    expected.sum().backward()
    numerics = Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.float32, use_liger=liger)
    scorer = load_scorer(ModelSource(name=str(tmp_path)), numerics, torch.device("cuda"))
    assert choose_layout(scorer, PAIRS, "on", longest=84, pad=2).layout == "shared"
    assert scorer.last_layer_is_short
    got = as_matrix(scorer.score(pack(PAIRS, layout="shared", pad_token_id=2)).logps)
    got.sum().backward()
    assert ((got.cpu() - expected).abs() <= 2e-2 * expected.abs().clamp(min=1)).all()
    theirs = gradients(model)
    for name, gradient in gradients(scorer.base).items():
        assert (gradient.cpu() - theirs[name]).norm() <= 0.1 * theirs[name].norm().clamp(min=1e-2), name
