"""Resident memory of the fused head on a CPU: it must not grow with tokens x vocabulary.

    python benchmarks/head_memory.py [--out benchmarks/results/head_memory.md]

Every figure is the growth of the peak resident memory of a fresh process over a forward and backward pass (hidden size
256, float32), for the fused head and for the naive one (logits, log_softmax, gather). The weight's own gradient
(vocabulary x 256 x 4 bytes) is part of both.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
from pathlib import Path

HIDDEN = 256
TOKENS, VOCABULARIES = (2048, 8192), (16_384, 131_072)


def measure(kind: str, tokens: int, vocabulary: int) -> int:
    """Bytes by which one pass raises this process's peak resident memory."""
    import torch

    from open_po.model.logprobs import Head, fused_logprobs

    def naive(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        return (hidden @ head.weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def fused(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        return fused_logprobs(hidden, head, targets, use_liger=False)

    function = {"fused": fused, "naive": naive}[kind]
    weight = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function(hidden, Head(weight), targets).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def in_fresh_process(kind: str, tokens: int, vocabulary: int) -> int:
    command = [sys.executable, __file__, "--one", kind, str(tokens), str(vocabulary)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        kind, tokens, vocabulary = arguments.one
        print(measure(kind, int(tokens), int(vocabulary)))
        return
    import torch

    lines = [
        f"Peak resident memory of one forward and backward pass of the head, MB (torch {torch.__version__}, "
        f"{platform.machine()} CPU). Made by `python benchmarks/head_memory.py`.",
        "",
        "| head | vocabulary | 2048 tokens | 8192 tokens | growth | logits that 6144 tokens add |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("fused", "naive"):
        for vocabulary in VOCABULARIES:
            if kind == "naive" and vocabulary == max(VOCABULARIES):
                continue  # 13 GB: more than a small machine has
            few, many = (in_fresh_process(kind, tokens, vocabulary) / 1e6 for tokens in TOKENS)
            logits = (TOKENS[1] - TOKENS[0]) * vocabulary * 4 / 1e6
            lines.append(f"| {kind} | {vocabulary} | {few:.0f} | {many:.0f} | {many - few:.0f} | {logits:.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
