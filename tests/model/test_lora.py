"""LoRA: adapters train alone, the reference has none, and the saved model is base plus adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_po.commands import score as score_command
from open_po.config import ModelConfig
from open_po.data.tokenizer import load_tokenizer
from open_po.model.export import export_model
from open_po.model.lora import attach_lora
from open_po.model.numerics import Numerics
from open_po.packing import pack
from tests import cli, tiny
from tests.scoring import FLOAT32, PAIRS, as_matrix, load, scores_one_by_one
from tests.stores import stored

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
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny.make_model_folder(tmp_path / "model", **model_settings)
    none = tmp_path / "none.jsonl"  # which is not read before
    words = cli.arguments(model, none, tmp_path / "run", use_lora=True, lora_target_modules=modules)
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


KINDS: list[dict[str, Any]] = [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}]


@pytest.mark.parametrize("kind", KINDS, ids=["dora", "rslora", "both"])
def test_dora_and_rslora_are_those_of_peft(kind: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    """The same adapters on peft's own model score the same, and so does what is saved."""
    fields: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, **kind}
    config = ModelConfig(model_name_or_path=str(llama), lora_target_modules=["all-linear"], use_lora=True, **fields)
    scorer = load(llama)
    attach_lora(scorer, config)
    torch.manual_seed(0)
    for name, parameter in scorer.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(**settings, **kind)).eval()
    theirs.load_state_dict(scorer.model.state_dict())
    with torch.no_grad():
        got = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
        expected = scores_one_by_one(theirs, PAIRS, torch.float32)
        plain = scores_one_by_one(tiny.plain_model(llama), PAIRS, torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - plain).abs().max() > 0.1
    with scorer.as_reference():
        reference = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
    torch.testing.assert_close(reference, plain, rtol=1e-5, atol=1e-5)
    export_model(scorer, torch.float32, load_tokenizer(config), tmp_path / "saved")
    merged = theirs.merge_and_unload().state_dict()
    assert cli.equal(cli.weights(tmp_path / "saved"), merged)


def test_adapters_are_float32_on_a_bfloat16_base(llama: Path) -> None:
    scorer = load(llama, Numerics(compute_dtype=torch.bfloat16, weights_dtype=torch.bfloat16, use_liger=False))
    fields: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "use_dora": True}
    attach_lora(scorer, ModelConfig(model_name_or_path="m", lora_target_modules=["all-linear"], **fields))
    trained = {name: parameter for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 14  # A, B and the magnitude
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe"])
def test_adapters_on_experts_are_merged(architecture: str, tmp_path: Path) -> None:
    """peft wraps the adapter of one weight of the experts in that of another."""
    folder = tiny.make_model_folder(tmp_path / "model", architecture, **tiny.SHARING[architecture])
    scorer = load(folder)
    fields: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
    config = ModelConfig(model_name_or_path=str(folder), lora_target_modules=["all-linear"], **fields)
    attach_lora(scorer, config)
    torch.manual_seed(0)
    adapted = [(name, value) for name, value in scorer.named_parameters() if "lora_B" in name]
    assert any("experts" in name for name, _ in adapted)
    for _, value in adapted:
        torch.nn.init.normal_(value, std=0.1)
    export_model(scorer, torch.float32, load_tokenizer(config), tmp_path / "saved")
    with torch.no_grad():
        got = as_matrix(scorer.score(pack(PAIRS, layout="rows", pad_token_id=2)).logps)
        saved = scores_one_by_one(tiny.plain_model(tmp_path / "saved"), PAIRS, torch.float32)
    torch.testing.assert_close(saved, got, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def continued(trained: Path) -> Path:
    """A run that trains on the adapters of `trained`."""
    fields = {"use_lora": True, "lora_start": "continue", "learning_rate": 1e-2, "merge_on_save": False}
    fields |= {"checkpointing_steps": 3, "eval_mixer_list": [trained.parent / "pairs.jsonl", "1.0"]}
    output = trained.parent / "continued" / "run"
    output.parent.mkdir()
    return cli.train(trained / "adapter", trained.parent / "pairs.jsonl", output, **fields)


def test_adapters_that_are_trained_on_are_their_own_reference(continued: Path, trained: Path) -> None:
    """The reference is the starting adapters on their base: what the saved model of the first run scores."""
    assert cli.steps(continued)[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert cli.steps(continued)[-1]["rewards/margin"] > 0.1
    values = stored(continued.parent / "reference")
    model, tokenizer = tiny.plain_model(trained), AutoTokenizer.from_pretrained(trained)
    expected = []
    for row in tiny.text_rows(24):
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen"))
        response.append(tokenizer.eos_token_id)
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected.append(float(scores.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()))
    found = [logp for logp, _ in values.values()]
    assert all(min(abs(logp - other) for other in found) < 1e-4 for logp in expected)


def test_adapters_that_are_trained_on_stay_on_their_base(continued: Path, trained: Path, llama: Path) -> None:
    settings = json.loads((continued / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"], settings["lora_alpha"]) == (str(llama), 4, 8)
    start = load_file(trained / "adapter" / "adapter_model.safetensors")
    end = load_file(continued / "adapter_model.safetensors")
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_adapters_saved_alone_are_a_model_to_everything(
    continued: Path, trained: Path, llama: Path, tmp_path: Path
) -> None:
    assert not {"model.safetensors", "config.json", "adapter/adapter_config.json"} & cli.files(continued)
    evaluated = cli.summary(continued)["eval"]["logps/chosen"]
    out, data = tmp_path / "scores.jsonl", trained.parent / "pairs.jsonl"
    assert score_command.main(cli.flags(model=continued, data=data, out=out, reference_cache_dir=tmp_path / "c")) == 0
    scores = [json.loads(line)["chosen_logps"] for line in out.read_text().splitlines()]
    assert sum(scores) / len(scores) == pytest.approx(evaluated, rel=1e-5)
    by_peft = logits(AutoPeftModelForCausalLM.from_pretrained(continued).eval(), continued)
    by_transformers = logits(AutoModelForCausalLM.from_pretrained(continued).eval(), continued)
    torch.testing.assert_close(by_peft, by_transformers, rtol=1e-5, atol=1e-5)
    card = (continued / "README.md").read_text()
    assert f'base = AutoModelForCausalLM.from_pretrained("{llama.name}")' in card
    assert "model = PeftModel.from_pretrained(base, name)" in card
    assert "library_name: peft" in card


def test_a_folder_of_adapters_is_merged_and_trained_as_a_whole(trained: Path, tmp_path: Path) -> None:
    """The same as training what the first run saved merged."""
    data = trained.parent / "pairs.jsonl"
    runs = [
        cli.train(start, data, tmp_path / name / "run", max_train_steps=2, learning_rate=1e-3, optimizer="sgd")
        for name, start in (("adapters", trained / "adapter"), ("merged", trained))
    ]
    ours, theirs = (load_file(run / "model.safetensors") for run in runs)
    start = load_file(trained / "model.safetensors")
    for name, weight in ours.items():
        torch.testing.assert_close(weight - start[name], theirs[name] - start[name], rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(weight, start[name]) for name, weight in ours.items())


def test_a_resumed_run_takes_its_reference_from_the_adapters_it_started_with(
    continued: Path, trained: Path, tmp_path: Path
) -> None:
    """The cache is lost, and a run that goes on from a checkpoint computes the same values again."""
    run = tmp_path / "run"
    shutil.copytree(continued, run)
    shutil.rmtree(run / "checkpoints" / "step_000006")
    (run / "run_summary.json").unlink()
    fields = {"use_lora": True, "lora_start": "continue", "learning_rate": 1e-2, "merge_on_save": False}
    fields |= {"checkpointing_steps": 3, "eval_mixer_list": [trained.parent / "pairs.jsonl", "1.0"]}
    data = trained.parent / "pairs.jsonl"
    cli.train(trained / "adapter", data, run, resume_from_checkpoint="auto", **fields)
    assert stored(tmp_path / "reference") == stored(continued.parent / "reference")
    ends = [load_file(folder / "adapter_model.safetensors") for folder in (run, continued)]
    assert cli.equal(*ends)


def test_numerics_of_adapters_apart_have_their_own_key() -> None:
    """In bfloat16 a merged weight is rounded, which one beside its adapter is not."""
    apart, four = replace(FLOAT32, adapters_apart=True), replace(FLOAT32, four_bit=True)
    keys = [numerics.key() for numerics in (FLOAT32, apart, four)]
    assert all(keys.count(key) == 1 for key in keys)
    assert set(FLOAT32.key()) == {"compute_dtype", "weights_dtype", "kernels", "attention_version", "logprob_version"}


def test_adapters_that_cannot_be_trained_on_are_refused_in_one_line(
    trained: Path, llama: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(model: Path, **fields: Any) -> str:
        return cli.failure(capsys, cli.arguments(model, pairs_file, tmp_path / "run", use_lora=True, **fields))

    assert "lora_start: continue needs a folder of adapters" in refused(llama, lora_start="continue")
    on_merged = refused(trained / "adapter", merge_on_save=False)
    assert "are on no model that a folder holds; leave it out, or use lora_start continue" in on_merged
    for name, value in {"peft_type": "IA3", "modules_to_save": ["lm_head"], "bias": "all"}.items():
        folder = tmp_path / name
        shutil.copytree(trained / "adapter", folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {name: value}))
        line = refused(folder, lora_start="continue")
        assert line.startswith("error: lora_start: continue")
        assert (value if name == "peft_type" else name) in line
