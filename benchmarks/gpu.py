"""Training steps on one GPU: pairs/s, share of the card's matmul rate, peak memory, by layout and kernels.

    python benchmarks/gpu.py [--tiny] [--out benchmarks/results/gpu_CARD.md]

A random Llama of about 1B parameters trains on random pairs in bfloat16 with float32 weights, DPO against its own
starting weights. Settings alternate within one process, three rounds each; a setting's time counts only if its summed
log-probs agree with the others' to 1%. The share counts useful FLOPs only (workloads.py), against products of the
model's own shapes. `--tiny` runs the same code on a small model, on a CPU too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matmul_rate import matmul_rate
from transformers import LlamaForCausalLM
from workloads import Ids, Shape, Workload, around, useful_flops

from open_po.config import Sharing
from open_po.data import PreferencePair
from open_po.losses import Counts, Loss, PairLogps, loss_spec
from open_po.model.activations import checkpoint_gradients
from open_po.model.layout_check import choose_layout
from open_po.model.load import apply_liger
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.packing import Layout, PackedBatch, pack


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    layout: Layout
    liger: bool
    checkpointing: bool

    def __str__(self) -> str:
        kernels = "Liger" if self.liger else "torch"
        return f"{self.layout}, {kernels}{', checkpointing' if self.checkpointing else ''}"


SETTINGS = (
    Setting("shared", True, False),
    Setting("shared", True, True),
    Setting("shared", False, False),
    Setting("unshared", True, False),
    Setting("rows", True, False),
)


def workload(*, tiny: bool) -> Workload:
    if tiny:
        shape = Shape(hidden=64, layers=2, heads=1, kv_heads=1, intermediate=256, vocabulary=512)
        return Workload(name="tiny", about="", shape=shape, lengths=around(16, 16), pairs=4, longest=64)
    shape = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128_256)
    return Workload(name="1B", about="", shape=shape, lengths=around(1024, 512), pairs=6, longest=4096)


def make_scorer(setting: Setting, shape: Shape, pairs: list[PreferencePair], device: torch.device) -> Scorer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape.config()).to(device)
    if setting.liger:
        apply_liger(model)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    numerics = Numerics(compute_dtype=compute, weights_dtype=torch.float32, use_liger=setting.liger)
    scorer = Scorer(model, numerics, {})
    longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    if setting.layout == "rows":
        scorer.use_layout("rows")
    else:
        sharing: Sharing = "on" if setting.layout == "shared" else "off"
        choice = choose_layout(scorer, pairs[:1], sharing, longest=longest, pad=0)
        assert choice.layout == setting.layout, choice.describe()
    if setting.checkpointing:
        checkpoint_gradients(scorer)
    return scorer.train()


def train_step(scorer: Scorer, optimizer: torch.optim.Optimizer, batch: PackedBatch) -> float:
    """Forward, DPO loss, backward, update; returns the sum of the chosen log-probs before the update."""
    loss = Loss(loss_spec("dpo"), loss_spec("dpo").resolve({}))
    policy = scorer.score(batch).logps
    reference = PairLogps(
        chosen=policy.chosen.detach(),
        rejected=policy.rejected.detach(),
        chosen_tokens=policy.chosen_tokens,
        rejected_tokens=policy.rejected_tokens,
    )
    loss(policy, reference).value(Counts.of(policy)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(policy.chosen.detach().sum())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(setting: Setting, shape: Shape, ids: list[Ids], device: torch.device) -> list[float]:
    """[seconds per step, useful FLOP/s, peak bytes, summed chosen log-probs] of one setting in one round."""
    pairs = [PreferencePair(*pair) for pair in ids]
    scorer = make_scorer(setting, shape, pairs, device)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-6)
    batch = pack(pairs, layout=setting.layout, pad_token_id=0)
    logps = train_step(scorer, optimizer, batch)  # also compiles the kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        train_step(scorer, optimizer, batch)
        synchronise(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = statistics.median(times)
    return [seconds, useful_flops(shape, ids) / seconds, peak, logps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("no CUDA device; --tiny runs the same code on a small model")
    load = workload(tiny=arguments.tiny)
    ids = load.draw(seed=0)
    scored = sum(len(chosen) + len(rejected) for _, chosen, rejected in ids)
    tokens = scored + sum(len(prompt) for prompt, _, _ in ids)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matmul_rate(load.shape, tokens, scored, device, dtype)
    settings = SETTINGS
    if device.type == "cpu":
        settings = tuple(dict.fromkeys(replace(setting, liger=False) for setting in SETTINGS))
    results: dict[Setting, list[list[float]]] = {setting: [] for setting in settings}
    for _ in range(3):
        for setting in settings:
            results[setting].append(measure(setting, load.shape, ids, device))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    text = "\n".join(table(results, len(ids), rate, name)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def table(results: dict[Setting, list[list[float]]], pairs: int, rate: float, name: str) -> list[str]:
    """Markdown lines; refuses settings whose log-probs disagree."""
    logps = [round_[3] for rounds in results.values() for round_ in rounds]
    assert max(logps) - min(logps) <= 0.01 * abs(min(logps)), f"the settings did not do the same work: {logps}"
    lines = [
        f"{name}, torch {torch.__version__}; measured matmul rate {rate / 1e12:.1f} TFLOP/s",
        "",
        "| setting | pairs/s, median (min to max) | share of the matmul rate | peak memory, GB |",
        "|---|---|---|---|",
    ]
    for setting, rounds in results.items():
        speeds = [pairs / round_[0] for round_ in rounds]
        share = statistics.median(round_[1] for round_ in rounds) / rate
        lines.append(
            f"| {setting} | {statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f}) | {share:.0%} "
            f"| {max(round_[2] for round_ in rounds) / 1e9:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
