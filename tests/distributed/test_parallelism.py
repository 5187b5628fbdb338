"""Which engine a run has, by its configuration and by what `accelerate launch` leaves in the environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from open_po.config import load_config
from open_po.distributed import parallelism
from open_po.distributed.parallelism import LauncherWish, Parallelism, choose_parallelism
from open_po.distributed.zero import zero_config
from open_po.errors import ConfigError
from tests import cli

# What published scripts give DeepSpeed, all of it left open but for the stage
PUBLISHED = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu"},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 1e5,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def wish(monkeypatch: pytest.MonkeyPatch, **environment: str) -> LauncherWish:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return LauncherWish.from_environment()


def chosen(fields: dict[str, Any], asked: LauncherWish | None = None, ranks: int = 2) -> Parallelism:
    words = cli.arguments(Path("model"), Path("pairs.jsonl"), Path("run"), **fields)
    return choose_parallelism(load_config(words), asked or LauncherWish(), ranks)


def test_without_any_wish_ranks_have_whole_models() -> None:
    assert chosen({}).kind == "ddp"
    assert chosen({}, ranks=1).kind == "single"
    assert chosen({"parallel": "zero2"}, ranks=1).kind == "zero2"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_by_the_launcher(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wish(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage))
    assert chosen({}, asked).kind == f"zero{stage}"
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ, "accelerate would start the engine by itself"


@pytest.mark.parametrize(
    ("words", "reshards"),
    [
        ({"FSDP_VERSION": "2"}, True),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, False),
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, False),
        ({"FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, True),
    ],
)
def test_fsdp_by_the_launcher(words: dict[str, str], reshards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wish(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="true", **words)
    found = chosen({}, asked)
    assert (found.kind, found.reshard_after_forward, found.offload_param) == ("fsdp", reshards, True)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16 is not supported; use bf16 or no"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero stage 0 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "NO_SHARD is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "2.0"}, "is for max_grad_norm to say"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "is for gradient_checkpointing"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "use torchrun --nproc_per_node N"),
    ],
)
def test_what_is_not_supported_is_refused(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="accelerate launch") as error:
        wish(monkeypatch, **environment)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parallel": "fsdp"}, "parallel: fsdp contradicts accelerate launch, which asks for zero2"),
        ({"offload_param": True}, "offload_param: is for parallel zero3 and fsdp, this run is zero2"),
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size: 2 is for parallel zero3 and a number of ranks"),
    ],
)
def test_contradictions(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(fields, LauncherWish(kind="zero2"))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optimizer_in_backward": "on", "max_grad_norm": 0}, "is for one GPU and parallel layers, this run is ddp"),
        ({"parallel": "zero2", "grad_dtype": "float32"}, "DeepSpeed adds gradients up in its own way (parallel zero2)"),
        ({"offload_optimizer": True, "parallel": "fsdp"}, "fsdp offloads weights and optimizer together"),
        ({"parallel": "zero3", "zero_hpz_partition_size": 3}, "a number of ranks that it divides"),
        ({"parallel": "zero2", "async_checkpointing": True, "checkpointing_steps": 5}, "DeepSpeed waits for its"),
        ({"parallel": "zero2", "reference_sharding": "on"}, "the policy is its own reference, and whole on every rank"),
        ({"parallel": "layers"}, "layers is one process over several GPUs, this run has 2; start one"),
        ({"parallel": "tp"}, "tp is experimental and for CUDA, which is not here; use fsdp"),
    ],
)
def test_what_an_engine_cannot_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(fields)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_lora": True}, "use_lora: parallel tp trains no adapters; use fsdp"),
        ({"mlp_tile_tokens": 64}, "mlp_tile_tokens: has not been tried with parallel tp; leave it out, or use fsdp"),
        ({"torch_compile": True}, "torch_compile: has not been tried with parallel tp; leave it out, or use fsdp"),
        ({"loss_type": "wpo"}, "loss_type: wpo needs a token's whole distribution, which parallel tp divides"),
    ],
)
def test_what_tensor_parallelism_cannot_do_is_told_before_anything_runs(
    fields: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallelism, "_has_cuda", lambda: True)
    with pytest.raises(ConfigError) as error:
        chosen({"parallel": "tp"} | fields)
    assert said in str(error.value)


def test_a_published_deepspeed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(PUBLISHED))
    asked = wish(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path))
    found = chosen({}, asked)
    assert (found.kind, found.offload_optimizer, found.offload_param) == ("zero3", True, False)
    config = zero_config(found, max_grad_norm=0.5)
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu"},
    }
    assert config["gradient_clipping"] == 0.5
    assert not {"optimizer", "scheduler", "bf16"} & config.keys()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("gradient_clipping", 2.0, 'gradient_clipping 2.0 is for max_grad_norm to say; write "auto"'),
        (
            "optimizer",
            {"type": "AdamW", "params": {"lr": 1e-5}},
            "optimizer.params.lr 1e-05 is for optimizer, learning",
        ),
        ("fp16", {"enabled": True}, "fp16.enabled True is for dtype"),
        ("train_batch_size", 64, "train_batch_size 64 is for per_device_train_batch_size"),
        ("amp", {"enabled": True}, "amp is not supported; take it out"),
        ("zero_optimization", {"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights is not supported"),
    ],
)
def test_a_deepspeed_file_that_decides_what_the_configuration_does(
    name: str, value: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(PUBLISHED | {name: value}))
    with pytest.raises(ConfigError) as error:
        wish(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path))
    assert said in str(error.value)


def test_a_deepspeed_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in ("{", "[]"):
        (tmp_path / "ds.json").write_text(content)
        path = str(tmp_path / "ds.json")
        with pytest.raises(ConfigError, match=r"DeepSpeed's configuration .*ds\.json"):
            wish(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=path)


def test_accelerate_itself_sees_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    wish(monkeypatch, ACCELERATE_USE_DEEPSPEED="true")
    assert Accelerator(cpu=True).prepare(nn.Linear(1, 1)).weight.device == torch.device("cpu")


CONFIGURATIONS = sorted((cli.REPOSITORY / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_launch_takes_each_configuration(path: Path, llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", path, "--num_processes", "2"]
    words = cli.arguments(llama, pairs_file, tmp_path / "run", max_train_steps=3)
    code, _, err = cli.finished(cli.start([*command, "dpo_tune_cache.py", *words]), 120)
    assert code == 0, err
    assert cli.summary(tmp_path / "run")["run"]["processes"] == 2


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_says_why_it_started_one(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", "2"]
    words = cli.arguments(llama, pairs_file, tmp_path / "run")
    code, _, err = cli.finished(cli.start([*command, "dpo_tune_cache.py", *words]), 60)
    assert code == 1  # accelerate's own, of any command that fails
    assert "config error: accelerate launch --cpu: starts several processes through MPI alone" in err
    assert not (tmp_path / "run").exists()
