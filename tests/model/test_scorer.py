"""Scores and gradients of real architectures against `transformers`, one response at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.config import ModelConfig, RunConfig, load_config
from open_po.data.tokenizer import load_tokenizer, pad_token_id
from open_po.distributed.parallelism import Parallelism
from open_po.errors import UserError
from open_po.model import logprobs
from open_po.model.activations import checkpoint_gradients
from open_po.model.layout_check import choose_layout
from open_po.model.numerics import Numerics, frozen_numerics, policy_numerics, reference_numerics
from open_po.optimizers import OPTIMIZERS
from open_po.packing import pack
from tests import cli, tiny
from tests.scoring import CPU, FLOAT32, PAIRS, as_matrix, load, scores_one_by_one


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_scores_and_gradients_equal_transformers(
    architecture: str, tied: bool, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_LEAST_COLUMNS", 64)
    monkeypatch.setattr(logprobs, "_BLOCK_BYTES", {"cpu": 1})  # several blocks
    tiny.make_model(tmp_path, architecture, tie_word_embeddings=tied)
    plain = tiny.plain_model(tmp_path)
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    scorer = load(tmp_path).train()
    if checkpointing:
        checkpoint_gradients(scorer)
    weights = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7]])

    expected = scores_one_by_one(plain, PAIRS, torch.float32)
    (expected * weights).sum().backward()
    logps = scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps
    got = as_matrix(logps)
    (got * weights).sum().backward()

    assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
    assert logps.chosen_tokens.tolist() == [4, 1, 3]
    assert logps.rejected_tokens.tolist() == [2, 6, 3]
    theirs = dict(plain.named_parameters())
    compared = 0
    for name, parameter in scorer.base.named_parameters():
        if theirs[name].grad is not None:
            largest = theirs[name].grad.abs().max()
            assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-5 * largest.clamp(min=1e-3), name
            compared += 1
    assert compared == len(theirs)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_bfloat16_scores_stay_within_a_percent(architecture: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture)
    scorer = load(tmp_path, Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.float32, use_liger=False))
    exact = scores_one_by_one(tiny.plain_model(tmp_path), PAIRS, torch.float32)
    with scorer.as_reference():
        got = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
    assert got.dtype == torch.float32
    assert ((got - exact).abs() <= 1e-2 * exact.abs().clamp(min=1)).all()


def test_bfloat16_compute_moves_float32_weights_at_a_tiny_learning_rate(llama: Path) -> None:
    scorer = load(llama, Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.float32, use_liger=False))
    before = [parameter.detach().clone() for parameter in scorer.parameters()]
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-7, weight_decay=0.0)
    (-scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps.chosen.sum()).backward()
    optimizer.step()
    for old, new in zip(before, scorer.parameters(), strict=True):
        moved = (new.detach() - old)[new.grad.abs() > 1e-4]
        # One AdamW step is the learning rate per weight; float32 resolves 1e-8 at weights of size 0.15.
        assert (moved.abs() > 0.5e-7).float().mean() > 0.95


def test_padding_and_neighbours_do_not_change_a_score(llama: Path) -> None:
    scorer = load(llama)
    with scorer.as_reference():
        together = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
        other_padding = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=77)).logps)
        alone = torch.cat(
            [as_matrix(scorer.score(pack([pair], layout="rows", pad_token_id=2)).logps) for pair in PAIRS]
        )
    torch.testing.assert_close(together, other_padding, rtol=0, atol=0)
    torch.testing.assert_close(together, alone)


def test_unscored_rejected_responses_have_no_tokens(llama: Path) -> None:
    scorer = load(llama)
    with scorer.as_reference():
        both = scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps
        chosen_only = scorer.score(pack(PAIRS, layout="rows", pad_token_id=2, with_rejected=False)).logps
    torch.testing.assert_close(chosen_only.chosen, both.chosen)
    assert chosen_only.rejected.tolist() == chosen_only.rejected_tokens.tolist() == [0, 0, 0]


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    tiny.make_model(tmp_path, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    scorer = load(tmp_path).train()
    first, second = (as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert scorer.saved_dropout.items() >= {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}.items()


@pytest.mark.parametrize(
    ("architecture", "settings"), [("cohere", {"logit_scale": 0.3}), ("granite", {"logits_scaling": 4.0})]
)
def test_scaled_logits(architecture: str, settings: dict[str, float], tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture, **settings)
    scorer = load(tmp_path)
    expected = scores_one_by_one(scorer.base, PAIRS, torch.float32)
    with scorer.as_reference():
        torch.testing.assert_close(as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps), expected)


def test_the_check_at_start_refuses_a_head_it_does_not_know(llama: Path) -> None:
    scorer = load(llama)
    choose_layout(scorer, PAIRS, "auto", longest=84, pad=2)
    forward = scorer.base.forward

    def doubled(*args: object, **kwargs: object) -> object:
        result = forward(*args, **kwargs)
        result.logits = 2 * result.logits
        return result

    scorer.base.forward = doubled
    with pytest.raises(UserError, match="fused log-probs differ from the model's own"):
        choose_layout(scorer, PAIRS, "auto", longest=84, pad=2)


def test_the_check_at_start_refuses_ids_beyond_the_vocabulary(llama: Path) -> None:
    with pytest.raises(
        UserError, match=f"token id {tiny.VOCABULARY}, but the model's vocabulary has {tiny.VOCABULARY}"
    ):
        load(llama).check_ids(tiny.VOCABULARY)
    load(llama).check_ids(tiny.VOCABULARY - 1)


def test_a_tokenizer_without_pad_fills_up_with_eos(tmp_path: Path) -> None:
    tiny.make_tokenizer(tmp_path, pad_token=None)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    assert tokenizer.pad_token_id is None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id


def run_config(optimizer: str = "adamw", **fields: Any) -> RunConfig:
    return load_config(cli.flags(model_name_or_path="m", mixer_list=["d", "1.0"], optimizer=optimizer, **fields))


def test_numerics_follow_the_device() -> None:
    cuda = policy_numerics(run_config(), torch.device("cuda"))
    assert cuda == Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.float32, use_liger=True)
    frozen = frozen_numerics(run_config().model, torch.device("cuda"))
    assert frozen.weights_dtype == torch.bfloat16
    assert policy_numerics(run_config(), CPU) == FLOAT32
    with pytest.raises(UserError, match="use_liger_kernel: Liger's kernels need CUDA"):
        policy_numerics(run_config(use_liger_kernel=True), CPU)


KEEPING = {"adamw_kahan", "adamw_sr", "adamw_8bit"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_follow_the_optimizer(optimizer: str) -> None:
    coarse = torch.bfloat16 if optimizer in KEEPING else torch.float32
    assert policy_numerics(run_config(optimizer), torch.device("cuda")).weights_dtype == coarse
    assert policy_numerics(run_config(optimizer, dtype="bfloat16"), CPU).weights_dtype == coarse
    assert policy_numerics(run_config(optimizer), CPU) == FLOAT32
    for given in ("float32", "bfloat16"):
        asked = run_config(optimizer, dtype="bfloat16", weights_dtype=given)
        assert policy_numerics(asked, CPU).weights_dtype == getattr(torch, given)
        # A policy that is its own reference is one in the same numerics.
        assert reference_numerics(asked, CPU).key() == policy_numerics(asked, CPU).key()
    assert frozen_numerics(run_config(optimizer).model, CPU) == FLOAT32


def test_weights_with_float32_masters_on_the_host_are_what_they_compute_in() -> None:
    """The host updates float32 weights; DeepSpeed keeps its own, whoever has asked for it."""
    cuda, hosted = torch.device("cuda"), run_config(offload_optimizer=True)
    assert policy_numerics(hosted, cuda).weights_dtype == torch.bfloat16
    assert reference_numerics(hosted, cuda).key() == policy_numerics(hosted, cuda).key()
    assert policy_numerics(hosted, CPU) == FLOAT32
    whole = run_config(offload_optimizer=True, weights_dtype="float32")
    assert policy_numerics(whole, cuda).weights_dtype == torch.float32
    assert policy_numerics(run_config(offload_optimizer=True, parallel="zero2"), cuda).weights_dtype == torch.float32
    launched = Parallelism(kind="zero2", offload_optimizer=True)
    assert policy_numerics(hosted, cuda, launched).weights_dtype == torch.float32


def test_weights_in_bfloat16_compute_in_it() -> None:
    with pytest.raises(UserError, match="weights_dtype: bfloat16 needs dtype bfloat16, this run computes in float32"):
        policy_numerics(run_config(weights_dtype="bfloat16"), CPU)


_INTERPRETED = """
import sys
import torch
from dataclasses import replace
from pathlib import Path
from open_po.packing import pack
from tests.scoring import PAIRS
from tests.scoring import as_matrix
from tests.scoring import load
from tests.scoring import scores_one_by_one
plain, scorer = load(Path(sys.argv[1])), load(Path(sys.argv[1]))
expected = scores_one_by_one(plain.base, PAIRS, torch.float32)
expected.sum().backward()
scorer.numerics = replace(scorer.numerics, use_liger=True)
got = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
assert ((got - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all(), (got, expected)
got.sum().backward()
theirs = dict(plain.base.named_parameters())
for name, parameter in scorer.base.named_parameters():
    assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-5 * theirs[name].grad.abs().max(), name
print("equal")
"""


@pytest.mark.slow
def test_the_triton_head_on_a_whole_model_through_the_interpreter(llama: Path) -> None:
    """Liger's RMSNorm, RoPE and SwiGLU do not run in Triton's interpreter; tests/gpu has them."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, str(llama)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.slow
def test_liger_replaces_norms_and_mlps_of_models_it_knows(llama: Path) -> None:
    """Only that they are put in; importing them changes transformers for the whole process, hence a process."""
    script = (
        "import sys; from pathlib import Path; from dataclasses import replace;"
        "from tests.scoring import FLOAT32, load;"
        "base = load(Path(sys.argv[1]), replace(FLOAT32, use_liger=True)).base;"
        "layer = base.base_model.layers[0];"
        "print(layer.input_layernorm.forward.__module__, layer.mlp.forward.__module__, base.forward.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(llama)], capture_output=True, text=True, check=False)
    norm, mlp, head = done.stdout.split()
    assert "liger" in norm
    assert "liger" in mlp
    assert "liger" not in head, "the head is fused by open_po itself"
