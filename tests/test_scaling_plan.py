"""benchmarks/scaling_plan.py against numbers worked out by hand, and docs/scaling.md against it."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import pytest

from tests import cli

FOLDER = str(cli.REPOSITORY / "benchmarks")
sys.path.insert(0, FOLDER)
scaling: Any = importlib.import_module("scaling_plan")
sys.path.remove(FOLDER)

SMALL, LARGE = scaling.MODELS
N8, N70 = 8_030_261_248, 70_553_706_496
ENGINES = {engine.name: engine for engine in scaling.ENGINES}


def plan(engine: str, ranks: int, model: Any = SMALL, **changes: int) -> Any:
    return scaling.Plan(model, ENGINES[engine], ranks, **changes)


def states(found: Any) -> float:
    return float(sum(found.memory[part] for part in ("weights", "gradients", "Adam")))


def test_parameters_of_the_models() -> None:
    # 8B, a layer: q and o 2 x 4096 x 4096, k and v 2 x 4096 x 1024, MLP 3 x 4096 x 14336, two norms of 4096.
    layer = 33_554_432 + 8_388_608 + 176_160_768 + 8_192
    assert SMALL.layer == layer == 218_112_000
    # 32 of them, the last norm, embeddings and head of 128256 x 4096 each.
    assert SMALL.parameters == 32 * layer + 4_096 + 2 * 525_336_576 == N8
    # 70B: 80 layers of 2 x 8192 x 8192, 2 x 8192 x 1024, 3 x 8192 x 28672 and 2 x 8192.
    assert LARGE.layer == 134_217_728 + 16_777_216 + 704_643_072 + 16_384
    assert LARGE.parameters == 80 * LARGE.layer + 8_192 + 2 * 128_256 * 8_192 == N70
    # Rank 64: 64 x (inputs + outputs): q and o 8192, k and v 5120, gate, up and down 18432, in 32 layers.
    assert SMALL.adapters == 32 * 64 * (2 * 8_192 + 2 * 5_120 + 3 * 18_432) == 167_772_160


def test_what_stays_on_a_gpu() -> None:
    assert states(plan("DDP", 8)) == states(plan("DDP", 256)) == 16 * N8  # 128.5 GB
    assert states(plan("ZeRO-1", 8)) == 4 * N8 + 4 * N8 + (8 + 4) * N8 / 8  # 4 N/8: DeepSpeed's second copy
    assert states(plan("ZeRO-2, every pack", 8)) == 4 * N8 + (4 + 8 + 4) * N8 / 8
    assert states(plan("ZeRO-2, once a step", 8)) == states(plan("ZeRO-1", 8))
    assert states(plan("ZeRO-3", 32)) == states(plan("FSDP2, every pack", 32)) == 16 * N8 / 32  # 4.0 GB
    assert states(plan("ZeRO-3", 32, LARGE)) == 16 * N70 / 32  # 35.3 GB
    assert states(plan("ZeRO-3, hpz 8", 32, LARGE)) == 16 * N70 / 32 + 4 * N70 / 8
    # Two packs a step on 8 ranks: whole gradients until the last one; on 32 ranks there is but one.
    assert states(plan("FSDP2, once a step", 8)) == 12 * N8 / 8 + 4 * N8
    assert states(plan("FSDP2, once a step", 32)) == 16 * N8 / 32
    offloaded = plan("ZeRO-3, offload", 8, LARGE)
    assert states(offloaded) == 4 * N70 / 8
    assert offloaded.host == 20 * N70  # 1.4 TB in the only node
    # A GPU of eight has 32 / 8 layers, the last one the head too.
    assert states(plan("layers", 8)) == 16 * (4 * 218_112_000 + 525_336_576)
    # Base in bfloat16, adapters 16 bytes.
    assert states(plan("LoRA, DDP", 8)) == 2 * N8 + 16 * 167_772_160
    assert states(plan("LoRA, FSDP2", 8)) == pytest.approx((2 * N8 + 16 * 167_772_160) / 8)


def test_what_comes_and_goes_on_a_gpu() -> None:
    memory = plan("FSDP2, every pack", 8).memory
    # A token: 32 checkpoints of 4096 float32, and 34 x 4096 + 6 x 1024 + 12 x 14336 of the layer at work; 8 pairs.
    assert memory["activations"] == 8_000 * (524_288 + 317_440)  # 6.7 GB
    assert memory["tile"] == 2**27
    # Embedding and head, 525 million each: weights, gradients and what is sent of them, 24 bytes of one.
    assert memory["in flight"] == 24 * 525_336_576
    # 70B: beside two layers of 856 million, 16 bytes each, 14 of a head of 1,051 million.
    large = plan("FSDP2, every pack", 32, LARGE)
    assert large.memory["in flight"] == 14 * 1_050_673_152 + 16 * 855_654_400  # 28.4 GB
    # One pack of 4 pairs does not fit; it does if embedding and head are apart: max(16 P, 14 Vh + 4 P).
    assert not large.fits
    assert large.total - large.memory["in flight"] + 14 * 1_050_673_152 + 4 * 855_654_400 < 75e9
    assert scaling.make_plan(LARGE, ENGINES["FSDP2, every pack"], 32).pairs == 2


def test_what_a_rank_sends() -> None:
    # A ring all-reduce of 4 N bytes over 8 ranks sends 2 x 7/8 of them; over 32, 2 x 31/32, an eighth between nodes.
    assert plan("DDP", 8).sent == pytest.approx((2 * 7 / 8 * 4 * N8, 0))  # 56.2 GB
    whole = 2 * 31 / 32 * 4 * N8  # 62.2 GB
    assert plan("DDP", 32).sent == pytest.approx((7 / 8 * whole, whole / 8))
    assert plan("ZeRO-1", 32).sent == pytest.approx(plan("DDP", 32).sent)
    # Two packs: gradients of each, and weights once.
    assert plan("ZeRO-2, every pack", 8).sent[0] == pytest.approx(3 * 7 / 8 * 4 * N8)
    # Weights for the forward and the backward pass of both packs, gradients of each; or of both together.
    assert plan("ZeRO-3", 8).sent[0] == pytest.approx(6 * 7 / 8 * 4 * N8)
    assert plan("FSDP2, once a step", 8).sent[0] == pytest.approx(5 * 7 / 8 * 4 * N8)
    # One pack on 32 ranks: weights once and gradients over all ranks, weights once more inside the node.
    over_all = 2 * 31 / 32 * 4 * N8
    assert plan("ZeRO-3, hpz 8", 32).sent == pytest.approx((7 / 8 * over_all + 7 / 8 * 4 * N8, over_all / 8))
    assert plan("LoRA, DDP", 8).sent[0] == pytest.approx(2 * 7 / 8 * 4 * 167_772_160)
    # 128 pairs of 1,000 tokens, 4096 float32 each, to the next GPU and back.
    assert plan("layers", 8).sent[0] == 2 * 128_000 * 4 * 4_096


def test_flops_of_a_pair() -> None:
    # 6,979,588,096 parameters of the body. A prompt of 500 sees 500 x 501 / 2 positions, a response of 250 sees
    # 250 x 500 + 250 x 251 / 2: together 438,000, with 4 x 4096 FLOPs in 32 layers. The head: 500 tokens.
    body = 2 * 6_979_588_096 * 1_000 + 4 * 4_096 * 32 * 438_000
    head = 2 * 525_336_576 * 500
    assert SMALL.pair_flops(lora=False) == pytest.approx(4 * body + 3 * head)  # 5.83e13
    assert SMALL.pair_flops(lora=True) == pytest.approx(3 * body + 2 * head + 8 * 167_772_160 * 1_000)


def test_seconds() -> None:
    # 5.8331e13 FLOPs at 0.4 x 989e12: 0.14745 s a pair, 16 pairs on a rank; two packs of 30 N bytes and an update of
    # 28 N / 8 at 2.7e12 bytes/s: 0.1785 + 0.0104 s.
    found = plan("ZeRO-1", 8)
    assert found.compute == pytest.approx(16 * 0.14745 + 0.1889, rel=1e-3)
    # Gradients and weights over NVLink, beside nothing: 56.2 GB at 450 GB/s.
    assert found.waits == pytest.approx(0.1249, rel=1e-3)
    assert found.efficiency == pytest.approx(16 * 0.14745 / (found.compute + found.waits), rel=1e-3)
    # FSDP2 on 256: 12.0 GB between nodes at 50 GB/s and 3 x 33 collectives of 255 steps of 4.7 us, of which 0.8 of the
    # compute, one pair's and one pack's passes, hides some: 0.2399 + 0.1187 - 0.8 x 0.2370.
    wide = plan("FSDP2, every pack", 256)
    assert wide.waits == pytest.approx(0.2399 + 0.1187 - 0.8 * (0.14745 + 0.0892 + 0.0003), rel=5e-3)
    # Offloaded: gradients down and weights up, 8 N/8 at 50 GB/s, and AdamW's 28 N at 300 GB/s.
    assert plan("ZeRO-3, offload", 8).waits == pytest.approx(0.1606 + 0.7495, rel=1e-3)
    # One GPU at a time.
    assert plan("layers", 8).efficiency < 1 / 8


def test_packs_and_ranks_without_any() -> None:
    assert [(found.packs, found.pairs) for found in (plan("ZeRO-3", n) for n in (8, 32, 256))] == [
        (2, 8),
        (1, 4),
        (1, 1),
    ]
    assert "128 of 256 GPUs idle" in plan("ZeRO-3", 256).breaks_first()
    assert plan("ZeRO-3", 256).efficiency < 0.5
    assert plan("ZeRO-3", 256, batch=2048).efficiency > 0.9
    assert plan("DDP", 8).breaks_first().startswith("memory")


def test_the_page_is_what_the_script_writes() -> None:
    text = (cli.REPOSITORY / "docs" / "scaling.md").read_text()
    assert scaling.page(text) == text, "python benchmarks/scaling_plan.py --write"
    without = re.sub(r"(<!-- table: .* -->\n)(\|.*\n)+", r"\1", text)
    assert len(without) < len(text) / 2
    assert scaling.page(without) == text
    assert text.split("\n\n")[1].startswith("**Nothing on this page is measured.**")
    assert (cli.REPOSITORY / "docs" / "scaling.png").is_file()
