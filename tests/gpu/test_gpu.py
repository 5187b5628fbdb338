"""What only a CUDA device can show. Run with `pytest tests/gpu -m gpu`; see docs/gpu_checks.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

import open_po.model.prepare
from open_po.commands.train import main
from open_po.config import ModelConfig
from open_po.data.tokenizer import load_tokenizer
from open_po.model import four_bit
from open_po.model.activations import checkpoint_gradients
from open_po.model.attention import Segments, _by_flash, _by_sdpa
from open_po.model.export import export_model
from open_po.model.layout_check import choose_layout
from open_po.model.load import load_scorer
from open_po.model.logprobs import Head, fused_logprobs
from open_po.model.lora import attach_lora
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource
from open_po.packing import Segment, pack
from tests import cli, tiny
from tests.naive import gradients, make, naive_logprobs
from tests.scoring import PAIRS, as_matrix, scores_one_by_one

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


LAYOUTS_ON_CUDA = ("llama", "qwen3", "gemma2", "olmo2", "phi", "gpt_neox", "gpt2")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_head_equals_naive(bias: bool, softcap: float | None, dtype: torch.dtype) -> None:
    states, weight, offset = make(257, 64, 1009, dtype, bias)
    states = states.detach().cuda().requires_grad_()
    weight = weight.detach().cuda().requires_grad_()
    offset = None if offset is None else offset.detach().cuda().requires_grad_()
    targets = torch.randint(0, 1009, (257,), device="cuda")
    head = Head(weight, offset, softcap)
    got, got_grads = gradients(lambda *a: fused_logprobs(*a, use_liger=True), states, head, targets)
    exact = states.detach().float().requires_grad_()
    expected, expected_grads = gradients(naive_logprobs, exact, head, targets)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (got.sum() - expected.sum()).abs() <= tolerance * expected.sum().abs()
    for mine, theirs in zip(got_grads, expected_grads, strict=True):
        assert (mine.float() - theirs).norm() <= tolerance * theirs.norm()


def on_gpu(folder: Path, numerics: Numerics) -> Scorer:
    return load_scorer(ModelSource(name=str(folder)), numerics, torch.device("cuda"))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_liger_models_equal_transformers(architecture: str, tmp_path: Path) -> None:
    tiny.make_model(tmp_path, architecture)
    plain = tiny.plain_model(tmp_path)
    expected = scores_one_by_one(plain, PAIRS, torch.float32)
    expected.sum().backward()
    scorer = on_gpu(tmp_path, Numerics(compute_dtype=torch.float32, weights_dtype=torch.float32, use_liger=True))
    got: Tensor = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
    got.sum().backward()
    assert ((got.cpu() - expected).abs() <= 1e-4 * expected.abs().clamp(min=1)).all()
    theirs = dict(plain.named_parameters())
    for name, parameter in scorer.base.named_parameters():
        reference = theirs[name].grad
        assert (parameter.grad.cpu() - reference).abs().max() <= 1e-4 * reference.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("liger", [False, True], ids=["torch", "liger"])
@pytest.mark.parametrize("architecture", LAYOUTS_ON_CUDA)
def test_shared_prompts_in_bfloat16_equal_transformers_one_by_one(
    architecture: str, liger: bool, checkpointing: bool, tmp_path: Path
) -> None:
    """FlashAttention over segments of different lengths (windows, fewer key heads), and products for the soft-cap."""
    tiny.make_model(tmp_path, architecture)
    numerics = Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.float32, use_liger=liger)
    scorer = on_gpu(tmp_path, numerics)
    if checkpointing:
        checkpoint_gradients(scorer)
    choice = choose_layout(scorer, PAIRS, "on", longest=84, pad=2)
    assert choice.layout == "shared"
    assert scorer.last_layer_is_short
    plain = tiny.plain_model(tmp_path)
    expected = scores_one_by_one(plain, PAIRS, torch.float32)
    expected.sum().backward()
    got = as_matrix(scorer.score(pack(PAIRS, layout="shared", pad_token_id=2)).logps)
    got.sum().backward()
    assert ((got.cpu() - expected).abs() <= 2e-2 * expected.abs().clamp(min=1)).all()
    theirs = dict(plain.named_parameters())
    for name, parameter in scorer.base.named_parameters():
        reference = theirs[name].grad
        assert (parameter.grad.cpu() - reference).norm() <= 0.1 * reference.norm().clamp(min=1e-2), name


def test_flash_attention_equals_sdpa_of_each_segment() -> None:
    """In bfloat16 on random segments, with a window and with fewer key heads; values and gradients."""
    ranges = (Segment(0, 200, 0, 0), Segment(200, 270, 0, 150), Segment(270, 271, 0, 150), Segment(271, 400, 271, 271))
    segments = Segments(ranges, torch.device("cuda"))
    for heads, window in ((4, None), (2, None), (2, 64)):
        inputs = [torch.randn(1, n, 400, 64, device="cuda", dtype=torch.bfloat16) for n in (4, heads, heads)]
        results = []
        for kernel in (_by_flash, _by_sdpa):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = kernel(*leaves, segments, None, window)
            out.float().square().sum().backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
        for mine, theirs in zip(*results, strict=True):
            assert (mine.float() - theirs.float()).norm() <= 2e-2 * theirs.float().norm()


def test_the_reference_pass_halves_its_budget_when_the_card_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make_model_folder(tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(4000))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(400e6 / total)
    try:
        arguments = f"""--model_name_or_path {folder} --mixer_list {data} 1.0 --reference_cache_dir {tmp_path / "cache"}
            --output_dir {tmp_path / "out"} --reference_max_tokens_per_batch 1000000 --max_train_steps 1""".split()
        assert main(arguments) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory, on with" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert summary["reference"]["pairs_computed"] == 4000


def test_bfloat16_training_moves_weights_at_a_tiny_learning_rate(tmp_path: Path) -> None:
    folder = tiny.make_model_folder(tmp_path / "model")
    scorer = on_gpu(folder, Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.float32, use_liger=True))
    before = [parameter.detach().clone() for parameter in scorer.parameters()]
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-7, weight_decay=0.0)
    (-scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps.chosen.sum()).backward()
    optimizer.step()
    for old, new in zip(before, scorer.parameters(), strict=True):
        moved = (new.detach() - old)[new.grad.abs() > 1e-4]
        assert (moved.abs() > 0.5e-7).float().mean() > 0.95


@pytest.mark.parametrize(
    "lora",
    [[], ["--use_lora", "--lora_rank", "4"], ["--use_qlora", "--lora_rank", "4"]],
    ids=["full", "lora", "qlora"],
)
@pytest.mark.parametrize("checkpointing", [[], ["--gradient_checkpointing"]], ids=["plain", "checkpointing"])
def test_a_run_on_the_gpu_learns(lora: list[str], checkpointing: list[str], tmp_path: Path) -> None:
    folder = tiny.make_model_folder(tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(32))
    arguments = f"""--model_name_or_path {folder} --mixer_list {data} 1.0 --eval_mixer_list {data} 1.0
        --reference_cache_dir {tmp_path / "cache"} --output_dir {tmp_path / "out"} --learning_rate 1e-3
        --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_epochs 8""".split()
    assert main([*arguments, *lora, *checkpointing]) == 0
    summary = json.loads((tmp_path / "out" / "run_summary.json").read_text())
    assert summary["numerics"]["kernels"] == "liger"
    assert summary["numerics"]["compute_dtype"] == "bfloat16"
    assert abs(summary["eval_before"]["rewards/margin"]) < 0.05
    assert summary["eval"]["rewards/accuracy"] > 0.9


def test_a_base_in_4_bits_takes_half_a_byte_a_weight_and_saves_what_it_trained(tmp_path: Path) -> None:
    """In bfloat16: loading never holds whole weights, gradients reach adapters, the merged model agrees."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    folder = tiny.make_model_folder(tmp_path / "model", **size)
    bfloat16 = Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.bfloat16, use_liger=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    numerics = replace(bfloat16, four_bit=True, adapters_apart=True)
    scorer = load_scorer(ModelSource(name=str(folder)), numerics, torch.device("cuda"))
    held, peak = torch.cuda.memory_allocated() - start, torch.cuda.max_memory_allocated() - start
    assert held <= 1.05 * four_bit.weight_bytes(scorer)
    assert peak <= held + 64e6  # a layer's weights at a time
    assert choose_layout(scorer, PAIRS, "auto", longest=128, pad=2).layout == "shared"
    config = ModelConfig(
        model_name_or_path=str(folder),
        lora_rank=4,
        lora_alpha=8.0,
        lora_dropout=0.0,
        lora_target_modules=["all-linear"],
    )
    attach_lora(scorer, config)
    for name, parameter in scorer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    logps = as_matrix(scorer.score(pack(PAIRS, layout="shared", pad_token_id=2)).logps)
    logps.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in scorer.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in scorer.named_parameters() if "lora_A" in name)
    export_model(scorer, torch.float32, load_tokenizer(config), tmp_path / "saved")
    saved = load_scorer(ModelSource(name=str(tmp_path / "saved")), bfloat16, torch.device("cuda"))
    saved.use_layout("shared")
    with torch.no_grad():
        again = as_matrix(saved.score(pack(PAIRS, layout="shared", pad_token_id=2)).logps)
    tokens = max(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in PAIRS)
    assert (again - logps).abs().max() <= 0.1 * tokens


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    def peak(tokens: int) -> int:
        states = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(131_072, 256, device="cuda", requires_grad=True)
        targets = torch.randint(0, 131_072, (tokens,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        fused_logprobs(states, Head(weight), targets, use_liger=True).sum().backward()
        return torch.cuda.max_memory_allocated() - start

    assert peak(8192) - peak(2048) <= 0.05 * 6144 * 131_072 * 4


def test_a_resumed_gpu_run_repeats_its_dropout(tmp_path: Path) -> None:
    folder = tiny.make_model_folder(tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(16))
    arguments = f"""--model_name_or_path {folder} --mixer_list {data} 1.0 --reference_cache_dir {tmp_path / "cache"}
        --learning_rate 1e-2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --num_epochs 2
        --use_lora --lora_rank 4 --lora_dropout 0.3 --checkpointing_steps 4 --save_dtype float32""".split()
    for name in ("first", "second"):
        assert main([*arguments, "--output_dir", str(tmp_path / name)]) == 0
        arguments += ["--resume_from_checkpoint", str(tmp_path / "first" / "checkpoints" / "step_000004")]
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("first", "second")
    )
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_separate_reference_model_gives_its_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch has allocated when the policy loads is what it had before the reference model did."""
    policy, data = tiny.make_model_folder(tmp_path / "policy"), tmp_path / "pairs.jsonl"
    reference = tiny.make_model_folder(tmp_path / "reference", seed=1, hidden_size=512, intermediate_size=4096)
    tiny.write_jsonl(data, tiny.text_rows(20))
    seen: list[int] = []

    def load(*positional: Any) -> Scorer:
        seen.append(torch.cuda.memory_allocated())
        scorer = load_scorer(*positional)
        seen.append(torch.cuda.memory_allocated())
        return scorer

    monkeypatch.setattr(open_po.model.prepare, "load_scorer", load)
    arguments = f"""--model_name_or_path {policy} --mixer_list {data} 1.0 --reference_cache_dir {tmp_path / "cache"}
        --reference_model_name_or_path {reference} --output_dir {tmp_path / "out"} --max_train_steps 1""".split()
    assert main(arguments) == 0
    before, loaded, freed, _ = seen
    assert loaded - before > 10e6
    assert freed - before <= 1e6


def test_auto_fills_the_card_and_trains(tmp_path: Path) -> None:
    """With nothing set, a step of many pairs goes in packs that fit; the numbers are where a run's settings are."""
    model = tiny.make_model_folder(tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(64))
    fields = {"per_device_train_batch_size": 64, "max_train_steps": 2}
    run = cli.train(model, data, tmp_path / "run", **fields)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert isinstance(settings["max_tokens_per_batch"], int)
    assert isinstance(settings["reference_max_tokens_per_batch"], int)
    assert cli.summary(run)["train"]["packing"]["packs"] == 2, "a step of this size is one pack on any card"


def test_a_step_that_does_not_fit_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process may have what packs of a bit more than half of the step need, and somewhat more."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 320}
    model = tiny.make_model_folder(tmp_path / "model", **sizes)
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(2000))
    fields: dict[str, Any] = {"per_device_train_batch_size": 2000, "max_train_steps": 1, "learning_rate": 1e-4}
    torch.cuda.reset_peak_memory_stats()
    small = cli.train(model, data, tmp_path / "small", **fields, max_tokens_per_batch=40_000)
    before = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.3 * before / total))
    try:
        capsys.readouterr()
        retried = cli.train(model, data, tmp_path / "retried", **fields, max_tokens_per_batch=1_000_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Step 1: out of memory in a pack of" in capsys.readouterr().out
    cli.assert_close_weights(cli.weights(retried), cli.weights(small), cli.weights(model), share=0.05)
