"""Where the time of a training step's forward and backward pass goes, on a CPU.

    python benchmarks/step_profile.py [--prompt 125] [--response 45] [--pairs 5] [--vocabulary 16384]

One pack of random pairs through the random Llama of `benchmarks/against_trl` (6 layers x 384, float32), under torch's
profiler: shares of the time by kind of operation, and the useful FLOP/s. The profiler itself costs a few percent, so
the step is timed without it as well.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter

import torch
from matmul_rate import matmul_rate
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM
from workloads import Shape, Workload, useful_flops

from open_po.data import PreferencePair
from open_po.model.layout_check import choose_layout
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.packing import pack

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
    for name, default in (("prompt", 125), ("response", 45), ("pairs", 5), ("vocabulary", 16_384), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    prompt, response = arguments.prompt, arguments.response
    shape = Shape(hidden=384, layers=6, heads=6, kv_heads=6, intermediate=1024, vocabulary=arguments.vocabulary)

    def lengths(rng: random.Random, scale: float) -> tuple[int, int, int]:
        return prompt, response, response

    workload = Workload(
        name="profile", about="", shape=shape, lengths=lengths, pairs=arguments.pairs, longest=2 * (prompt + response)
    )
    ids = workload.draw(seed=0)
    torch.manual_seed(0)
    numerics = Numerics(compute_dtype=torch.float32, weights_dtype=torch.float32, use_liger=False)
    scorer = Scorer(LlamaForCausalLM(shape.config()), numerics, {})
    pairs = [PreferencePair(*pair) for pair in ids]
    longest = prompt + response
    print(choose_layout(scorer, pairs[:1], "on", longest=longest, pad=0).describe())
    scorer.train()
    batch = pack(pairs, layout="shared", pad_token_id=0)

    def step() -> float:
        scorer.zero_grad()
        start = time.perf_counter()
        logps = scorer.score(batch).logps
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
    device = torch.device("cpu")
    rate = matmul_rate(shape, len(batch.input_ids), len(batch.target_ids), device, torch.float32)
    median = statistics.median(seconds)
    useful = useful_flops(shape, ids) / median
    print(
        f"{arguments.pairs} pairs, {prompt} + {response} + {response} tokens, vocabulary {arguments.vocabulary:,}, "
        f"{torch.get_num_threads()} threads: {median * 1e3:.0f} ms (fastest {min(seconds) * 1e3:.0f}), "
        f"{useful / 1e9:.0f} useful GFLOP/s, {useful / rate:.0%} of the matmul rate of {rate / 1e9:.0f}\n"
    )
    print("| kind | share of the time |\n|---|---|")
    for kind, time_spent in spent.most_common():
        print(f"| {kind} | {time_spent / spent.total():.1%} |")


if __name__ == "__main__":
    main()
