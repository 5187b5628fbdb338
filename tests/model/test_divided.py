"""A model that the ranks divide: its log-probs are those of the whole one, and no rank ever holds it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_po.config import ModelConfig, load_config
from open_po.data.tokenizer import load_tokenizer
from open_po.distributed.runtime import Runtime
from open_po.model import export
from open_po.model.divided import HollowModel
from open_po.model.export import exported_weights
from open_po.model_files import ModelSource
from open_po.packing import pack
from tests import cli, tiny
from tests.distributed.test_runtime import on_two_ranks
from tests.scoring import FLOAT32, PAIRS, load

# Weights of 16 layers, an embedding and a head, next to which activations are small
SGD = {"optimizer": "sgd"}
WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 16}


def tensor_bytes() -> int:
    """What all tensors of this process take, each memory counted once."""
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, Tensor) and not item.is_meta:
            local: Any = item._local_tensor if hasattr(item, "_local_tensor") else item
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_log_probs_are_those_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", architecture)
    batch = pack(PAIRS, layout="rows", pad_token_id=2)
    whole = load(folder)
    with whole.as_reference():
        expected = whole.token_logprobs(batch)

    def body(runtime: Runtime, rank: int) -> float:
        scorer = HollowModel(ModelSource(name=str(folder)), FLOAT32, runtime).divided()
        with scorer.as_reference():
            got = scorer.token_logprobs(batch)
            own = scorer.own_logprobs(pack(PAIRS[:1], layout="rows", pad_token_id=2, with_rejected=False))
        assert torch.allclose(own, got[: len(own)], atol=1e-4)
        return float((got - expected).abs().max())

    assert all(difference <= 1e-5 for difference in on_two_ranks(tmp_path, body))


def test_no_rank_holds_more_than_its_share_and_what_is_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", **WIDE)
    batch = pack(PAIRS, layout="rows", pad_token_id=2)
    weights = cli.weights(folder)
    whole = sum(weight.nbytes for weight in weights.values())
    layer = sum(weight.nbytes for name, weight in weights.items() if ".layers.0." in name)
    around = whole - 16 * layer  # embedding and head
    weights.clear()

    def body(runtime: Runtime, rank: int) -> dict[str, int]:
        gc.freeze()  # what was there before is not counted
        peaks = {"loading": 0, "scoring": 0, "exporting": 0}

        def note(what: str) -> None:
            peaks[what] = max(peaks[what], tensor_bytes())

        sent = HollowModel._sent

        def noted(self: HollowModel, value: Tensor, name: str | None) -> Tensor:
            found = sent(self, value, name)
            note("loading")
            return found

        HollowModel._sent = noted  # type: ignore[method-assign]
        scorer = HollowModel(ModelSource(name=str(folder)), FLOAT32, runtime).divided()
        for each in scorer.decoder_layers():
            each.register_forward_hook(lambda *_: note("scoring"))
        with scorer.as_reference():
            scorer.token_logprobs(batch)
        for _ in exported_weights(scorer, torch.float32):
            note("exporting")
        return peaks

    for peaks in on_two_ranks(tmp_path, body):
        # What is gathered is there twice for a moment: as it was sent, and as weights.
        assert whole / 2 < peaks["loading"] <= whole / 2 + 2 * max(layer, around)
        assert whole / 2 < peaks["scoring"] <= whole / 2 + 2 * (layer + around) + 50_000
        assert whole / 2 < peaks["exporting"] <= whole / 2 + 2 * (layer + around) + 50_000
        assert max(peaks.values()) < 0.75 * whole, "the model is too small for this to show anything"


def test_a_disk_that_fills_while_a_model_is_saved_leaves_no_rank_waiting(
    tmp_path: Path, disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", **WIDE)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(folder)))
    small = disk("1m")
    monkeypatch.setattr(export, "_SHARD_BYTES", 100_000)  # the fault comes early

    def body(runtime: Runtime, rank: int) -> str | None:
        scorer = HollowModel(ModelSource(name=str(folder)), FLOAT32, runtime).divided()
        try:
            export.export_model(scorer, torch.float32, tokenizer, small if rank == 0 else None)
        except Exception as error:
            return str(error)
        return None

    refused, other = on_two_ranks(tmp_path, body)
    assert refused is not None
    assert "No space left" in refused
    assert other is None


def test_what_files_call_otherwise_is_read_by_transformers(tmp_path: Path) -> None:
    """Mixtral's experts lie one by one in its files, and together in memory."""
    folder = tiny.make_model_folder(tmp_path / "model", "mixtral")

    def body(runtime: Runtime, rank: int) -> bool:
        scorer = HollowModel(ModelSource(name=str(folder)), FLOAT32, runtime).divided()
        expected = dict(load(folder).base.named_parameters())
        return all(
            torch.equal(scorer.placement.whole(parameter), expected[name])
            for name, parameter in scorer.base.named_parameters()
        )

    assert on_two_ranks(tmp_path, body) == [True, True]


@pytest.mark.parametrize(("room", "fields", "kind"), [(1.5, {}, "ddp"), (1.2, {}, "fsdp"), (1.2, SGD, "ddp")])
def test_an_engine_that_nobody_asked_for_is_one_that_fits(
    room: float, fields: dict[str, str], kind: str, llama: Path, tmp_path: Path
) -> None:
    """AdamW wants 16 bytes of a parameter and plain SGD 8, of three quarters of what there is."""
    parameters = sum(weight.numel() for weight in cli.weights(llama).values())
    config = load_config(cli.arguments(llama, tmp_path / "pairs.jsonl", tmp_path / "run", **fields))

    def body(runtime: Runtime, rank: int) -> str:
        HollowModel._room = lambda self: int(room * 16 * parameters)  # type: ignore[method-assign]
        assert runtime.parallelism.is_free
        return HollowModel(ModelSource(name=str(llama)), FLOAT32, runtime).settle(config).parallelism.kind

    assert on_two_ranks(tmp_path, body) == [kind, kind]
