"""A head whose vocabulary two ranks divide: log-probs and gradients of the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from open_po.distributed.runtime import Runtime
from open_po.distributed.vocabulary import VocabularyShards
from open_po.model.logprobs import Head, fused_logprobs
from tests.distributed.test_runtime import on_two_ranks
from tests.naive import gradients, make, naive_logprobs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [64, 1400])
def test_values_and_gradients_are_those_of_the_whole_head(
    vocabulary: int, softcap: float | None, bias: bool, tmp_path: Path
) -> None:
    states, weight, offset = make(37, 16, vocabulary, torch.float32, bias)
    targets = torch.randint(0, vocabulary, (37,), generator=torch.Generator().manual_seed(1))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    expected, (of_states, of_weight, *of_bias) = gradients(
        naive_logprobs, states, Head(weight, offset, softcap), targets
    )
    half = vocabulary // 2

    def body(runtime: Runtime, rank: int) -> list[float]:
        mine = slice(rank * half, (rank + 1) * half)
        group = torch.distributed.group.WORLD
        assert group is not None
        shards = VocabularyShards(group)
        leaves = [states, weight[mine], None if offset is None else offset[mine]]
        hidden, part, part_bias = (leaf if leaf is None else leaf.detach().requires_grad_() for leaf in leaves)
        assert hidden is not None
        assert part is not None
        got = fused_logprobs(hidden, Head(part, part_bias, softcap), targets, use_liger=False, shards=shards)
        slopes = torch.linspace(0.5, 2.0, len(got))
        (got * slopes).sum().backward()
        differences = [got - expected]
        whole = [states.detach().requires_grad_(), weight.detach().requires_grad_()]
        (naive_logprobs(whole[0], Head(whole[1], offset, softcap), targets) * slopes).sum().backward()
        for mine_grad, theirs in ((hidden.grad, whole[0].grad), (part.grad, whole[1].grad[mine])):  # type: ignore[index]
            assert mine_grad is not None
            assert theirs is not None
            differences.append((mine_grad - theirs) / theirs.norm())
        return [float(difference.abs().max()) for difference in differences]

    for values, of_hidden, of_part in on_two_ranks(tmp_path, body):
        assert values <= 1e-5
        assert of_hidden <= 1e-5
        assert of_part <= 1e-5
    assert of_states.shape == states.shape
    assert of_weight.shape == weight.shape
    assert len(of_bias) == bias
