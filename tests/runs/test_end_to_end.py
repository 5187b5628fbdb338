"""Whole runs of the command line: their numbers against a plain trainer written here, and their files."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_po.config import load_config
from open_po.packing import Sampler
from tests import cli, tiny
from tests.plain import REJECTED, Plain, Recipe, Scores, assert_metrics


def dpo(beta: float, *, smoothing: float = 0.0, gamma: float = 0.0, per_token: bool = False) -> Callable[..., Any]:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        if per_token:
            chosen, rejected = chosen / policy.chosen_tokens, rejected / policy.rejected_tokens
        z = beta * chosen - beta * rejected - gamma
        losses = (1 - smoothing) * torch.log(1 + torch.exp(-z)) + smoothing * torch.log(1 + torch.exp(z))
        return losses, beta * chosen, beta * rejected

    return loss


def hinge(beta: float, delta: float) -> Callable[..., Any]:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
        return (delta - chosen + rejected).clamp(min=0), chosen, rejected

    return loss


def likelihood(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
    return -policy.chosen, policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens


RECIPES = {
    "dpo": Recipe(loss=dpo(0.1), flags={"loss_type": "dpo"}),
    "smoothed": Recipe(loss=dpo(0.3, smoothing=0.2), flags={"loss_type": "dpo", "beta": 0.3, "label_smoothing": 0.2}),
    "dpo_norm": Recipe(loss=dpo(5.0, per_token=True), flags={"loss_type": "dpo_norm"}),
    "dpo_gamma": Recipe(loss=dpo(0.1, gamma=0.7), flags={"loss_type": "dpo_gamma", "gamma": 0.7}),
    "slic_dpo": Recipe(loss=hinge(0.2, 1.5), flags={"loss_type": "slic_dpo", "beta": 0.2, "delta": 1.5}),
    "sft": Recipe(loss=likelihood, flags={"loss_type": "sft"}, tokens_divide=True),
    "cosine": Recipe(  # with weight decay on matrices only and gradients that stay as they are
        loss=dpo(0.1),
        flags={"lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "weight_decay": 0.5, "max_grad_norm": 0},
        optimizer=lambda parameters: torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.5},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ]
        ),
        rate=lambda step, steps: (
            (step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 2)))
        ),
        max_grad_norm=math.inf,
    ),
    "rmsprop": Recipe(
        loss=dpo(0.1),
        flags={
            "optimizer": "rmsprop",
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_ratio": 0.4,
            "max_grad_norm": 0.5,
        },
        optimizer=torch.optim.RMSprop,
        rate=lambda step, steps: min(1.0, (step + 1) / 4),
        max_grad_norm=0.5,
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_equals_a_plain_trainer(name: str, llama: Path, tmp_path: Path) -> None:
    """Weights and every metric, over three epochs of 11 pairs in steps of 4, the last of each epoch being smaller."""
    recipe, rows, held_out = RECIPES[name], tiny.text_rows(11, seed=3), tiny.text_rows(7, seed=4)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    output = cli.train(
        llama,
        data,
        tmp_path / "run",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_epochs=3,
        max_tokens_per_batch=150,
        eval_mixer_list=[tiny.write_jsonl(tmp_path / "held_out.jsonl", held_out), "7"],
        eval_steps=4,
        **recipe.flags,
    )
    plain = Plain.of(llama, rows, recipe)
    before = Plain.of(llama, held_out, recipe)
    sampler = Sampler(num_pairs=11, global_batch=4, seed=42)
    plain.train([sampler.step_pairs(step) for step in range(9)], learning_rate=2e-3)

    cli.assert_close_weights(cli.weights(output), plain.model.state_dict(), cli.weights(llama))
    got = cli.steps(output)
    assert [record["training_step"] for record in got] == list(range(1, 10))
    assert [record["epoch"] for record in got] == pytest.approx(
        [(s // 3) + (0, 4, 8)[s % 3] / 11 for s in range(1, 10)]
    )
    for mine, expected in zip(got, plain.records, strict=True):
        if name == "sft":
            assert not set(REJECTED) & set(mine)  # rejected responses are not even scored in training
            expected = {k: v for k, v in expected.items() if k not in REJECTED}
        elif mine["training_step"] > 1:  # at first the policy is its reference
            assert expected["ties"] < 0.3
        assert_metrics(mine, {"train_loss" if k == "loss" else k: v for k, v in expected.items()})

    evaluations = [record for record in cli.metrics(output) if "eval/loss" in record]
    assert [record["training_step"] for record in evaluations] == [0, 4, 8, 9]
    reference = before.score(range(7), grad=False)
    for record, model in ((evaluations[0], before.model), (evaluations[-1], plain.model)):
        expected, _ = Plain(model, before.pairs, recipe).metrics(range(7), reference, grad=False)
        assert_metrics(record, {k if k == "ties" else f"eval/{k}": v for k, v in expected.items()})
    assert cli.summary(output)["eval"] == {k.removeprefix("eval/"): v for k, v in evaluations[-1].items()}


# ---------------------------------------------------------------------------------- runs that must come to the same end


@pytest.fixture(scope="module")
def eight_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("eight") / "data.jsonl", tiny.text_rows(8, seed=5))


@pytest.fixture(scope="module")
def as_8x1(llama: Path, eight_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("8x1") / "run"
    return cli.train(llama, eight_pairs, output, per_device_train_batch_size=8, num_epochs=6)


@pytest.mark.parametrize(
    "fields",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"max_tokens_per_batch": 1},  # every pair alone
        {"max_tokens_per_batch": 100},
        {"gradient_checkpointing": True},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_cutting_a_step_differently_changes_nothing(
    fields: dict[str, Any], as_8x1: Path, llama: Path, eight_pairs: Path, tmp_path: Path
) -> None:
    given = {"per_device_train_batch_size": 8, "num_epochs": 6} | fields
    output = cli.train(llama, eight_pairs, tmp_path / "run", **given)
    cli.assert_close_weights(cli.weights(output), cli.weights(as_8x1), cli.weights(llama))
    for mine, expected in zip(cli.steps(output), cli.steps(as_8x1), strict=True):
        for name in ("train_loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-5), name


def test_gradient_checkpointing_recomputes_activations(
    llama: Path, eight_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag does something: the layers run twice per training pass."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        return forward(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    counts = []
    for on in (False, True):
        calls.clear()
        fields = {"per_device_train_batch_size": 8, "gradient_checkpointing": on, "loss_type": "sft"}
        cli.train(llama, eight_pairs, tmp_path / str(on), **fields)
        counts.append(len(calls))
    assert counts[1] - counts[0] == 2, "both layers a second time; what the check at start does is the same in both"


def test_the_seed_orders_the_data(llama: Path, eight_pairs: Path, as_8x1: Path, tmp_path: Path) -> None:
    one, same, other = (
        cli.train(llama, eight_pairs, tmp_path / name, seed=seed)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert cli.equal(cli.weights(one), cli.weights(same))
    assert cli.steps(one)[0]["logps/chosen"] != pytest.approx(cli.steps(other)[0]["logps/chosen"], rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- files

TRAINING = {
    "training_step",
    "learning_rate",
    "epoch",
    "train_loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/average",
    "rewards/accuracy",
    "rewards/margin",
    "grad_norm",
    "optim/update_fraction",
    "perf/tokens_per_second",
    "perf/pairs_per_second",
    "perf/peak_memory_gb",
}
MEASURES = {name for name in TRAINING if name.startswith(("logps", "rewards"))}


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of 24 pairs, 6 steps, with held-out data and checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    data = tiny.write_jsonl(folder / "pairs.jsonl", tiny.text_rows(24))
    held_out = tiny.write_jsonl(folder / "held_out.jsonl", tiny.text_rows(5, seed=9))
    fields = {"eval_mixer_list": [held_out, "1.0"], "eval_steps": 4, "checkpointing_steps": 3}
    return cli.train(llama, data, folder / "run", exp_name="a run", **fields)


def test_a_run_leaves_a_whole_folder(finished: Path) -> None:
    step = {"weights.safetensors", "optimizer.pt", "training.pt", "trainer_state.json"}
    assert cli.files(finished) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.yaml",
        "metrics.jsonl",
        "run_summary.json",
        ".progress.json",
        "training_curves.png",
        "README.md",
        *(f"checkpoints/step_{number:06d}/{name}" for number in (3, 6) for name in step),
    }


def test_the_saved_model_is_the_trained_one_and_generates(finished: Path, llama: Path) -> None:
    trained = cli.load_file(finished / "checkpoints" / "step_000006" / "weights.safetensors")
    assert cli.equal({f"model.{name}": value for name, value in cli.weights(finished).items()}, trained)
    assert "open_po" not in (finished / "config.json").read_text(), "the saved model has transformers' own attention"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    prompt = tokenizer("the red cat", return_tensors="pt")
    assert (
        prompt["input_ids"].tolist()
        == AutoTokenizer.from_pretrained(llama)("the red cat", return_tensors="pt")["input_ids"].tolist()
    )
    answer = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 5


def test_metrics_have_the_published_names(finished: Path, llama: Path, eight_pairs: Path, tmp_path: Path) -> None:
    for record in cli.steps(finished):
        assert set(record) == TRAINING
    held_out = [set(record) for record in cli.metrics(finished) if "train_loss" not in record]
    lengths = {"eval/lengths/chosen", "eval/lengths/rejected"}
    assert held_out == 3 * [{"training_step", "eval/loss", *lengths, *(f"eval/{name}" for name in MEASURES)}]
    for record in cli.steps(cli.train(llama, eight_pairs, tmp_path / "sft", loss_type="sft")):
        assert set(record) == TRAINING - set(REJECTED)


def test_throughput_agrees_with_the_counts(finished: Path) -> None:
    records, train = cli.steps(finished), cli.summary(finished)["train"]
    seconds = sum(4 / record["perf/pairs_per_second"] for record in records)
    assert seconds == pytest.approx(train["seconds"], rel=1e-6)
    tokens = sum(4 / r["perf/pairs_per_second"] * r["perf/tokens_per_second"] for r in records)
    assert tokens == pytest.approx(train["tokens"], rel=1e-6)


def test_logging_less_often_averages_over_the_window(finished: Path, llama: Path, tmp_path: Path) -> None:
    """22 pairs in 6 steps, the last of 2 pairs; lines at steps 4 and 6, the last window being shorter."""
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.text_rows(22))
    every, fourth = (
        cli.steps(cli.train(llama, data, tmp_path / str(number), logging_steps=number)) for number in (1, 4)
    )
    assert [record["training_step"] for record in fourth] == [4, 6]
    for line, window, pairs in ((fourth[0], every[:4], [4, 4, 4, 4]), (fourth[1], every[4:], [4, 2])):
        assert line["train_loss"] == pytest.approx(np.mean([record["train_loss"] for record in window]), rel=1e-6)
        for name in MEASURES:
            mean = np.average([record[name] for record in window], weights=pairs)
            assert line[name] == pytest.approx(mean, rel=1e-6), name
        for name in ("grad_norm", "learning_rate", "epoch"):
            assert line[name] == window[-1][name]


def test_the_summary_counts_what_was_done(finished: Path) -> None:
    tokenizer, content = AutoTokenizer.from_pretrained(finished), cli.summary(finished)
    prompt = response = 0
    for row in tiny.text_rows(24):
        prompt += 2 * len(tokenizer(row["prompt"])["input_ids"])
        response += sum(len(tokenizer(row[name])["input_ids"]) + 1 for name in ("chosen", "rejected"))
    assert content["status"] == "completed"
    assert content["train"].pop("seconds") > 0
    packing = content["train"].pop("packing")
    assert content["train"] == {
        "steps": 6,
        "pairs": 24,
        "tokens": prompt + response,
        "response_tokens": response,
        "max_tokens_per_batch": 1024,
        "layout": "shared",
    }
    assert (packing["packs"], packing["prompt_tokens_saved"]) == (6, 0.5)
    assert packing["fill"] == pytest.approx((prompt / 2 + response) / (6 * 2 * 4 * 128))
    assert content["reference"].pop("seconds") > 0
    reference = content["reference"].pop("packing")
    assert (reference["packs"], reference["prompt_tokens_saved"]) == (2, 0.5)  # one of each data set
    assert 0.3 < reference["fill"] < 1, "on a CPU the budget is that of training"
    for padding_avoided in (packing["padding_avoided"], reference["padding_avoided"]):
        assert 0.1 < padding_avoided < 0.5
    assert content["reference"] == {
        "pairs_computed": 29,
        "pairs_reused": 0,
        "responses_computed": 58,
        "rows_verified": 0,
        "max_tokens_per_batch": 1024,
    }
    assert 1e8 < content["peak_memory_bytes"] < 1e11
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "open_po", "transformers"} <= set(content["versions"])
    last = cli.metrics(finished)[-1]
    assert content["eval"] == {name.removeprefix("eval/"): value for name, value in last.items()}


def test_config_yaml_is_the_run_again(finished: Path, tmp_path: Path) -> None:
    config = load_config([str(finished / "config.yaml")])
    assert config.to_yaml() == (finished / "config.yaml").read_text()
    assert config.output.output_dir == str(finished)
    assert cli.main([str(finished / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert cli.equal(cli.weights(tmp_path / "again"), cli.weights(finished))
    assert cli.without_perf(cli.metrics(tmp_path / "again")) == cli.without_perf(cli.metrics(finished))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_dropout_is_off_in_training_and_kept_in_the_saved_config(
    architecture: str, eight_pairs: Path, tmp_path: Path
) -> None:
    rates = {"gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.4}, "llama": {"attention_dropout": 0.3}}
    runs = []
    for scale in (1.0, 0.0):
        settings = {name: scale * rate for name, rate in rates[architecture].items()}
        model = tiny.make_model_folder(tmp_path / f"model{scale}", architecture, **settings)
        runs.append(cli.train(model, eight_pairs, tmp_path / f"run{scale}"))
        saved = json.loads((runs[-1] / "config.json").read_text())
        assert {name: saved[name] for name in settings} == settings
    assert cli.equal(cli.weights(runs[0]), cli.weights(runs[1]))


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_save_dtype(save_dtype: str, llama: Path, eight_pairs: Path, as_8x1: Path, tmp_path: Path) -> None:
    fields = {"per_device_train_batch_size": 8, "num_epochs": 6, "save_dtype": save_dtype}
    output = cli.train(llama, eight_pairs, tmp_path / "run", **fields)
    dtype = getattr(torch, save_dtype)
    assert cli.equal(cli.weights(output), {name: value.to(dtype) for name, value in cli.weights(as_8x1).items()})
    assert AutoModelForCausalLM.from_pretrained(output).dtype == dtype


def test_bfloat16_moves_weights_at_a_tiny_learning_rate(llama: Path, eight_pairs: Path, tmp_path: Path) -> None:
    """Weights train in float32 whatever they compute in: at 1e-6 a bfloat16 weight of 0.15 would stay as it is."""
    output = cli.train(
        llama, eight_pairs, tmp_path / "run", dtype="bfloat16", save_dtype="float32", learning_rate=1e-6, num_epochs=2
    )
    before, after = cli.weights(llama), cli.weights(output)
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    assert (before[name] != after[name]).float().mean() > 0.9
    assert (before[name].bfloat16() == after[name].bfloat16()).float().mean() > 0.95


# -------------------------------------------------------------------------------------------------- for a person to see


def pixels(path: Path, colour: tuple[int, int, int]) -> int:
    """How many pixels of a picture have a colour."""
    return int((np.asarray(Image.open(path).convert("RGB")) == colour).all(-1).sum())


BLUE, RED = (31, 119, 180), (214, 39, 40)


@pytest.mark.slow
def test_curves_are_drawn_for_runs_of_any_length(llama: Path, eight_pairs: Path, tmp_path: Path) -> None:
    for name, fields in {
        "one": {"max_train_steps": 1},
        "sixty": {"per_device_train_batch_size": 1, "num_epochs": 8, "max_train_steps": 60},
        "sft": {"loss_type": "sft", "num_epochs": 4},
    }.items():
        picture = cli.train(llama, eight_pairs, tmp_path / name, **fields) / "training_curves.png"
        with Image.open(picture) as image:
            assert image.format == "PNG"
            width, height = image.size
        assert 800 <= width <= 2000, name
        assert 350 <= height <= 1500, name
        assert pixels(picture, BLUE) > 500, name  # more than what the legends have
        assert (pixels(picture, RED) > 40) == (name != "sft"), name


def test_the_console_shows_the_run(
    llama: Path, eight_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = cli.train(llama, eight_pairs, tmp_path / "run", eval_mixer_list=[eight_pairs, "3"], eval_steps=1)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Training data: 8 pairs" in shown.out
    assert "Policy: Layout shared: each prompt is computed once (within " in shown.out
    assert "Reference log-probs: 16 distinct responses in" in shown.out
    assert "Training: 2 steps in" in shown.out
    assert "Run completed" in shown.out
    assert str(output) in shown.out.replace("\n", "")
    before, after = (
        record["eval/loss"]
        for record in cli.metrics(output)
        if record["training_step"] in (0, 2) and "eval/loss" in record
    )
    assert f"{before:.4f} -> {after:.4f}" in shown.out
    assert not any(character in shown.out for character in "\r\x1b")
