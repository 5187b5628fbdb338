"""The last layer for scored tokens only: what it must see, its attention, and what it does not compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from open_po.model import attention, last_layer
from open_po.model.activations import checkpoint_gradients
from open_po.model.attention import KeysTaken, MissingSegments, Segments, TakeKeys, packed_attention
from open_po.model.last_layer import decoder_layer
from open_po.model.layout_check import LayoutTrial, _worse
from open_po.packing import LastLayer, PackedBatch, Segment, pack
from tests import tiny
from tests.naive import CPU, assert_equal, batch_of, heads, inputs, layouts, lengths, naive_attention, windows
from tests.packs import seen_from
from tests.scoring import ALL, BFLOAT16, LAYOUTS, assert_right, choose, load, truth


def of(batch: PackedBatch) -> LastLayer:
    assert batch.last_layer is not None
    return batch.last_layer


# -------------------------------------------------------------------------------------------------------------- index


@given(lengths, layouts)
@settings(max_examples=150, deadline=None)
def test_every_scored_token_sees_what_it_saw(groups: list[tuple[int, list[int]]], layout: Any) -> None:
    batch = batch_of(groups, layout)
    last = of(batch)
    assert last.scored_index.tolist() == sorted(set(batch.score_index.tolist()))
    assert last.scored_index[last.score_index].tolist() == batch.score_index.tolist()
    assert not set(last.context_index.tolist()) & set(last.scored_index.tolist())
    given = torch.cat([last.context_index, last.scored_index])  # where in the pack the tokens are whose keys there are
    tokens = given[last.key_order].tolist()
    assert tokens == sorted(tokens)
    query = 0
    for segment, queries in zip(last.segments, last.query_lengths, strict=True):
        for end in range(segment.end - queries, segment.end):
            seen = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, end + 1)]
            position = int(last.scored_index[query])
            assert [tokens[place] for place in seen] == seen_from(batch, position)
            query += 1
    assert query == len(last.scored_index)
    assert [segment.start for segment in last.segments] == [0, *(s.end for s in last.segments[:-1])]
    assert last.segments[-1].end == len(tokens)


def test_index_by_hand() -> None:
    batch = batch_of([(3, [2, 1, 3])], "shared")  # tokens 0 1 2 | 3 4 | 5 | 6 7 8
    last = of(batch)
    assert batch.segments == (Segment(0, 5, 0, 0), Segment(5, 6, 0, 3), Segment(6, 9, 0, 3))
    assert last.scored_index.tolist() == [2, 3, 6, 7]  # 4, 5 and 8 end responses: they predict nothing
    assert last.context_index.tolist() == [0, 1]
    assert last.segments == (Segment(0, 4, 0, 0), Segment(4, 6, 0, 3))
    assert last.query_lengths == (2, 2)
    assert batch_of([(3, [2])], "rows").last_layer is None


def test_scored_prompts_leave_nothing_out_but_ends() -> None:
    batch = pack(ALL[:3], layout="shared", pad_token_id=2, with_prompt=True)
    assert len(of(batch).context_index) == 0
    assert len(of(batch).scored_index) == len(batch.input_ids) - batch.num_responses + len(ALL[:3])  # 3 are prompts


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kernel", ["sdpa", "products", "flash"])
@given(groups=lengths, layout=layouts, heads=heads, window=windows)
@settings(max_examples=40, deadline=None)
def test_attention_of_the_scored_tokens(
    kernel: str, groups: list[tuple[int, list[int]]], layout: Any, heads: tuple[int, int], window: int | None
) -> None:
    from tests.naive import stand_in

    batch = batch_of(groups, layout)
    last, tensors = of(batch), inputs(batch, heads)
    query, key, value = tensors
    context = [x.index_select(2, last.context_index) for x in (key, value)]
    segments = Segments(
        last.segments,
        CPU,
        last.query_lengths,
        context=(context[0], context[1]) if len(last.context_index) else None,
        key_order=last.key_order,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", stand_in)
        patch.setattr(attention, "_FLASH_HAS_GQA", True)
        patch.setattr(attention, "_flash_takes", lambda query, value: kernel == "flash")
        cap = {"softcap": 3.0} if kernel == "products" else {}
        own = (x.index_select(2, last.scored_index) for x in tensors)
        got, _ = packed_attention(nn.Identity(), *own, None, segments=segments, sliding_window=window, **cap)
    expected = naive_attention(batch, query, key, value, window=window, **cap).index_select(1, last.scored_index)
    assert_equal(got, expected, tensors)


def test_keys_and_values_are_handed_out_before_anything_is_attended_to() -> None:
    key, value = torch.randn(2, 1, 4, 3, 8)
    with attention.count_calls() as calls, pytest.raises(KeysTaken) as found:
        packed_attention(nn.Identity(), torch.randn(1, 4, 3, 8), key, value, None, segments=TakeKeys())
    assert found.value.key is key
    assert found.value.value is value
    assert calls == []


def test_keys_of_other_tokens_are_refused() -> None:
    """As a layer that shares the keys of an earlier one would have, which was not cut."""
    batch = batch_of([(3, [2, 2])], "shared")
    query, key, value = inputs(batch, (1, 1))
    last = of(batch)
    segments = Segments(last.segments, CPU, last.query_lengths, context=(key, value), key_order=last.key_order)
    own = query.index_select(2, last.scored_index)
    with pytest.raises(MissingSegments, match="keys of other tokens"):
        packed_attention(nn.Identity(), own, key, value, None, segments=segments)


# -------------------------------------------------------------------------------------------------------- whole models


def tokens_of(module: nn.Module, seen: list[int]) -> None:
    module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-2]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_skips_what_nothing_is_predicted_from(tmp_path: Path, checkpointing: bool) -> None:
    tiny.make_model(tmp_path, "llama", num_hidden_layers=3)
    scorer = load(tmp_path).train()
    choose(scorer)
    if checkpointing:
        checkpoint_gradients(scorer)
    layers: list[list[int]] = [[], [], []]
    for layer, seen in zip(scorer.base.base_model.layers, layers, strict=True):
        tokens_of(layer.mlp, seen)
    batch = pack(ALL, layout="shared", pad_token_id=2)
    logps = scorer.score(batch).logps
    everything, scored = len(batch.input_ids), len(set(batch.score_index.tolist()))
    assert layers == [[everything], [everything], [scored]]
    assert scored < 0.6 * everything
    logps.chosen.sum().backward()
    assert set(layers[2]) == {scored}


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "phi"])
def test_it_can_be_switched_off(architecture: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture, **tiny.SHARING[architecture])
    scorer = load(tmp_path).train()
    choose(scorer)
    assert scorer.last_layer_is_short
    scorer.shorten_last_layer(None)
    assert not scorer.last_layer_is_short
    assert_right(scorer, LAYOUTS[:2], truth(tmp_path))


def rotations_left_alone(value: Any, index: Tensor, tokens: int) -> Any:
    """Cuts the hidden states, but not the rotations that belong to them."""
    if isinstance(value, Tensor) and value.shape[:2] == (1, tokens):
        return value.index_select(1, index)
    if isinstance(value, tuple) and len(value) == 2:
        return tuple(item[:, : len(index)] for item in value)
    if isinstance(value, tuple):
        return tuple(rotations_left_alone(item, index, tokens) for item in value)
    return (
        {name: rotations_left_alone(item, index, tokens) for name, item in value.items()}
        if isinstance(value, dict)
        else value
    )


def test_a_model_that_it_does_not_suit_computes_its_last_layer_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_model(tmp_path, "llama")
    scorer = load(tmp_path).train()
    monkeypatch.setattr(last_layer, "_select", rotations_left_alone)
    choice = choose(scorer)
    assert choice.layout == "shared"
    assert not scorer.last_layer_is_short
    assert str(choice.whole_last_layer).startswith("scores are off by ")
    assert "; the last layer computes every token: scores are off by " in choice.describe()
    assert choice.refused == {}
    assert_right(scorer, ["shared"], truth(tmp_path))
    monkeypatch.undo()
    assert choose(scorer).whole_last_layer is None
    assert scorer.last_layer_is_short


def test_a_short_last_layer_must_be_about_as_close_as_the_whole_one(tmp_path: Path) -> None:
    """In bfloat16 the tolerance of 0.1 nats a token would let a wrong layer pass."""
    tiny.make_model(tmp_path, "llama")
    scorer = load(tmp_path, BFLOAT16)
    assert _worse(LayoutTrial(None, 0.013), LayoutTrial(None, 0.002), scorer) is None
    assert _worse(LayoutTrial(None, 0.05), LayoutTrial(None, 0.002), scorer) == (
        "scores are off by 0.05 nats a token, by 0.002 otherwise"
    )


def test_the_layer_of_an_attention_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Identity()])
            self.attention = nn.Identity()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.attention = nn.Identity()

    model = Model()
    assert decoder_layer(model, model.layers[1].attention) is model.layers[1]  # type: ignore[arg-type]
    assert decoder_layer(model, model.attention) is None
    assert decoder_layer(model, nn.Identity()) is None
