"""A model dealt out layer by layer: what goes where, and that what a layer needs follows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import open_po.distributed.layers as layers
from open_po.distributed.layers import LayersPlacement
from open_po.memory_plan import share_out
from open_po.model.attention import Segments
from open_po.packing import pack
from tests import cli
from tests.scoring import PAIRS, load

CPU = torch.device("cpu")


def test_layers_are_shared_out_by_bytes_in_order() -> None:
    assert share_out([10] * 8, 0, 2) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert share_out([10] * 8, 40, 2) == [0, 0, 1, 1, 1, 1, 1, 1]  # embedding and head are on the first
    assert share_out([10] * 8, 0, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert share_out([10, 30], 100, 2) == [1, 1]  # which has enough with them
    numbers = share_out([7] * 80, 30, 8)
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(8))


def test_a_layer_is_called_with_what_is_on_its_device(llama: Path) -> None:
    """The meta device in place of a second GPU: what is not moved to it cannot be computed with what is."""
    hook = layers._Follow(torch.device("meta"))
    segments = Segments([], CPU)
    args, kwargs = hook.inputs(
        nn.Identity(),
        (torch.ones(2),),
        {"position_embeddings": (torch.ones(3), torch.ones(3)), "segments": segments, "mask": None, "use_cache": False},
    )
    assert args[0].is_meta
    assert all(tensor.is_meta for tensor in kwargs["position_embeddings"])
    assert kwargs["segments"].device == torch.device("meta")
    assert kwargs["segments"] is segments.to(torch.device("meta")), "made once for all layers of a device"
    assert (kwargs["mask"], kwargs["use_cache"]) == (None, False)


@pytest.mark.parametrize("layout", ["shared", "rows"])
def test_scores_and_hooks_with_one_device_twice(layout: str, llama: Path) -> None:
    batch = pack(PAIRS, layout=layout, pad_token_id=2)  # type: ignore[arg-type]
    plain, dealt = load(llama), load(llama)
    dealt.place(LayersPlacement(dealt, dealt.decoder_layers(), [CPU, CPU]))
    for scorer in (plain, dealt):
        scorer.use_layout(layout)  # type: ignore[arg-type]
    hooked = [bool(layer._forward_pre_hooks) for layer in dealt.decoder_layers()]
    assert hooked == [True, True], "the embedding and head outweigh two layers"
    assert dealt.decoder_layers()[-1]._forward_hooks
    assert torch.equal(plain.token_logprobs(batch), dealt.token_logprobs(batch))


def test_without_gpus_it_is_refused(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(cli.arguments(llama, pairs_file, tmp_path / "run", parallel="layers")) == 2
    assert capsys.readouterr().err == (
        "config error: parallel: layers deals a model out to the GPUs that a process sees, this one sees 0\n"
    )
