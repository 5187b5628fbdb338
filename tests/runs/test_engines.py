"""One process, DDP, ZeRO and FSDP take the same steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.distributed import parallelism
from open_po.losses import MixedLosses
from tests import cli, tiny

Prepare = Callable[[int], object] | None
QUICK, SLOWLY = ("zero3", "fsdp"), pytest.mark.slow  # ddp is in test_distributed.py
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp"]
# 9 pairs in steps of 4, 4 and 1: an odd number, and a step with fewer pairs than ranks. Packs hold one or two pairs.
STEPS = {"num_epochs": 2, "max_train_steps": 5, "max_tokens_per_batch": 60, "weight_decay": 0.1}
LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-2}
LOSSES = {
    "dpo_norm": {"loss_type": "dpo_norm", "beta": 5},
    "aot": {"loss_type": "aot", "beta": 0.5},  # couples the pairs of a step
}
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
    # Not clipped: its steps are as large as its gradients, and a wrong divisor shows.
    "sgd": {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 0.0, "max_grad_norm": 0},
}
RUNS: dict[str, dict[str, Any]] = {
    f"{loss}_{optimizer}{suffix}": STEPS | fields | OPTIMIZERS[optimizer] | more
    for loss, fields in LOSSES.items()
    for optimizer in OPTIMIZERS
    for suffix, more in (("", {}), ("_lora", LORA))
}
RUNS["dpo_norm_checkpointing"] = RUNS["dpo_norm_adamw"] | {"gradient_checkpointing": True}
FAST = ["dpo_norm_sgd", "dpo_norm_adamw_lora", "aot_adamw"]
SLOW = [name for name in RUNS if name not in FAST]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny.text_rows(9))


Alone = Callable[[str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def alone(llama: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The weights that one process ends with."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def train(name: str) -> dict[str, torch.Tensor]:
        return cli.weights(cli.train(llama, pairs, folder / name, per_device_train_batch_size=4, **RUNS[name]))

    return train


def shares_of_movement(
    names: list[str], engine: str, llama: Path, pairs: Path, alone: Alone, folder: Path, prepare: Prepare = None
) -> dict[str, float]:
    """How far two ranks end from one process, by the distance that training went."""
    cli.forked_ranks_in_turn(
        [
            cli.arguments(llama, pairs, folder / name, parallel=engine, per_device_train_batch_size=2, **RUNS[name])
            for name in names
        ],
        prepare or (lambda rank: None),
    )
    start, shares = cli.weights(llama), {}
    for name in names:
        movement = cli.distance(alone(name), start)
        assert movement > 0.05, f"{name} hardly moved: the comparison would show nothing"
        shares[name] = cli.distance(cli.weights(folder / name), alone(name)) / movement
    return shares


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        # ZeRO-1 and 2 are parts of ZeRO-3
        pytest.param(engine, names, id=f"{engine}-{kind}", marks=[] if kind == "fast" and engine in QUICK else SLOWLY)
        for engine in ENGINES
        for kind, names in (("fast", FAST), ("slow", SLOW))
    ],
)
def test_the_weights_are_those_of_one_process(
    engine: str, names: list[str], llama: Path, pairs: Path, alone: Alone, tmp_path: Path
) -> None:
    shares = shares_of_movement(names, engine, llama, pairs, alone, tmp_path)
    print(engine, {name: f"{share:.1e}" for name, share in shares.items()})
    assert max(shares.values()) <= 1e-4, shares


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[] if name in ("ddp", "fsdp") else [pytest.mark.slow]) for name in ENGINES]
)
def test_a_divisor_that_is_wrong_by_two_would_show(
    engine: str, llama: Path, pairs: Path, alone: Alone, tmp_path: Path
) -> None:
    def halve(rank: int) -> None:
        value = MixedLosses.value
        MixedLosses.value = lambda self, counts: value(self, counts) / 2  # type: ignore[method-assign]

    shares = shares_of_movement(["dpo_norm_sgd"], engine, llama, pairs, alone, tmp_path, halve)
    assert shares["dpo_norm_sgd"] > 0.1


# What a CPU can show of offloading: that the words are taken and no value changes.
VARIANTS: dict[str, dict[str, Any]] = {
    "ddp_offload": {"parallel": "ddp", "offload_optimizer": True},
    "zero2_offload": {"parallel": "zero2", "offload_optimizer": True},
    "zero1_offload": {"parallel": "zero1", "offload_optimizer": True},
    "zero3_offload": {"parallel": "zero3", "offload_optimizer": True, "offload_param": True},
    "zero3_hpz": {"parallel": "zero3", "zero_hpz_partition_size": 2},
    "fsdp_offload": {"parallel": "fsdp", "offload_param": True},
    "fsdp_whole_reference": {"parallel": "fsdp", "reference_sharding": "off"},
    "fsdp_divided_reference": {"parallel": "fsdp", "reference_sharding": "on"},
    "zero3_divided_reference": {"parallel": "zero3", "reference_sharding": "on"},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "fsdp_divided_reference" else pytest.mark.slow) for name in VARIANTS],
)
def test_variants_end_with_the_same_weights(name: str, llama: Path, pairs: Path, alone: Alone, tmp_path: Path) -> None:
    fields = RUNS["dpo_norm_adamw"] | VARIANTS[name] | {"per_device_train_batch_size": 2}
    assert cli.forked_ranks(cli.arguments(llama, pairs, tmp_path / "run", **fields)) == [0, 0]
    cli.assert_close_weights(cli.weights(tmp_path / "run"), alone("dpo_norm_adamw"), cli.weights(llama))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"parallel": "zero2", "offload_optimizer": True}, id="zero2_offload"),
        pytest.param({"parallel": "fsdp"}, id="fsdp", marks=pytest.mark.slow),
        pytest.param({"parallel": "zero3"}, id="zero3", marks=pytest.mark.slow),
    ],
)
def test_one_process_under_an_engine(
    fields: dict[str, Any], llama: Path, pairs: Path, alone: Alone, tmp_path: Path
) -> None:
    fields = RUNS["dpo_norm_adamw"] | fields | {"per_device_train_batch_size": 4}
    assert cli.forked(cli.arguments(llama, pairs, tmp_path / "run", **fields)) == 0
    cli.assert_close_weights(cli.weights(tmp_path / "run"), alone("dpo_norm_adamw"), cli.weights(llama))


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_evaluation_gives_the_metrics_of_one_process(engine: str, llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Of 3 pairs: one rank has fewer packs than the other, and computes one for nothing."""
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.text_rows(3, seed=9))
    fields = STEPS | {"eval_mixer_list": [held_out, "1.0"], "eval_steps": 2, "beta": 1.0}
    alone = cli.train(llama, pairs, tmp_path / "alone", **fields | {"per_device_train_batch_size": 4})
    words = cli.arguments(llama, pairs, tmp_path / "run", parallel=engine, per_device_train_batch_size=2, **fields)
    assert cli.forked_ranks(words) == [0, 0]
    got, expected = cli.without_perf(cli.metrics(tmp_path / "run")), cli.without_perf(cli.metrics(alone))
    assert len(got) == len(expected) == 5 + 4
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("engine", [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero2", "zero3")])
def test_lora_on_a_bfloat16_base(engine: str, llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Frozen weights and adapters differ in dtype, which an engine has to divide together."""
    fields = RUNS["dpo_norm_adamw_lora"] | {"dtype": "bfloat16", "save_dtype": "float32"}
    alone = cli.weights(cli.train(llama, pairs, tmp_path / "alone", **fields | {"per_device_train_batch_size": 4}))
    words = cli.arguments(llama, pairs, tmp_path / "run", parallel=engine, per_device_train_batch_size=2, **fields)
    assert cli.forked_ranks(words) == [0, 0]
    # bfloat16 rounds differently in packs of another size.
    cli.assert_close_weights(cli.weights(tmp_path / "run"), alone, cli.weights(llama), share=0.05)


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", ["mixtral", "gemma2"])
def test_a_divided_model_is_saved_as_a_whole_one_is(
    engine: str, architecture: str, pairs: Path, tmp_path: Path
) -> None:
    """Experts lie one by one in files and together in memory; Gemma's head is tied to its embedding."""
    folder = tiny.make_model_folder(tmp_path / "model", architecture)
    alone = cli.train(folder, pairs, tmp_path / "alone", **STEPS | {"per_device_train_batch_size": 4})
    words = cli.arguments(folder, pairs, tmp_path / "run", parallel=engine, per_device_train_batch_size=2, **STEPS)
    assert cli.forked_ranks(words) == [0, 0]
    assert cli.weights(tmp_path / "run").keys() == cli.weights(alone).keys()
    cli.assert_close_weights(cli.weights(tmp_path / "run"), cli.weights(alone), cli.weights(folder))
    assert cli.files(tmp_path / "run") == cli.files(alone)
    assert (tmp_path / "run" / "config.json").read_text() == (alone / "config.json").read_text()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOWLY) for name in ("dpo_norm_sgd", "dpo_norm_adamw", "aot_adamw")]
)
def test_tensor_parallelism_by_its_stand_in(name: str, llama: Path, pairs: Path, alone: Alone, tmp_path: Path) -> None:
    """It is for CUDA; on a CPU the same code runs over gloo once its refusal is out of the way."""
    fields = RUNS[name] | {"parallel": "tp", "per_device_train_batch_size": 4, "checkpointing_steps": 2}
    words = cli.arguments(llama, pairs, tmp_path / "run", **fields)

    def allow(rank: int) -> None:
        parallelism._has_cuda = lambda: True

    assert cli.forked_ranks(words, allow) == [0, 0]
    cli.assert_close_weights(cli.weights(tmp_path / "run"), alone(name), cli.weights(llama))
