"""Where the time of a training step's forward and backward pass goes, on a CPU.

    python benchmarks/step_profile.py [--prompt 125] [--response 45] [--pairs 8] [--vocabulary 16384]

One pack of random pairs through a random Llama of 6 layers x 384 (float32, the model of `benchmarks/against_trl`),
under torch's profiler: shares of the time by kind of operation, and the useful FLOP/s. The profiler itself costs a few
percent, so the step is timed without it as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from open_po.data import PreferencePair
from open_po.model import Numerics, Scorer
from open_po.packing import pack

LAYERS, HIDDEN, INTERMEDIATE, HEADS = 6, 384, 1024, 6
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "copies and fills": ("aten::copy_", "aten::cat", "aten::fill_", "aten::index_select", "aten::embedding"),
    "element by element": (
        *("aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::neg", "aten::pow"),
        *("aten::exp_", "aten::div", "aten::div_", "aten::sum", "aten::mean", "aten::amax", "aten::rsqrt"),
        *("aten::silu", "aten::silu_backward", "aten::gather", "aten::scatter_add_"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompt", 125), ("response", 45), ("pairs", 8), ("vocabulary", 16_384), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    numerics = Numerics(compute_dtype=torch.float32, weights_dtype=torch.float32, use_liger=False)
    scorer = Scorer(LlamaForCausalLM(config), numerics, {})
    scorer.use_layout("shared")

    def ids(length: int) -> list[int]:
        return torch.randint(3, arguments.vocabulary, (length,)).tolist()

    p, r = arguments.prompt, arguments.response
    batch = pack(
        [PreferencePair(ids(p), ids(r), ids(r)) for _ in range(arguments.pairs)], layout="shared", pad_token_id=0
    )

    def step() -> float:
        start = time.perf_counter()
        logps = scorer(batch)
        (logps.chosen - logps.rejected).sum().backward()
        return time.perf_counter() - start

    step()
    seconds = [step() for _ in range(arguments.rounds)]
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(3):
            step()
    spent: Counter[str] = Counter()
    for event in trace.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), "the rest (Python, autograd, views)")
        spent[kind] += event.self_cpu_time_total
    body = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    flops = 6 * body * len(batch.input_ids) + 6 * HIDDEN * arguments.vocabulary * len(batch.target_ids)
    median = statistics.median(seconds)
    print(
        f"{arguments.pairs} pairs, {p} + {r} + {r} tokens, vocabulary {arguments.vocabulary:,}: {median * 1e3:.0f} ms"
    )
    print(f"(fastest {min(seconds) * 1e3:.0f}), {flops / median / 1e9:.0f} useful GFLOP/s without attention's\n")
    print("| kind | share of the time |\n|---|---|")
    for kind, time_spent in spent.most_common():
        print(f"| {kind} | {time_spent / spent.total():.1%} |")


if __name__ == "__main__":
    main()
