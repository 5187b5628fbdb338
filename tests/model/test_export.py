"""Exporting a model: what is written is right, and the model in memory does not notice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import open_po.training.run
from open_po.config import ModelConfig
from open_po.data.tokenizer import load_tokenizer
from open_po.model import export as export_module
from open_po.model.export import export_model, exported_weights
from open_po.model.lora import attach_lora
from open_po.model.numerics import Numerics
from open_po.model.prepare import Policy
from open_po.model.scorer import Scorer
from open_po.output.observers import RunObserver
from open_po.packing import pack
from tests import cli, tiny
from tests.scoring import FLOAT32, PAIRS, as_matrix, load

BFLOAT16_WEIGHTS = Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.bfloat16, use_liger=False)
DTYPES = [torch.float32, torch.bfloat16]


def lora(folder: Path, numerics: Numerics = FLOAT32) -> Scorer:
    """A model with random adapters on every linear layer but the head."""
    scorer = load(folder, numerics)
    settings: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
    attach_lora(
        scorer,
        ModelConfig(model_name_or_path=str(folder), use_lora=True, lora_target_modules=["all-linear"], **settings),
    )
    torch.manual_seed(0)
    for name, parameter in scorer.named_parameters():
        if "lora_B" in name:  # which start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return scorer


def export(scorer: Scorer, model: Path, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    export_model(scorer, dtype, load_tokenizer(ModelConfig(model_name_or_path=str(model))), folder)
    return cli.weights(folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16_WEIGHTS], ids=["float32", "bfloat16"])
def test_adapters_are_merged_as_peft_merges_the_whole_model(
    llama: Path, tmp_path: Path, dtype: torch.dtype, numerics: Numerics
) -> None:
    scorer = lora(llama, numerics)
    written = export(scorer, llama, tmp_path / "exported", dtype)
    whole: Any = copy.deepcopy(scorer.model)
    if dtype == torch.float32:
        whole.to(dtype=dtype)
    expected = whole.merge_and_unload().to(dtype=dtype).state_dict()
    assert set(written) == set(expected)
    for name, value in expected.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], value), name
    start = cli.weights(llama)
    assert (
        written["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral", "olmoe", "gpt_oss", "gpt2"])
def test_whole_weights_are_those_that_transformers_writes(
    architecture: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", architecture)
    written = export(load(folder), folder, tmp_path / "exported", dtype)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dtype)
    own.save_pretrained(tmp_path / "own")
    expected = cli.weights(tmp_path / "own")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    config, theirs = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("exported", "own"))
    for different in ("_name_or_path", *(name for name in config if "drop" in name)):
        theirs[different] = config[different]
    assert config == theirs
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    original = AutoConfig.from_pretrained(folder).to_dict()  # rates are off in memory, and come back in the file
    assert {k: v for k, v in config.items() if "drop" in k} == {k: v for k, v in original.items() if "drop" in k}


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_model_of_several_files_is_read_whole(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", architecture)
    scorer = load(folder)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(folder)))
    monkeypatch.setattr(export_module, "_SHARD_BYTES", 60_000)
    (written := tmp_path / "exported").mkdir()
    export_model(scorer, torch.float32, tokenizer, written)
    shards = sorted(written.glob("*.safetensors"))
    held = [load_file(shard) for shard in shards]
    assert len(shards) > 2
    assert [shard.name for shard in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    for weights in held:
        assert len(weights) == 1 or sum(weight.nbytes for weight in weights.values()) <= 60_000
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weights in held for weight in weights.values())
    assert index["weight_map"] == {
        name: shard.name for shard, weights in zip(shards, held, strict=True) for name in weights
    }
    read = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).state_dict()
    assert cli.equal(read, scorer.base.state_dict())


def test_tied_weights_come_once(tmp_path: Path) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", tie_word_embeddings=True)
    names = [name for name, _ in exported_weights(load(folder), torch.float32)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [load, lora], ids=["whole", "lora"])
def test_the_model_in_memory_stays_as_it_was(make: Any, llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    scorer: Scorer = make(llama)
    batch = pack(PAIRS, layout="rows", pad_token_id=2)
    state = {name: value.clone() for name, value in scorer.state_dict().items()}
    config = copy.deepcopy(scorer.base.config)
    scores = as_matrix(scorer.score(batch).logps)
    export(scorer, llama, tmp_path / "exported", dtype)
    assert {name: (value.dtype, value.shape) for name, value in scorer.state_dict().items()} == {
        name: (value.dtype, value.shape) for name, value in state.items()
    }
    assert cli.equal(scorer.state_dict(), state)
    assert scorer.base.config.to_dict() == config.to_dict()
    again = scorer.score(batch).logps
    assert torch.equal(as_matrix(again), scores)
    (-again.chosen.sum()).backward()  # and it can train
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("fields", [{}, {"use_lora": True, "lora_rank": 4}], ids=["whole", "lora"])
def test_a_run_that_exports_at_every_checkpoint_ends_with_the_same_bits(
    fields: dict[str, Any], llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_train_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "checkpointing_steps": 1}
    plain = cli.train(llama, pairs_file, tmp_path / "plain", **settings, **fields)
    scorers: list[Scorer] = []
    load_policy = open_po.training.run.load_policy

    def noted(*positional: Any) -> Policy:
        policy = load_policy(*positional)
        scorers.append(policy.scorer)
        return policy

    class Exporter(RunObserver):
        def checkpoint_written(self, checkpoint: Path) -> None:
            export(scorers[0], llama, tmp_path / "exported" / checkpoint.name, torch.bfloat16)

    monkeypatch.setattr(open_po.training.run, "load_policy", noted)
    monkeypatch.setattr(open_po.training.run, "_open_hub", lambda *_: [Exporter()])
    exporting = cli.train(llama, pairs_file, tmp_path / "exporting", **settings, **fields)
    assert len(list((tmp_path / "exported").iterdir())) == 4
    assert cli.equal(cli.weights(exporting), cli.weights(plain))
    last = cli.weights(tmp_path / "exported" / "step_000004")
    assert all(torch.equal(last[name], value.bfloat16()) for name, value in cli.weights(plain).items())


def test_an_adapted_layer_is_not_merged_twice(llama: Path, tmp_path: Path) -> None:
    scorer = lora(llama)
    first = export(scorer, llama, tmp_path / "first", torch.float32)
    second = export(scorer, llama, tmp_path / "second", torch.float32)
    assert cli.equal(first, second)
