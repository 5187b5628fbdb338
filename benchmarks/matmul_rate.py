"""How fast this machine multiplies matrices of a model's own shapes; a program of its own, too."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from workloads import Shape

SECONDS_PER_PRODUCT = 0.12


def products(
    tokens: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype
) -> list[Callable[[], Any]]:
    """A linear layer's three products: forward, gradient of the input, gradient of the weight."""
    x, y, w = (
        torch.randn(shape, device=device, dtype=dtype)
        for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs))
    )
    x_grad, y_out, w_grad = torch.empty_like(x), torch.empty_like(y), torch.empty_like(w)
    return [
        lambda: torch.mm(x, w.t(), out=y_out),
        lambda: torch.mm(y, w, out=x_grad),
        lambda: torch.mm(y.t(), x, out=w_grad),
    ]


def seconds_of(product: Callable[[], Any], device: torch.device) -> float:
    """Mean seconds of one product, after one that is not counted."""

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            product()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once = run(1) and run(2) / 2
    times = max(2, int(SECONDS_PER_PRODUCT / once))
    return run(times) / times


def matmul_rate(shape: Shape, tokens: int, scored: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s over all products of a training step of `tokens` packed tokens of which `scored` go through the head."""
    flops = seconds = 0.0
    layer = [(tokens, inputs, outputs, shape.layers) for inputs, outputs in shape.linears().values()]
    for rows, inputs, outputs, times in [*layer, (scored, shape.hidden, shape.vocabulary, 1)]:
        for product in products(rows, inputs, outputs, device, dtype):
            flops += times * 2.0 * rows * inputs * outputs
            seconds += times * seconds_of(product, device)
    return flops / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "job",
        type=json.loads,
        help='JSON: {"shape": fields of Shape, "tokens": of a pack, "scored": of them, "device": "cpu" or "cuda"}',
    )
    job = parser.parse_args().job
    device = torch.device(job["device"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(json.dumps({"flops": matmul_rate(Shape(**job["shape"]), job["tokens"], job["scored"], device, dtype)}))


if __name__ == "__main__":
    main()
