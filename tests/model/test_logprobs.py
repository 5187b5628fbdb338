"""The fused head against a naive one: values, gradients, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from open_po.model import logprobs
from open_po.model.logprobs import Head, fused_logprobs
from tests.naive import gradients, make, naive_logprobs

CASES = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"scale": 0.25, "bias": True},
    {"softcap": 3.0, "scale": 2.0, "bias": True},
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 words, so that 101 words make seven, of which the first two are kept."""
    monkeypatch.setattr(logprobs, "_BLOCK_BYTES", {"cpu": 1})
    monkeypatch.setattr(logprobs, "_LEAST_COLUMNS", 16)
    monkeypatch.setattr(logprobs, "_KEPT_BYTES", 2 * 37 * 16 * 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_equal_naive(case: dict[str, Any], dtype: torch.dtype) -> None:
    states, weight, bias = make(37, 24, 101, dtype, case.get("bias", False))
    head = Head(weight, bias, case.get("softcap"), case.get("scale", 1.0))
    if dtype == torch.float64:
        head = replace(head, weight=weight.double(), bias=None if bias is None else bias.double())
    targets = torch.randint(0, 101, (37,))
    got, got_grads = gradients(lambda *a: fused_logprobs(*a, use_liger=False), states, head, targets)
    expected, expected_grads = gradients(naive_logprobs, states, head, targets)
    assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
    assert len(got_grads) == len(expected_grads) >= 2
    for mine, theirs in zip(got_grads, expected_grads, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES[:3])
def test_bfloat16_blocks_stay_within_a_percent_of_float32(case: dict[str, Any]) -> None:
    states, weight, bias = make(200, 64, 500, torch.bfloat16, case.get("bias", False))
    head = Head(weight, bias, case.get("softcap"))
    targets = torch.randint(0, 500, (200,))
    got, got_grads = gradients(lambda *a: fused_logprobs(*a, use_liger=False), states, head, targets)
    exact = states.detach().float().requires_grad_()
    expected, expected_grads = gradients(naive_logprobs, exact, head, targets)
    assert got.dtype == torch.float32
    assert (got.sum() - expected.sum()).abs() <= 1e-2 * expected.sum().abs()
    for mine, theirs in zip(got_grads, expected_grads, strict=True):
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.usefixtures("small_blocks")
def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    states, weight, _ = make(37, 24, 101, torch.float32, bias=False)  # the first pass uses up the blocks that were kept
    values = fused_logprobs(states, Head(weight), torch.randint(0, 101, (37,)), use_liger=False)
    first = torch.autograd.grad(values.sum(), [states, weight], retain_graph=True)
    second = torch.autograd.grad(values.sum(), [states, weight])
    torch.testing.assert_close(first, second)


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_gradients_of_the_states_add_up_in_float32() -> None:
    states, weight, _ = make(37, 24, 8192, torch.bfloat16, bias=False)  # 512 blocks
    targets = torch.randint(0, 8192, (37,))
    exact = states.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(fused_logprobs(states, Head(weight), targets, use_liger=False).sum(), [states])
    (expected,) = torch.autograd.grad(naive_logprobs(exact, Head(weight), targets).sum(), [exact])
    assert (got.float() - expected).norm() <= 4e-3 * expected.norm()  # 2^-8: rounded once


@pytest.mark.usefixtures("small_blocks")
def test_words_ruled_out_by_an_infinite_bias_add_nothing() -> None:
    states, weight, bias = make(37, 24, 101, torch.float32, bias=True)
    with torch.no_grad():
        bias[:40] = -torch.inf  # two blocks of 16 and part of the third
    targets = torch.randint(40, 101, (37,))
    head = Head(weight, bias.detach())
    got, got_grads = gradients(lambda *a: fused_logprobs(*a, use_liger=False), states, head, targets)
    expected, expected_grads = gradients(naive_logprobs, states, head, targets)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_grads, expected_grads)


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    states, weight, _ = make(20, 8, 50, torch.float32, bias=False)
    targets = torch.randint(0, 50, (20,))
    frozen = Head(weight.detach())
    (got,) = torch.autograd.grad(fused_logprobs(states, frozen, targets, use_liger=False).sum(), [states])
    (expected,) = torch.autograd.grad(naive_logprobs(states, frozen, targets).sum(), [states])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_liger", [False, True])
def test_no_tokens(use_liger: bool) -> None:
    states, weight, _ = make(0, 8, 50, torch.float32, bias=False)
    values = fused_logprobs(states, Head(weight), torch.zeros(0, dtype=torch.int64), use_liger=use_liger)
    assert values.shape == (0,)
    values.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


_INTERPRETED = """
import torch
from tests.naive import gradients
from tests.naive import make
from tests.naive import naive_logprobs
from open_po.model.logprobs import Head, fused_logprobs
for bias in (False, True):
    for scale in (1.0, 0.5):
        states, weight, offset = make(19, 16, 67, torch.float32, bias)
        head, targets = Head(weight, offset, None, scale), torch.randint(0, 67, (19,))
        got, got_grads = gradients(lambda *a: fused_logprobs(*a, use_liger=True), states, head, targets)
        expected, expected_grads = gradients(naive_logprobs, states, head, targets)
        assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
        for mine, theirs in zip(got_grads, expected_grads, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
print("equal")
"""


def test_liger_through_the_triton_interpreter() -> None:
    """The kernel that CUDA runs. Soft-capping, which the interpreter cannot do, is in tests/gpu."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr


# ------------------------------------------------------------------------------------------------------------ memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages alive besides those of `inputs`; `peak` is the most at any time."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self._watch(item.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(function: Callable[..., Tensor], tokens: int, vocabulary: int) -> int:
    """Most bytes alive in a forward and backward pass, besides its inputs."""
    with FakeTensorMode():  # shapes and lifetimes are real, memory and arithmetic are not: 17 GB fit in a test
        states = torch.empty(tokens, 64, requires_grad=True)
        weight = torch.empty(vocabulary, 64, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
        with LiveBytes(states, weight, targets) as live:
            torch.autograd.grad(function(states, Head(weight), targets).sum(), [states, weight])
    return live.peak


def chunks_without_recomputation(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    rows = zip(hidden.split(256), targets.split(256), strict=True)
    return torch.cat([naive_logprobs(states, head, wanted) for states, wanted in rows])


def checkpointed_chunks(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    rows = zip(hidden.split(256), targets.split(256), strict=True)
    parts = [checkpoint(naive_logprobs, states, head, wanted, use_reentrant=False) for states, wanted in rows]
    return torch.cat(parts)


def grows_with_tokens_times_vocabulary(function: Callable[..., Tensor]) -> bool:
    """Whether four times the tokens need more memory by a share of the logits that they add."""
    for vocabulary in (16_384, 131_072):
        growth = peak_bytes(function, 8192, vocabulary) - peak_bytes(function, 2048, vocabulary)
        if growth > 0.05 * 6144 * vocabulary * 4:
            return True
    return False


@pytest.mark.slow
def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    assert not grows_with_tokens_times_vocabulary(lambda *a: fused_logprobs(*a, use_liger=False))


@pytest.mark.parametrize("function", [naive_logprobs, chunks_without_recomputation])
def test_the_memory_test_notices_heads_that_keep_logits(function: Callable[..., Tensor]) -> None:
    assert grows_with_tokens_times_vocabulary(function)


def test_the_memory_test_accepts_another_head_that_recomputes() -> None:
    assert not grows_with_tokens_times_vocabulary(checkpointed_chunks)


def test_without_gradients_one_block_at_a_time_is_held() -> None:
    """Also where the weights ask for gradients, as a policy's do while it is its own reference."""
    vocabulary, tokens = 131_072, 2048
    with FakeTensorMode():
        states, weight = torch.empty(tokens, 64), torch.empty(vocabulary, 64, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
        with torch.no_grad(), LiveBytes(states, weight, targets) as live:
            fused_logprobs(states, Head(weight), targets, use_liger=False)
    block = 4 * tokens * logprobs._LEAST_COLUMNS
    assert block <= live.peak <= 1.2 * block


def test_peak_is_the_kept_blocks_and_the_weight_gradient() -> None:
    vocabulary, tokens = 131_072, 8192
    peak = peak_bytes(lambda *a: fused_logprobs(*a, use_liger=False), tokens, vocabulary)
    weight_gradient, states = vocabulary * 64 * 4, tokens * 64 * 4
    assert peak <= logprobs._KEPT_BYTES + weight_gradient + 3 * states
