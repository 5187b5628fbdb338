"""Reference log-probs: computed once, right, from the right weights, and found again."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

import open_po.model.prepare
from open_po.model.load import load_scorer
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource
from tests import cli, tiny
from tests.stores import assert_same, expected_rows, stored, stores


@pytest.fixture
def other_llama(tmp_path: Path) -> Path:
    """A model like `llama` with other weights."""
    return tiny.make_model_folder(tmp_path / "other_llama", seed=7)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that runs load, in order."""
    names: list[str] = []

    def load(source: ModelSource, *positional: Any) -> Scorer:
        names.append(source.name)
        return load_scorer(source, *positional)

    monkeypatch.setattr(open_po.model.prepare, "load_scorer", load)
    return names


def first_step_logratios(folder: Path) -> float:
    """Mean chosen reward of step 1, whose policy has not moved yet: 0 if the reference is the policy's start."""
    return cli.steps(folder)[0]["rewards/chosen"]


@pytest.mark.parametrize("max_tokens", [1, 100, 100_000])
def test_values_are_those_of_transformers_one_response_at_a_time(
    max_tokens: int, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    cli.train(llama, pairs_file, tmp_path / "run", max_tokens_per_batch=max_tokens, max_train_steps=1)
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, tiny.text_rows(24)))


def test_another_loss_finds_everything_in_the_cache(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    first = cli.train(llama, pairs_file, tmp_path / "first", max_train_steps=1)
    done = cli.summary(first)["reference"]
    assert (done["pairs_computed"], done["pairs_reused"], done["packing"]["packs"]) == (24, 0, 1)
    before = cli.files(tmp_path / "reference")
    values = stored(tmp_path / "reference")
    others = {
        "loss": {"loss_type": "dpo_norm", "beta": 2.0},
        "seed": {"seed": 7},
        "batch": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_tokens_per_batch": 77},
        "optimizer": {"optimizer": "rmsprop", "learning_rate": 1e-4, "gradient_checkpointing": True},
        "subset": {"mixer_list": [pairs_file, "0.5"]},
        "layout": {"prompt_sharing": "off", "reference_max_tokens_per_batch": 200, "group_pairs_by_prompt": True},
    }
    for name, fields in others.items():
        again = cli.summary(cli.train(llama, pairs_file, tmp_path / name, max_train_steps=1, **fields))["reference"]
        assert (again["pairs_computed"], again["pairs_reused"]) == (0, 12 if name == "subset" else 24), name
        assert again["packing"] is None, name
    memo = {"file_hashes.json"}  # of the model's files, once these are old enough
    assert cli.files(tmp_path / "reference") - memo == before - memo
    assert stored(tmp_path / "reference") == values


def test_a_cached_run_trains_exactly_as_the_first(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    first = cli.train(llama, pairs_file, tmp_path / "first")
    second = cli.train(llama, pairs_file, tmp_path / "second")
    assert cli.equal(cli.weights(first), cli.weights(second))
    assert cli.without_perf(cli.metrics(first)) == cli.without_perf(cli.metrics(second))


def test_only_what_is_missing_is_computed(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    cli.train(llama, pairs_file, tmp_path / "first", mixer_list=[pairs_file, "10"], max_train_steps=1)
    rows = tiny.text_rows(24)
    more = tiny.write_jsonl(tmp_path / "more.jsonl", [*rows, *rows[:3], *tiny.text_rows(4, seed=8)])
    part = cli.summary(cli.train(llama, more, tmp_path / "second", max_train_steps=1))["reference"]
    assert part["pairs_computed"] + part["pairs_reused"] == 31
    assert 10 <= part["pairs_reused"] <= 13  # three rows come twice, and are among the ten or not
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, rows + tiny.text_rows(4, seed=8)))


def test_held_out_pairs_are_in_the_same_pass(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.text_rows(5, seed=9))
    output = cli.train(llama, pairs_file, tmp_path / "run", eval_mixer_list=[held_out, "1.0"], max_train_steps=1)
    assert cli.summary(output)["reference"]["pairs_computed"] == 29
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, tiny.text_rows(24) + tiny.text_rows(5, seed=9)))


def add_to_a_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_the_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [add_to_a_weight, change_the_config])
def test_a_model_changed_in_place_is_computed_anew(
    change: Callable[[Path], None], llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    cli.train(model, pairs_file, tmp_path / "first", max_train_steps=1)
    (old_store,) = stores(tmp_path / "reference")
    old = stored(tmp_path / "reference")
    change(model)
    output = cli.train(model, pairs_file, tmp_path / "second", max_train_steps=1)
    assert cli.summary(output)["reference"]["pairs_computed"] == 24
    shutil.rmtree(old_store)
    new = stored(tmp_path / "reference")
    assert_same(new, expected_rows(model, tiny.text_rows(24)))
    assert any(abs(old[key][0] - logp) > 1e-3 for key, (logp, _) in new.items())


def test_a_moved_model_is_found_again(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """The weights are the key, not their path."""
    cli.train(llama, pairs_file, tmp_path / "first", max_train_steps=1)
    shutil.copytree(llama, tmp_path / "copy")
    output = cli.train(tmp_path / "copy", pairs_file, tmp_path / "second", max_train_steps=1)
    assert cli.summary(output)["reference"]["pairs_reused"] == 24


def test_another_dtype_has_a_store_of_its_own(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    cli.train(llama, pairs_file, tmp_path / "first", max_train_steps=1)
    output = cli.train(llama, pairs_file, tmp_path / "second", max_train_steps=1, dtype="bfloat16")
    assert cli.summary(output)["reference"]["pairs_computed"] == 24
    manifests = [json.loads((path / "manifest.json").read_text()) for path in stores(tmp_path / "reference")]
    assert {m["numerics"]["compute_dtype"] for m in manifests} == {"float32", "bfloat16"}


def test_a_separate_reference_model_is_used(
    llama: Path, other_llama: Path, pairs_file: Path, tmp_path: Path, loaded: list[str]
) -> None:
    """The losses of step 1, whose policy has not moved, follow from both models' log-probs by the formula."""
    output = cli.train(
        llama,
        pairs_file,
        tmp_path / "run",
        per_device_train_batch_size=24,
        reference_model_name_or_path=other_llama,
    )
    assert loaded == [str(other_llama), str(llama)]
    rows = tiny.text_rows(24)
    policy, reference = expected_rows(llama, rows), expected_rows(other_llama, rows)
    assert_same(stored(tmp_path / "reference"), reference)
    ratios = [policy[key][0] - reference[key][0] for key in policy]  # chosen and rejected by turns
    margins = torch.tensor([0.1 * (ratios[i] - ratios[i + 1]) for i in range(0, len(ratios), 2)])
    record = cli.steps(output)[0]
    assert record["train_loss"] == pytest.approx(float(-margins.sigmoid().log().mean()), rel=1e-5)
    assert record["rewards/margin"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert record["rewards/accuracy"] == pytest.approx(float((margins > 0).float().mean()))


def test_a_cached_reference_model_is_loaded_only_to_be_verified(
    llama: Path, other_llama: Path, pairs_file: Path, tmp_path: Path, loaded: list[str]
) -> None:
    fields = {"reference_model_name_or_path": other_llama}
    first = cli.train(llama, pairs_file, tmp_path / "first", **fields)
    loaded.clear()
    second = cli.train(llama, pairs_file, tmp_path / "second", verify_reference_rows=0, **fields)
    assert loaded == [str(llama)]
    assert cli.equal(cli.weights(first), cli.weights(second))
    third = cli.train(llama, pairs_file, tmp_path / "third", **fields)
    assert loaded[1:] == [str(other_llama), str(llama)], "some of its rows are verified"
    assert [cli.summary(run)["reference"]["rows_verified"] for run in (first, second, third)] == [0, 0, 4]


def test_a_separate_reference_model_is_freed_before_the_policy_loads(
    llama: Path, other_llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[nn.Module]] = []
    seen_at_load: list[int] = []

    def load(source: ModelSource, *positional: Any) -> Scorer:
        seen_at_load.append(sum(reference() is not None for reference in alive))
        scorer = load_scorer(source, *positional)
        alive.append(weakref.ref(scorer.model))
        return scorer

    gc.collect()
    gc.disable()  # freed by the run itself, not by chance
    try:
        monkeypatch.setattr(open_po.model.prepare, "load_scorer", load)
        cli.train(llama, pairs_file, tmp_path / "run", reference_model_name_or_path=other_llama, max_train_steps=1)
    finally:
        gc.enable()
    assert seen_at_load == [0, 0]


def test_the_policy_named_as_reference_is_loaded_once(
    llama: Path, pairs_file: Path, tmp_path: Path, loaded: list[str]
) -> None:
    cli.train(llama, pairs_file, tmp_path / "run", reference_model_name_or_path=llama, max_train_steps=1)
    assert loaded == [str(llama)]


def test_sft_computes_no_reference(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = cli.train(llama, pairs_file, tmp_path / "run", loss_type="sft", max_train_steps=1)
    assert cli.summary(output)["reference"] is None
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize("lora", [{}, {"use_lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_a_resumed_run_never_computes_the_reference_from_trained_weights(
    lora: dict[str, Any], llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The cache is lost, and a run that starts from a checkpoint fills it again with the same values."""
    whole = cli.train(llama, pairs_file, tmp_path / "whole", checkpointing_steps=2, num_epochs=2, **lora)
    values = stored(tmp_path / "reference")
    shutil.rmtree(tmp_path / "reference")
    for path in (whole / "checkpoints").glob("step_*"):
        if path.name > "step_000008":
            shutil.rmtree(path)
    (whole / "run_summary.json").unlink()
    expected = cli.weights(whole)
    again = cli.train(
        llama, pairs_file, whole, checkpointing_steps=2, num_epochs=2, resume_from_checkpoint="auto", **lora
    )
    assert cli.summary(again)["reference"]["pairs_computed"] == 24
    assert stored(tmp_path / "reference") == values
    assert cli.equal(cli.weights(again), expected)


def test_lora_starts_alike_whether_its_reference_was_computed_or_cached(
    llama: Path, other_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Loading one more model must not shift the random numbers that new adapters are drawn from."""
    fields = {"use_lora": True, "lora_dropout": 0.1, "reference_model_name_or_path": other_llama}
    first, second = (cli.train(llama, pairs_file, tmp_path / name, **fields) for name in ("first", "second"))
    assert cli.summary(second)["reference"]["pairs_computed"] == 0
    assert cli.equal(cli.weights(first), cli.weights(second))


def test_a_value_that_is_not_finite_is_never_stored(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    weights = load_file(model / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(model)
    (yes,) = tokenizer.convert_tokens_to_ids(["y"])
    weights["model.embed_tokens.weight"][yes] = float("inf")  # only rows that hold this token
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = tiny.text_rows(6)
    for row in rows:
        row["chosen"] = row["chosen"].replace(" yes", "")
    rows[4]["chosen"] += " yes"
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    line = cli.failure(capsys, cli.arguments(model, data, tmp_path / "run", max_tokens_per_batch=1))
    assert "row 5" in line
    assert "log-prob of the chosen response is nan" in line
    values = stored(tmp_path / "reference").values()
    assert all(abs(logp) < 1e6 for logp, _ in values)
    assert cli.summary(tmp_path / "run")["status"] == "failed"
