"""Training steps on one GPU: pairs/s, share of the card's matmul rate, peak memory, by layout and kernels.

    python benchmarks/gpu.py [--tiny] [--out benchmarks/results/gpu_CARD.md]

A random Llama of about 1B parameters trains on random pairs in bfloat16 with float32 weights, DPO against its own
starting weights. Settings alternate within one process, three rounds each; a setting's time counts only if its summed
log-probs agree with the others' to 1%. `--tiny` runs the same code on a small model, on a CPU too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from open_po.data import PreferencePair
from open_po.losses import Counts, Loss, PairLogps, loss_spec
from open_po.model import Numerics, Scorer, apply_liger, checkpoint_gradients
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


def make_pairs(count: int, prompt: int, response: int, vocabulary: int) -> list[PreferencePair]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [PreferencePair(ids(prompt), ids(response), ids(response)) for _ in range(count)]


def make_scorer(setting: Setting, config: LlamaConfig, device: torch.device) -> Scorer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(config)).to(device)  # a layout changes its attention
    if setting.liger:
        apply_liger(model)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    numerics = Numerics(compute_dtype=compute, weights_dtype=torch.float32, use_liger=setting.liger)
    scorer = Scorer(model, numerics, {}).train()
    if setting.checkpointing:
        checkpoint_gradients(scorer)
    scorer.use_layout(setting.layout)
    return scorer


def train_step(scorer: Scorer, optimizer: torch.optim.Optimizer, batch: PackedBatch) -> float:
    """Forward, DPO loss, backward, update; returns the sum of the chosen log-probs before the update."""
    loss = Loss(loss_spec("dpo"), loss_spec("dpo").resolve({}))
    policy = scorer(batch)
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


def matmul_rate(device: torch.device, size: int) -> float:
    """Dense matmul FLOP/s of the device in the dtype that training computes in."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronise(device)
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def useful_flops(config: LlamaConfig, scorer: Scorer, pairs: list[PreferencePair]) -> float:
    """6 x body parameters x distinct tokens + 6 x head parameters x scored tokens; attention and recomputation not."""
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in scorer.parameters()) - 2 * head
    read = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    scored = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    return 6.0 * body * read + 6.0 * head * scored


def measure(setting: Setting, config: LlamaConfig, pairs: list[PreferencePair], device: torch.device) -> list[float]:
    """[seconds per step, FLOP/s, peak bytes, summed chosen log-probs] of one setting in one round."""
    scorer = make_scorer(setting, config, device)
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
    return [seconds, useful_flops(config, scorer, pairs) / seconds, peak, logps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("no CUDA device; --tiny runs the same code on a small model")
    hidden, layers, vocabulary = (64, 2, 512) if arguments.tiny else (2048, 16, 128_256)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=max(1, hidden // 256),
    )
    pairs = make_pairs(4, *((16, 16) if arguments.tiny else (1024, 1024)), vocabulary)
    rate = matmul_rate(device, 256 if arguments.tiny else 8192)
    settings = SETTINGS
    if device.type == "cpu":
        settings = tuple(dict.fromkeys(replace(setting, liger=False) for setting in SETTINGS))
    results: dict[Setting, list[list[float]]] = {setting: [] for setting in settings}
    for _ in range(3):
        for setting in settings:
            results[setting].append(measure(setting, config, pairs, device))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    text = "\n".join(table(results, pairs, rate, name)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def table(results: dict[Setting, list[list[float]]], pairs: list[PreferencePair], rate: float, name: str) -> list[str]:
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
        speeds = [len(pairs) / round_[0] for round_ in rounds]
        share = statistics.median(round_[1] for round_ in rounds) / rate
        lines.append(
            f"| {setting} | {statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f}) | {share:.0%} "
            f"| {max(round_[2] for round_ in rounds) / 1e9:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
