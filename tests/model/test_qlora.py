"""QLoRA: a base in 4 bits, adapters on it, its own reference, and a saved model that is the one that was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import open_po.config.checks
from open_po.commands import score as score_command
from open_po.config import ModelConfig
from open_po.data.tokenizer import load_tokenizer
from open_po.errors import UserError
from open_po.model import four_bit
from open_po.model.export import export_model
from open_po.model.lora import attach_lora
from open_po.model.scorer import Scorer
from open_po.packing import pack
from tests import cli, tiny
from tests.scoring import ALL, FLOAT32, PAIRS, WEIGHTS, as_matrix, choose, load, score, scores_one_by_one

NF4 = replace(FLOAT32, four_bit=True, adapters_apart=True)
QLORA: dict[str, Any] = {"use_qlora": True, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}


def by_hand(folder: Path) -> Any:
    """A model in 4 bits as transformers loads it.

    In training mode, since a CPU with AVX512-BF16 computes in bfloat16 in the other; no tiny Llama has dropout.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32).train()


def dequantised(folder: Path) -> Any:
    """A model of whole weights that are what 4 bits stand for."""
    model, quantised = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), by_hand(folder)
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            full = dequantize_4bit(weight.data, weight.quant_state)
            target = model.get_submodule(name)
            target.weight.data = full if isinstance(target, nn.Linear) else full.T
    return model


def adapted(folder: Path, **fields: Any) -> Scorer:
    """A scorer in 4 bits with adapters that change it."""
    scorer = load(folder, NF4)
    given = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"], **fields}
    attach_lora(scorer, ModelConfig(model_name_or_path=str(folder), use_lora=True, **given))
    torch.manual_seed(0)
    for name, parameter in scorer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return scorer


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_are_those_of_transformers_own_model_in_4_bits(architecture: str, tmp_path: Path) -> None:
    folder = tiny.make_model_folder(tmp_path / "model", architecture)
    scorer = load(folder, NF4)
    assert choose(scorer).layout == "shared"
    with scorer.as_reference():
        got = as_matrix(scorer.score(pack(ALL, layout="shared", pad_token_id=2)).logps)
    with torch.no_grad():
        expected = scores_one_by_one(_still(folder), ALL, torch.float32)
        whole = scores_one_by_one(tiny.plain_model(folder), ALL, torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - whole).abs().max() > 0.1, "4 bits change nothing: the comparison would show nothing"


def _still(folder: Path) -> Any:
    """As `by_hand`, any dropout off."""
    model = by_hand(folder)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_after_an_evaluation_gradients_are_those_of_whole_weights_and_reach_adapters_alone(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    """On some CPUs an evaluation repacks 4-bit weights so that nothing below them gets a gradient any more."""
    folder = tiny.make_model_folder(tmp_path / "model", hidden_size=64, intermediate_size=128)
    scorer = adapted(folder, **fields)
    with scorer.as_reference():
        scorer.score(pack(PAIRS, layout="rows", pad_token_id=2))
    got, gradients = score(scorer, "rows", PAIRS)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    plain: Any = get_peft_model(dequantised(folder), LoraConfig(**settings, **fields))
    trained = {name: value for name, value in scorer.model.named_parameters() if value.requires_grad}
    plain.load_state_dict({name: value.detach() for name, value in trained.items()}, strict=False)
    expected = scores_one_by_one(plain, PAIRS, torch.float32)
    (expected * WEIGHTS[: len(PAIRS)]).sum().backward()
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)
    assert set(gradients) == {name.removeprefix("base_model.model.") for name in trained}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            mine = gradients[name.removeprefix("base_model.model.")]
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max()))


def test_what_weights_take(tmp_path: Path) -> None:
    """0.5 bytes a weight, and for every 64 of them a scale in a byte, for every 256 scales one of 4 bytes."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    scorer = load(tiny.make_model_folder(tmp_path / "model", **size), NF4)
    weights = sum(layer.weight.quant_state.shape.numel() for _, layer in four_bit.four_bit_layers(scorer))
    others = sum(p.nbytes for p in scorer.parameters() if not hasattr(p, "quant_state"))
    layers = len(list(four_bit.four_bit_layers(scorer)))
    assert layers == 14
    assert weights == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    tables = 4 * (16 + 256 + 1)  # of a layer: values of NF4, of scales, the scales' mean
    assert four_bit.weight_bytes(scorer) - others == weights * (0.5 + 1 / 64 + 4 / (64 * 256)) + layers * tables


@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora, rslora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_merged_model_is_the_one_that_was_trained(
    architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    if architecture == "mixtral" and fields:
        pytest.skip("peft has no DoRA for the experts of a mixture")
    folder = tiny.make_model_folder(tmp_path / "model", architecture, **tiny.SHARING[architecture])
    scorer = adapted(folder, **fields)
    scorer.use_layout("rows")
    with torch.no_grad():
        got = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
    state = {name: value.clone() for name, value in scorer.state_dict().items()}
    saved = tmp_path / "saved"
    export_model(scorer, torch.float32, load_tokenizer(ModelConfig(model_name_or_path=str(folder))), saved)
    assert cli.equal(scorer.state_dict(), state)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    assert {value.dtype for value in cli.weights(saved).values()} == {torch.float32}
    assert {name: value.shape for name, value in cli.weights(saved).items()} == {
        name: value.shape for name, value in cli.weights(folder).items()
    }
    with torch.no_grad():
        merged = scores_one_by_one(tiny.plain_model(saved), PAIRS, torch.float32)
    torch.testing.assert_close(merged, got, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, with a cached reference beside it."""
    folder = tmp_path_factory.mktemp("qlora")
    data = tiny.write_jsonl(folder / "pairs.jsonl", tiny.text_rows(24))
    fields = QLORA | {"eval_mixer_list": [data, "1.0"], "checkpointing_steps": 6, "num_epochs": 2, "lora_dropout": 0.1}
    return cli.train(llama, data, folder / "run", **fields)


def total_logps(model: Any, folder: Path) -> float:
    """Mean log-prob of the chosen responses, by a model's own forward."""
    tokenizer, total = AutoTokenizer.from_pretrained(folder), 0.0
    for row in tiny.text_rows(24):
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen"))
        response.append(tokenizer.eos_token_id)
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += float(scores.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return total / 24


def test_a_run_starts_at_its_own_reference_and_saves_what_it_evaluated(trained: Path, llama: Path) -> None:
    assert cli.steps(trained)[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert cli.steps(trained)[-1]["rewards/margin"] > 0.3
    evaluated = cli.summary(trained)["eval"]["logps/chosen"]
    merged = AutoModelForCausalLM.from_pretrained(trained).eval()
    assert total_logps(merged, trained) == pytest.approx(evaluated, rel=1e-5)
    in_four: Any = PeftModel.from_pretrained(by_hand(llama), trained / "adapter").train()
    for module in in_four.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert total_logps(in_four, trained) == pytest.approx(evaluated, rel=1e-5)
    # On whole weights the adapter is on another model than it was trained on.
    whole = AutoPeftModelForCausalLM.from_pretrained(trained / "adapter").eval()
    assert abs(total_logps(whole, trained) - evaluated) > 1e-2


def test_the_reference_in_4_bits_is_never_that_of_whole_weights(trained: Path, llama: Path, tmp_path: Path) -> None:
    data, cache = trained.parent / "pairs.jsonl", tmp_path / "reference"
    shutil.copytree(trained.parent / "reference", cache)
    fields = {"reference_cache_dir": cache, "max_train_steps": 1, "lora_rank": 2}
    whole = cli.train(llama, data, tmp_path / "whole", use_lora=True, **fields)
    assert cli.summary(whole)["reference"]["pairs_reused"] == 0
    # Also of a reference that is named, which is loaded in 4 bits itself.
    again = cli.train(llama, data, tmp_path / "again", use_qlora=True, reference_model_name_or_path=llama, **fields)
    assert cli.summary(again)["reference"]["pairs_reused"] == 24
    assert cli.summary(again)["numerics"]["quantisation"] == "nf4, double"


@pytest.mark.slow
def test_two_ranks_train_as_one(llama: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(16))
    fields = QLORA | {"lr_scheduler_type": "constant"}
    one = cli.train(llama, data, tmp_path / "one", per_device_train_batch_size=8, **fields)
    words = cli.arguments(llama, data, tmp_path / "two", **fields | {"per_device_train_batch_size": 4})
    assert cli.forked_ranks(words) == [0, 0]
    cli.assert_close_weights(cli.weights(tmp_path / "two"), cli.weights(one), cli.weights(llama), share=1e-3)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(trained: Path, llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "checkpoints" / "step_000012")
    (run / "run_summary.json").unlink()
    data = trained.parent / "pairs.jsonl"
    fields = QLORA | {"eval_mixer_list": [data, "1.0"], "checkpointing_steps": 6, "num_epochs": 2, "lora_dropout": 0.1}
    fields["reference_cache_dir"] = trained.parent / "reference"
    cli.train(llama, data, run, resume_from_checkpoint="auto", **fields)
    assert cli.equal(cli.weights(run), cli.weights(trained))
    checkpoint = load_file(run / "checkpoints" / "step_000012" / "weights.safetensors")
    assert {value.dtype for value in checkpoint.values()} == {torch.float32}
    assert all("lora_" in name for name in checkpoint)


def test_adapters_alone_are_scored_in_4_bits_as_they_were_trained(trained: Path, llama: Path, tmp_path: Path) -> None:
    """`continue` starts where they ended, and `score` says the same of them with `use_qlora`."""
    data = trained.parent / "pairs.jsonl"
    fields = {"use_qlora": True, "lora_start": "continue", "learning_rate": 1e-2, "max_train_steps": 3}
    fields |= {"eval_mixer_list": [data, "1.0"], "merge_on_save": False}
    run = cli.train(trained / "adapter", data, tmp_path / "run", **fields)
    evaluated = [record["eval/logps/chosen"] for record in cli.metrics(run) if "eval/logps/chosen" in record]
    assert evaluated[0] == pytest.approx(cli.summary(trained)["eval"]["logps/chosen"], rel=1e-6)
    first = next(record for record in cli.metrics(run) if "eval/logps/chosen" in record)
    assert first["eval/rewards/chosen"] == pytest.approx(0, abs=1e-4)  # training has the adapters' own dropout
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= cli.files(run)
    assert not {"model.safetensors", "config.json"} & cli.files(run)
    assert "BitsAndBytesConfig(load_in_4bit=True" in (run / "README.md").read_text()
    out = tmp_path / "scores.jsonl"
    words = cli.flags(model=run, data=data, out=out, reference_cache_dir=tmp_path / "scores", use_qlora=True)
    assert score_command.main(words) == 0
    scores = [json.loads(line)["chosen_logps"] for line in out.read_text().splitlines()]
    assert sum(scores) / len(scores) == pytest.approx(evaluated[-1], rel=1e-5)


def test_files_in_4_bits_need_use_qlora(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    by_hand(llama).save_pretrained(folder)
    with pytest.raises(UserError, match="its weights are in 4 or 8 bits, which do not train; set use_qlora"):
        load(folder)
    mine, theirs = load(folder, NF4), load(llama, NF4)
    batch = pack(PAIRS, layout="rows", pad_token_id=2)
    assert torch.equal(as_matrix(mine.score(batch).logps), as_matrix(theirs.score(batch).logps))


def test_without_bitsandbytes_one_line_says_so(
    llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(open_po.config.checks.importlib.util, "find_spec", lambda name: None)
    assert cli.main(cli.arguments(llama, pairs_file, tmp_path / "run", use_qlora=True)) == 2
    assert capsys.readouterr().err.splitlines() == [
        "config error: use_qlora: bitsandbytes is not installed; pip install 'bitsandbytes>=0.50', or use_lora alone"
    ]


def test_what_does_not_go_with_4_bits_is_one_line(
    llama: Path, trained: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run", use_qlora=True, parallel="fsdp")
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "use_qlora: weights in 4 bits are whole on every rank, this run is fsdp; use parallel ddp" in line
    on_adapters = cli.arguments(trained / "adapter", pairs_file, tmp_path / "run", use_qlora=True)
    assert "are not merged into 4-bit weights; use lora_start continue" in cli.failure(capsys, on_adapters)
