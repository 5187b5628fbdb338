"""LoRA: adapters train alone, the reference has none, and the saved model is base plus adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import cli, tiny

LORA: dict[str, Any] = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "num_epochs": 3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters on everything but the head, 18 steps."""
    folder = tmp_path_factory.mktemp("lora")
    data = tiny.write_jsonl(folder / "pairs.jsonl", tiny.text_rows(24))
    return cli.train(llama, data, folder / "run", checkpointing_steps=6, **LORA)


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    batch = AutoTokenizer.from_pretrained(folder)("the red cat sleeps under a tree", return_tensors="pt")
    with torch.no_grad():
        result: torch.Tensor = model(**batch).logits
    return result


def test_the_saved_model_is_the_base_with_its_adapter(trained: Path, llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    before = logits(base, llama)
    with_adapter = logits(PeftModel.from_pretrained(base, trained / "adapter").eval(), llama)
    merged = logits(AutoModelForCausalLM.from_pretrained(trained).eval(), trained)
    assert (with_adapter - before).abs().max() > 0.1, "the adapter does nothing: the comparison would show nothing"
    torch.testing.assert_close(merged, with_adapter, rtol=1e-5, atol=1e-5)


def test_the_merged_weights_are_those_of_the_formula(trained: Path, llama: Path) -> None:
    """W + alpha / rank x B A for what has an adapter, W unchanged for the rest."""
    start, end = cli.weights(llama), cli.weights(trained)
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    adapted = 0
    for name, weight in start.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            adapted += 1
            weight = weight + 8 / 4 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(end[name], weight, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(end[name], weight), name
    assert adapted == 14  # seven linear layers in each of two blocks


def test_training_prefers_the_chosen_and_the_reference_has_no_adapters(trained: Path) -> None:
    """Adapters start as zero, so the first rewards are 0; and they grow against a reference that stays."""
    first, last = cli.steps(trained)[0], cli.steps(trained)[-1]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert last["rewards/margin"] > 0.5


def test_a_second_run_of_adapters_finds_the_base_model_in_the_cache(trained: Path, llama: Path, tmp_path: Path) -> None:
    fields = LORA | {"lora_rank": 2, "lora_target_modules": ["q_proj", "down_proj"], "num_epochs": 1}
    fields["reference_cache_dir"] = trained.parent / "reference"
    output = cli.train(llama, trained.parent / "pairs.jsonl", tmp_path / "run", **fields)
    assert cli.summary(output)["reference"]["pairs_reused"] == 24
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "down_proj"}
    assert {value.shape[0] for name, value in adapter.items() if "lora_A" in name} == {2}


def test_full_training_finds_the_reference_of_a_lora_run_in_float32(trained: Path, llama: Path, tmp_path: Path) -> None:
    output = cli.train(
        llama,
        trained.parent / "pairs.jsonl",
        tmp_path / "run",
        reference_cache_dir=trained.parent / "reference",
        max_train_steps=1,
    )
    assert cli.summary(output)["reference"]["pairs_reused"] == 24


def test_checkpoints_hold_adapters_only(trained: Path) -> None:
    weights = load_file(trained / "checkpoints" / "step_000018" / "weights.safetensors")
    assert len(weights) == 28
    assert all("lora_A" in name or "lora_B" in name for name in weights)
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    for name, value in weights.items():
        assert torch.equal(adapter[name.removeprefix("model.").replace(".default", "")], value)


def test_the_adapter_names_its_base_and_its_settings(trained: Path, llama: Path) -> None:
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(llama)
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0)


def test_adapter_dropout_is_on_in_training_and_off_in_evaluation(trained: Path, llama: Path, tmp_path: Path) -> None:
    data = trained.parent / "pairs.jsonl"
    fields = LORA | {"eval_mixer_list": [data, "1.0"], "per_device_train_batch_size": 24, "num_epochs": 4}
    plain, dropped, again = (
        cli.train(llama, data, tmp_path / name, lora_dropout=rate, **fields)
        for name, rate in (("plain", 0.0), ("dropped", 0.5), ("again", 0.5))
    )
    assert cli.equal(cli.weights(dropped), cli.weights(again))  # the seed draws the dropout
    assert cli.distance(cli.weights(dropped), cli.weights(plain)) > 0.01
    # The last evaluation scores what the saved model scores, so nothing is dropped in it.
    model = AutoModelForCausalLM.from_pretrained(dropped).eval()
    tokenizer = AutoTokenizer.from_pretrained(dropped)
    total = 0.0
    for row in tiny.text_rows(24):
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen"))
        response.append(tokenizer.eos_token_id)
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += float(scores.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    assert cli.summary(dropped)["eval"]["logps/chosen"] == pytest.approx(total / 24, rel=1e-5)


def test_gradient_checkpointing_trains_the_same_adapters(trained: Path, llama: Path, tmp_path: Path) -> None:
    fields = LORA | {"gradient_checkpointing": True}
    output = cli.train(llama, trained.parent / "pairs.jsonl", tmp_path / "run", **fields)
    cli.assert_close_weights(cli.weights(output), cli.weights(trained), cli.weights(llama))


@pytest.mark.parametrize(
    ("modules", "model_settings", "said"),
    [
        (["q_proj", "lm_head"], {}, "an adapter on the head is not supported"),
        (["embed_tokens"], {"tie_word_embeddings": True}, "an adapter on the embedding tied to the head"),
        (["no_such_layer"], {}, "no_such_layer"),
    ],
    ids=["head", "tied", "unknown"],
)
def test_targets_that_cannot_be_are_refused_in_one_line(
    modules: list[str],
    model_settings: dict[str, Any],
    said: str,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny.make_model_folder(tmp_path / "model", **model_settings)
    words = cli.arguments(model, pairs_file, tmp_path / "run", use_lora=True, lora_target_modules=modules)
    line = cli.failure(capsys, words)
    assert "lora_target_modules" in line
    assert said in line


def test_an_untied_embedding_may_have_an_adapter(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = cli.train(llama, pairs_file, tmp_path / "run", **(LORA | {"lora_target_modules": ["embed_tokens"]}))
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    with_adapter = logits(PeftModel.from_pretrained(base, output / "adapter").eval(), llama)
    merged = logits(AutoModelForCausalLM.from_pretrained(output).eval(), output)
    assert (merged - logits(AutoModelForCausalLM.from_pretrained(llama).eval(), llama)).abs().max() > 0.01
    torch.testing.assert_close(merged, with_adapter, rtol=1e-5, atol=1e-5)
