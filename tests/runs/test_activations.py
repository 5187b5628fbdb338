"""Whole runs that keep their activations in other ways: the weights that they end with, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import open_po.model.prepare as loading
from open_po.commands.train import main
from open_po.config import load_config
from open_po.distributed.parallelism import Parallelism
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from tests import cli, scoring, tiny

RUN: dict[str, Any] = {"num_epochs": 2, "max_tokens_per_batch": 60, "loss_type": "dpo_norm", "beta": 5}
ON: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_every": 2,
    "offload_activations": True,
    "mlp_tile_tokens": 16,
}
LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny.text_rows(9))


def all_is_large(rank: int = 0) -> None:
    from open_po.model import offload

    offload._LEAST_BYTES = 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LORA], ids=["weights", "adapters"])
@pytest.mark.parametrize("fields", [ON, {"torch_compile": True}], ids=["all but compiled", "compiled"])
def test_the_weights_are_those_of_a_plain_run(
    fields: dict[str, Any], more: dict[str, Any], llama: Path, pairs: Path, tmp_path: Path
) -> None:
    plain = cli.train(llama, pairs, tmp_path / "plain", **RUN, **more)
    words = cli.arguments(llama, pairs, tmp_path / "run", **RUN, **more, **fields)
    assert cli.forked(words, all_is_large) == 0
    assert cli.weights(tmp_path / "run").keys() == cli.weights(plain).keys()
    cli.assert_close_weights(cli.weights(tmp_path / "run"), cli.weights(plain), cli.weights(llama))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize(
    ("fields", "more"),
    [(ON, {}), (ON, LORA), ({"torch_compile": True}, {})],
    ids=["weights", "adapters", "compiled"],
)
def test_engines_take_the_same_steps(
    engine: str, fields: dict[str, Any], more: dict[str, Any], llama: Path, pairs: Path, tmp_path: Path
) -> None:
    alone = cli.train(llama, pairs, tmp_path / "alone", **RUN, **more)
    spread = {"parallel": engine, "per_device_train_batch_size": 2}
    words = cli.arguments(llama, pairs, tmp_path / "run", **RUN | more | fields | spread)
    assert cli.forked_ranks(words, all_is_large, seconds=400) == [0, 0]  # compiling takes its time
    cli.assert_close_weights(cli.weights(tmp_path / "run"), cli.weights(alone), cli.weights(llama))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
def test_casts_that_are_made_again_change_nothing_under_engines(
    engine: str, llama: Path, pairs: Path, tmp_path: Path
) -> None:
    """Also where the weights were gathered for the forward pass, and are gathered anew for the backward pass."""

    def autograds_own(rank: int) -> None:
        from open_po.model import saved_tensors

        saved_tensors.SavedTensors._pack = lambda self, tensor: tensor  # type: ignore[method-assign]

    fields = RUN | {"parallel": engine, "per_device_train_batch_size": 2, "dtype": "bfloat16", "save_dtype": "float32"}
    ends = []
    for name, prepare in (("own", autograds_own), ("run", lambda rank: None)):
        words = cli.arguments(llama, pairs, tmp_path / name, **fields)
        assert cli.forked_ranks(words, prepare) == [0, 0]
        ends.append(cli.weights(tmp_path / name))
    assert cli.distance(ends[0], cli.weights(llama)) > 0.05
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"gradient_checkpointing_every": 2}, "gradient_checkpointing_every: needs gradient_checkpointing"),
        (
            {"torch_compile": True, "mlp_tile_tokens": 16},
            "mlp_tile_tokens: contradicts torch_compile, which makes new code for every number of tiles; use one",
        ),
        ({"mlp_tile_tokens": 0}, "mlp_tile_tokens: must be above 0, got 0"),
    ],
)
def test_contradictions_are_told(
    fields: dict[str, Any], line: str, llama: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(cli.arguments(llama, pairs, tmp_path / "run", **fields)) == 2
    assert capsys.readouterr().err == f"config error: {line}\n"


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        ("mixtral", {"mlp_tile_tokens": 16}, "mlp_tile_tokens: mixtral sends tokens to experts; leave it out"),
        (
            "opt",
            {"mlp_tile_tokens": 16},
            "mlp_tile_tokens: the layers of opt have no module mlp that takes hidden states alone; leave it out",
        ),
    ],
)
def test_what_a_model_cannot_do_is_told_before_one_is_loaded(
    architecture: str,
    fields: dict[str, Any],
    said: str,
    llama: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not after the pass of a reference model that may take hours."""
    folder = tiny.make_model_folder(tmp_path / "model", architecture, **tiny.SHARING[architecture])
    monkeypatch.setattr(loading, "load_scorer", lambda *_: pytest.fail("a model is loaded"))
    words = cli.arguments(folder, pairs, tmp_path / "run", reference_model_name_or_path=llama, **fields)
    assert cli.failure(capsys, words) == f"error: {said}"


@pytest.mark.parametrize(
    ("ranks", "adapters", "said"),
    [
        (3, False, "parallel: tp needs a vocabulary that 3 ranks divide, this one has 320 entries; use fsdp"),
        (2, True, "is a folder of adapters, which parallel tp cannot merge; use fsdp"),
        (2, False, None),
    ],
)
def test_what_tensor_parallelism_cannot_divide_is_told_before_it_is_loaded(
    ranks: int, adapters: bool, said: str | None, llama: Path, tmp_path: Path
) -> None:
    folder = llama
    if adapters:
        folder = tmp_path / "adapters"
        get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2)).save_pretrained(folder)
    config = load_config(["--model_name_or_path", str(folder), "--mixer_list", "data", "1.0", "--parallel", "tp"])
    runtime = SimpleNamespace(parallelism=Parallelism(kind="tp"), world_size=ranks, device=torch.device("cpu"))
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        loading.refuse_what_cannot_train(config, scoring.FLOAT32, cast(Runtime, runtime))
