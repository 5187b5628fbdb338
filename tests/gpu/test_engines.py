"""Engines on a CUDA device: one process under each trains as plain training does (on CPUs: tests/runs)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cli, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS: dict[str, Any] = {
    "max_train_steps": 5,
    "learning_rate": 1e-3,
    "max_tokens_per_batch": 200,
    "dtype": "float32",
    "use_liger_kernel": False,
    "checkpointing_steps": 2,
    "preprocessing_num_workers": 1,
}
ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {"parallel": "zero1"},
    "zero2_offload": {"parallel": "zero2", "offload_optimizer": True},
    "zero3": {"parallel": "zero3"},
    "zero3_offload": {"parallel": "zero3", "offload_optimizer": True, "offload_param": True},
    "fsdp": {"parallel": "fsdp"},
    "fsdp_offload": {"parallel": "fsdp", "offload_param": True},
}


def train(folder: Path, name: str, **fields: Any) -> dict[str, torch.Tensor]:
    """A run in a process of its own, since a process that has used CUDA cannot fork."""
    words = cli.arguments(folder / "model", folder / "pairs.jsonl", folder / name, **STEPS | fields)
    code, _, err = cli.finished(cli.start([sys.executable, "dpo_tune_cache.py", *words]), 120)
    assert code == 0, err
    return cli.weights(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    tiny.make_model_folder(path / "model")
    tiny.write_jsonl(path / "pairs.jsonl", tiny.text_rows(24))
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, torch.Tensor]:
    return train(folder, "plain")


@pytest.mark.parametrize("name", ENGINES)
def test_one_process_trains_as_without_the_engine(name: str, folder: Path, plain: dict[str, torch.Tensor]) -> None:
    cli.assert_close_weights(train(folder, name, **ENGINES[name]), plain, cli.weights(folder / "model"))


@pytest.mark.parametrize("name", ["zero2_offload", "fsdp"])
def test_lora_on_a_bfloat16_base(name: str, folder: Path) -> None:
    """Frozen weights and adapters differ in dtype, which an engine has to divide together."""
    fields = {"use_lora": True, "lora_rank": 4, "learning_rate": 1e-2, "dtype": "bfloat16", "save_dtype": "float32"}
    expected = train(folder, f"{name}_plain_lora", **fields)
    got = train(folder, f"{name}_lora", **fields, **ENGINES[name])
    cli.assert_close_weights(got, expected, cli.weights(folder / "model"), share=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_over_all_gpus(folder: Path, plain: dict[str, torch.Tensor]) -> None:
    cli.assert_close_weights(train(folder, "layers", parallel="layers"), plain, cli.weights(folder / "model"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
def test_two_gpus_train_as_one(engine: str, folder: Path, plain: dict[str, torch.Tensor]) -> None:
    fields = STEPS | {"parallel": engine, "per_device_train_batch_size": 2}
    words = cli.arguments(folder / "model", folder / "pairs.jsonl", folder / f"two_{engine}", **fields)
    command = [sys.executable, "-m", "open_po", "launch", *words]
    code, _, err = cli.finished(cli.start(command, GPUS_PER_NODE="2"), 180)
    assert code == 0, err
    cli.assert_close_weights(cli.weights(folder / f"two_{engine}"), plain, cli.weights(folder / "model"))
