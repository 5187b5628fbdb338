"""The kernels of attention over packs against one another and against a naive one; CUDA's through a stand-in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from open_po.model import attention
from open_po.model.activations import checkpoint_gradients
from open_po.model.attention import MissingSegments, Segments, count_calls, packed_attention
from open_po.packing import pack
from tests import tiny
from tests.naive import CPU, assert_equal, batch_of, heads, inputs, layouts, lengths, naive_attention, stand_in, windows
from tests.scoring import ALL, FLOAT32, LAYOUTS, largest_gradient_error, load, score

Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float | None, int | None], Tensor]


# ------------------------------------------------------------------------------------------------ what they must give


def before_torch_2_12(*arguments: Any, **named: Any) -> Tensor:
    assert "enable_gqa" not in named
    return stand_in(*arguments, **named)


def test_the_stand_in_has_the_signature_of_the_installed_torch() -> None:
    theirs, mine = (inspect.signature(function).parameters for function in (varlen_attn, stand_in))
    assert [(p.name, p.kind) for p in mine.values()][: len(theirs)] == [(p.name, p.kind) for p in theirs.values()]


@pytest.fixture(params=[True, False], ids=["gqa", "torch 2.11"])
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets every attention without soft-cap and sinks go to the stand-in; the tokens of its calls."""
    calls: list[int] = []

    def counted(query: Tensor, *arguments: Any, **named: Any) -> Tensor:
        calls.append(len(query))
        return (stand_in if request.param else before_torch_2_12)(query, *arguments, **named)

    monkeypatch.setattr(attention, "varlen_attn", counted)
    monkeypatch.setattr(attention, "_flash_takes", lambda query, value: query.shape[-1] == value.shape[-1])
    monkeypatch.setattr(attention, "_FLASH_HAS_GQA", request.param)
    return calls


# ------------------------------------------------------------------------------------------------------ random packs


@given(lengths, layouts, heads, windows, st.sampled_from([None, 0.3]))
@settings(max_examples=80, deadline=None)
def test_sdpa_equals_naive(groups: Any, layout: Any, heads: tuple[int, int], window: int | None, scale: Any) -> None:
    batch = batch_of(groups, layout)
    tensors = inputs(batch, heads, values=12)
    got = attention._by_sdpa(*tensors, Segments(batch.segments, CPU), scale, window)
    assert_equal(got, naive_attention(batch, *tensors, scale, window), tensors)


@given(
    lengths,
    layouts,
    heads,
    windows,
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([2, 1024]),
)
@settings(max_examples=80, deadline=None)
def test_products_equal_naive(
    groups: Any,
    layout: Any,
    heads: tuple[int, int],
    window: int | None,
    scale: Any,
    softcap: Any,
    sinks: bool,
    block: int,
) -> None:
    batch = batch_of(groups, layout)
    tensors = inputs(batch, heads, values=12)
    segments = Segments(batch.segments, CPU)
    extra = torch.linspace(-1, 2, heads[0]).requires_grad_() if sinks else None
    with mock.patch.object(attention, "_QUERY_BLOCK", block):
        got = attention._by_products(*tensors, segments, scale, window, softcap, extra)
    leaves = tensors if extra is None else (*tensors, extra)
    assert_equal(got, naive_attention(batch, *tensors, scale, window, softcap, extra), leaves)
    if softcap is None and extra is None:
        again = attention._by_products(*tensors, segments, scale, window, None, None)
        assert_equal(again, attention._by_sdpa(*tensors, segments, scale, window), tensors)


@pytest.mark.parametrize("has_gqa", [True, False])
@given(groups=lengths, layout=layouts, heads=heads, window=windows, scale=st.sampled_from([None, 0.3]))
@settings(max_examples=80, deadline=None)
def test_flash_equals_sdpa(
    has_gqa: bool, groups: Any, layout: Any, heads: tuple[int, int], window: int | None, scale: Any
) -> None:
    batch = batch_of(groups, layout)
    tensors = inputs(batch, heads)
    segments = Segments(batch.segments, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", stand_in if has_gqa else before_torch_2_12)
        patch.setattr(attention, "_FLASH_HAS_GQA", has_gqa)
        got = attention._by_flash(*tensors, segments, scale, window)
    assert_equal(got, attention._by_sdpa(*tensors, segments, scale, window), tensors)
    assert (segments.flash().key_index is None) == (len(batch.segments) == len(groups) or layout == "unshared")


def test_the_flash_index_by_hand() -> None:
    """Prompt of 3 with responses of 2 and 1; prompt of 1 with a response of 2."""
    batch = batch_of([(3, [2, 1]), (1, [2])], "shared")
    index = Segments(batch.segments, CPU).flash()
    assert index.key_index is not None
    assert index.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert index.ends_q.tolist() == [0, 5, 6, 9]
    assert index.ends_k.tolist() == [0, 5, 9, 12]
    assert (index.max_q, index.max_k) == (5, 5)


def test_the_stand_in_notices_wrong_indices(flash: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([(3, [2, 1]), (1, [2])], "shared")
    tensors = inputs(batch, (4, 4))
    segments = Segments(batch.segments, CPU)
    index = segments.flash()
    for field, wrong in (
        ("ends_q", index.ends_q.long()),
        ("ends_k", index.ends_k + 1),
        ("max_q", index.max_q - 1),
        ("max_k", index.max_k + 1),
    ):
        monkeypatch.setattr(segments, "flash", lambda f=field, w=wrong: SimpleNamespace(**{**vars(index), f: w}))
        with pytest.raises(AssertionError):
            attention._by_flash(*tensors, segments, None, None)


# -------------------------------------------------------------------------------------------------- which kernel runs


def tensor_like(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, width: int = 64) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype, shape=(1, 4, 10, width))


@pytest.mark.parametrize(
    ("query", "value", "takes"),
    [
        (tensor_like(), tensor_like(), True),
        (tensor_like(dtype=torch.float16), tensor_like(), True),
        (tensor_like(width=256), tensor_like(width=256), True),
        (tensor_like("cpu"), tensor_like("cpu"), False),
        (tensor_like(dtype=torch.float32), tensor_like(), False),
        (tensor_like(width=264), tensor_like(width=264), False),
        (tensor_like(width=36), tensor_like(width=36), False),
        (tensor_like(width=64), tensor_like(width=128), False),
    ],
)
def test_what_flash_attention_takes(query: Any, value: Any, takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert attention._flash_takes(query, value) == takes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not attention._flash_takes(query, value), "not on cards before Ampere"


@pytest.mark.parametrize(
    ("more", "kernel"),
    [({}, "_by_flash"), ({"softcap": 3.0}, "_by_products"), ({"s_aux": torch.ones(4)}, "_by_products")],
)
def test_softcaps_and_sinks_do_without_flash(
    more: dict[str, Any], kernel: str, flash: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of([(3, [2, 1])], "shared")
    tensors = inputs(batch, (4, 2))
    called: list[str] = []
    for name in ("_by_flash", "_by_products", "_by_sdpa"):
        real = getattr(attention, name)

        def watched(*arguments: Any, name: str = name, real: Any = real) -> Tensor:
            called.append(name)
            result: Tensor = real(*arguments)
            return result

        monkeypatch.setattr(attention, name, watched)
    module = nn.Identity()
    with count_calls() as calls:
        out, _ = packed_attention(module, *tensors, None, segments=Segments(batch.segments, CPU), **more)
    assert called == [kernel]
    assert calls == [module]
    expected = naive_attention(batch, *tensors, softcap=more.get("softcap"), sinks=more.get("s_aux"))
    torch.testing.assert_close(out, expected)


def test_a_model_that_hands_no_segments_down_is_told() -> None:
    tensors = inputs(batch_of([(3, [2])], "shared"), (4, 4))
    with pytest.raises(MissingSegments, match="Identity gives its attention no segments"):
        packed_attention(nn.Identity(), *tensors, None)


def test_autocast_reaches_what_a_rotation_has_left_in_float32(
    flash: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that autocast knows nothing of get one precision, and FlashAttention one that it takes."""
    batch = batch_of([(3, [2, 1])], "shared")
    query, key, value = inputs(batch, (4, 2))
    seen: list[torch.dtype] = []
    monkeypatch.setattr(attention, "_flash_takes", lambda *tensors: seen.extend(x.dtype for x in tensors) or True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed_attention(
            nn.Identity(), query, key, value.bfloat16(), None, segments=Segments(batch.segments, CPU)
        )
    assert flash == [6]
    assert seen == 2 * [torch.bfloat16]
    assert out.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "qwen3"])
def test_a_whole_model_by_flash_equals_sdpa(architecture: str, flash: list[int], tmp_path: Path) -> None:
    """Scores and gradients, with gradient checkpointing off and on."""
    tiny.make_model(tmp_path, architecture, **tiny.SHARING[architecture])
    scorer = load(tmp_path, FLOAT32).train()
    expected, gradients = score(scorer, "rows")
    assert flash == []
    for calls in (2, 4):  # once, and with checkpointing again in the backward pass
        for layout in LAYOUTS[:2]:
            flash.clear()
            got, mine = score(scorer, layout)
            assert flash == calls * [len(pack(ALL, layout=layout, pad_token_id=2).input_ids)]
            assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
            assert largest_gradient_error(mine, gradients) <= 2e-5
        checkpoint_gradients(scorer)
