"""Every loss through the command line: against a plain trainer with its formula by hand, and however a step is cut."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.losses import LOSSES
from open_po.packing import Sampler
from open_po.training.gradients import StepGradients
from tests import cli, tiny
from tests.plain import REJECTED, Plain, Recipe, Scores, assert_metrics
from tests.recipes import LEARNING_RATE, RECIPES, Formula, fields_of, logistic, on_ratios, sgd

# One of each way in which a step's pairs are coupled, and of what else a step adds up; slowly all are cut.
CUT_DAILY = ("kto_pair-detached", "bco_pair-running", "mix-coupled", "orpo-prompt", "mix")


def test_every_loss_has_a_recipe() -> None:
    assert {name.split("-")[0] for name in RECIPES} - {"mix"} == set(LOSSES)


# A loss's further conventions are its formula's, which tests/losses has; here one of each trains every day.
DAILY = {name.split("-")[0]: name for name in reversed(RECIPES)}.values()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DAILY else pytest.mark.slow) for name in RECIPES]
)
def test_a_run_equals_a_plain_trainer(name: str, llama: Path, tmp_path: Path) -> None:
    """Weights, losses, log-probs and rewards over two epochs of 7 pairs in steps of 4, and of the held-out pairs."""
    rows, held_out = tiny.text_rows(7, seed=3), tiny.text_rows(5, seed=4)
    recipe = Recipe(loss=RECIPES[name][1](), flags={}, optimizer=sgd)
    output = cli.train(
        llama,
        tiny.write_jsonl(tmp_path / "data.jsonl", rows),
        tmp_path / "run",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_epochs=2,
        max_tokens_per_batch=90,
        eval_mixer_list=[tiny.write_jsonl(tmp_path / "held_out.jsonl", held_out), "5"],
        **fields_of(name),
    )
    plain, before = Plain.of(llama, rows, recipe), Plain.of(llama, held_out, recipe)
    sampler = Sampler(num_pairs=7, global_batch=4, seed=42)
    plain.train([sampler.step_pairs(step) for step in range(4)], learning_rate=fields_of(name)["learning_rate"])
    cli.assert_close_weights(cli.weights(output), plain.model.state_dict(), cli.weights(llama))
    for mine, expected in zip(cli.steps(output), plain.records, strict=True):
        if name.startswith("sft"):
            expected = {k: v for k, v in expected.items() if k not in REJECTED}
        assert_metrics(mine, {"train_loss" if k == "loss" else k: v for k, v in expected.items()})
    reference = before.score(range(5), grad=False)
    with torch.no_grad():
        expected, _ = Plain(plain.model, before.pairs, recipe).metrics(range(5), reference, grad=False)
    last = [record for record in cli.metrics(output) if "eval/loss" in record][-1]
    assert_metrics(last, {k if k == "ties" else f"eval/{k}": v for k, v in expected.items()})


# ------------------------------------------------------------------------------------- however eight pairs are cut up

ONE_BATCH = {"per_device_train_batch_size": 8}
# The reference is cut like the policy: where a loss has a kink at log-ratios of 0, as kto_pair's graph has, rounding
# of the first step's zeros would decide on which side it is taken.
CUTS: dict[str, dict[str, Any]] = {
    "8x1": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "max_tokens_per_batch": 1,
        "reference_max_tokens_per_batch": 1,
    },
    "odd": {
        "per_device_train_batch_size": 8,
        "max_tokens_per_batch": 137,
        "reference_max_tokens_per_batch": 137,
    },
}
RANKS = {"per_device_train_batch_size": 4, "max_tokens_per_batch": 100, "reference_max_tokens_per_batch": 100}


@pytest.fixture(scope="module")
def eight_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("eight") / "data.jsonl", tiny.text_rows(8, seed=5))


def steps_of(name: str, optimizer: str) -> dict[str, Any]:
    """Three steps of the same size."""
    rate = {"adamw": 1e-3, "sgd": fields_of(name)["learning_rate"]}[optimizer]
    more = {"num_epochs": 3, "optimizer": optimizer, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    return fields_of(name) | more | {"learning_rate": rate, "preprocessing_num_workers": 1}


def assert_same_steps(one: Path, other: Path, start: Path) -> None:
    # AdamW's first steps are the gradient's sign: a weight or two whose gradient is rounding noise go their own way.
    cli.assert_close_weights(cli.weights(other), cli.weights(one), cli.weights(start), share=3e-4)
    for mine, theirs in zip(cli.steps(other), cli.steps(one), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=3e-5, abs=1e-6)


def cuts(name: str, optimizer: str, llama: Path, data: Path, folder: Path) -> None:
    fields = steps_of(name, optimizer)
    one = cli.train(llama, data, folder / "one" / "run", **(fields | ONE_BATCH))
    for cut, changes in CUTS.items():
        assert_same_steps(one, cli.train(llama, data, folder / cut / "run", **(fields | changes)), llama)


@pytest.mark.parametrize("name", CUT_DAILY)
def test_a_step_does_not_depend_on_how_it_was_cut(name: str, llama: Path, eight_pairs: Path, tmp_path: Path) -> None:
    cuts(name, "adamw", llama, eight_pairs, tmp_path)


@pytest.mark.parametrize("name", ["bco_pair-running", "mix-coupled"])
def test_two_ranks_take_the_step_of_one(name: str, llama: Path, eight_pairs: Path, tmp_path: Path) -> None:
    fields = steps_of(name, "adamw")
    one = cli.train(llama, eight_pairs, tmp_path / "one" / "run", **(fields | ONE_BATCH))
    words = cli.arguments(llama, eight_pairs, tmp_path / "two" / "run", **(fields | RANKS))
    assert cli.forked_ranks(words) == [0, 0]
    assert_same_steps(one, tmp_path / "two" / "run", llama)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_loss_depends_on_cut_or_ranks(
    name: str, optimizer: str, llama: Path, eight_pairs: Path, tmp_path: Path
) -> None:
    cuts(name, optimizer, llama, eight_pairs, tmp_path)
    fields = steps_of(name, optimizer)
    words = cli.arguments(llama, eight_pairs, tmp_path / "two" / "run", **(fields | RANKS))
    assert cli.forked_ranks(words) == [0, 0]
    assert_same_steps(tmp_path / "one" / "run", tmp_path / "two" / "run", llama)


def test_a_divisor_wrong_by_two_is_noticed(
    llama: Path, eight_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = StepGradients.backward

    def wrong(self: StepGradients, indices: list[int], size: Any) -> Any:
        counts = replace(size.counts, pairs=2 * size.counts.pairs)
        return backward(self, indices, replace(size, counts=counts))

    one = cli.train(llama, eight_pairs, tmp_path / "one" / "run", **(steps_of("dpo", "sgd") | ONE_BATCH))
    monkeypatch.setattr(StepGradients, "backward", wrong)
    other = cli.train(llama, eight_pairs, tmp_path / "other" / "run", **(steps_of("dpo", "sgd") | ONE_BATCH))
    with pytest.raises(AssertionError):
        cli.assert_close_weights(cli.weights(other), cli.weights(one), cli.weights(llama))


def test_a_coupled_loss_resumes_with_its_running_mean(llama: Path, eight_pairs: Path, tmp_path: Path) -> None:
    fields = steps_of("bco_pair-running", "adamw") | ONE_BATCH | {"checkpointing_steps": 1}
    whole = cli.train(llama, eight_pairs, tmp_path / "whole", **fields)
    checkpoint = whole / "checkpoints" / "step_000002"
    resumed = cli.train(llama, eight_pairs, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **fields)
    assert cli.equal(cli.weights(resumed), cli.weights(whole))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_coupled_losses_see_the_same_dropout_twice(architecture: str, eight_pairs: Path, tmp_path: Path) -> None:
    """With adapters' dropout, a coupled loss that happens to be a sum over pairs equals its uncoupled form."""
    llama = tiny.make_model_folder(tmp_path / "model", architecture)
    fields = steps_of("bco_pair-none", "adamw") | ONE_BATCH
    if architecture == "mixtral":
        fields |= {"load_balancing_loss": True, "lora_target_modules": ["q_proj", "v_proj"]}
    fields |= {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.5}
    fields |= {"learning_rate": 1e-2, "max_tokens_per_batch": 100}
    plain = cli.train(llama, eight_pairs, tmp_path / "plain" / "run", **fields)
    mixed = fields | {"loss_type": ["bco_pair", "kto_pair"], "loss_weights": [1.0, 1e-12]}
    mixed["convention"] = ["no_shift", "null"]
    coupled = cli.train(llama, eight_pairs, tmp_path / "coupled" / "run", **mixed)
    for mine, theirs in zip(cli.steps(coupled), cli.steps(plain), strict=True):
        assert mine["loss/bco_pair"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert math.isclose(mine["grad_norm"], theirs["grad_norm"], rel_tol=1e-4)


# ------------------------------------------------------------------------------------------------------------ LD-DPO


def ld_dpo(beta: float, alpha: float, rows: list[dict[str, str]], folder: Path) -> tuple[Plain, Formula]:
    """The plain trainer whose log-probs discount tokens beyond the pair's shorter response."""

    class Discounted(Plain):
        def score(self, indices: Any, *, grad: bool) -> Scores:
            scores = super().score(indices, grad=grad)
            with torch.set_grad_enabled(grad):
                for side, name in ((1, "chosen"), (2, "rejected")):
                    values = []
                    for i in indices:
                        prompt, response = self.pairs[i][0], self.pairs[i][side]
                        shorter = min(len(self.pairs[i][1]), len(self.pairs[i][2]))
                        logits = self.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                        own = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
                        values.append(own[:shorter].sum() + alpha * own[shorter:].sum())
                    setattr(scores, name, torch.stack(values))
            return scores

    formula = on_ratios(beta, logistic)
    plain = Plain.of(folder, rows, Recipe(loss=formula, flags={}, optimizer=sgd))
    return Discounted(plain.model, plain.pairs, plain.recipe), formula


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_ld_alpha_equals_a_plain_trainer(alpha: float, llama: Path, tmp_path: Path) -> None:
    rows = tiny.text_rows(7, seed=3)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    fields = {"per_device_train_batch_size": 4, "num_epochs": 2, "learning_rate": LEARNING_RATE, "optimizer": "sgd"}
    fields |= {"max_tokens_per_batch": 150, "beta": 0.1}
    output = cli.train(llama, data, tmp_path / "run", ld_alpha=alpha, **fields)
    plain, _ = ld_dpo(0.1, alpha, rows, llama)
    sampler = Sampler(num_pairs=7, global_batch=4, seed=42)
    plain.train([sampler.step_pairs(step) for step in range(4)], learning_rate=LEARNING_RATE)
    cli.assert_close_weights(cli.weights(output), plain.model.state_dict(), cli.weights(llama))
    for mine, expected in zip(cli.steps(output), plain.records, strict=True):
        assert_metrics(mine, {"train_loss" if k == "loss" else k: v for k, v in expected.items()})


def test_a_cache_of_sums_is_a_miss_for_ld_alpha_and_one_of_tokens_a_hit_for_all(llama: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.text_rows(5, seed=3))

    def computed(name: str, **fields: Any) -> int:
        return int(cli.summary(cli.train(llama, data, tmp_path / name, **fields))["reference"]["pairs_computed"])

    assert computed("sums") == 5
    assert computed("tokens", ld_alpha=0.5) == 5
    assert computed("other alpha", ld_alpha=0.1) == 0
    assert computed("sums again", loss_type="dpo_norm") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ld_alpha": 1.5}, "ld_alpha: must lie in [0, 1], got 1.5"),
        ({"ld_alpha": 0.5, "loss_type": "sft"}, "ld_alpha: needs both responses of a pair scored, which sft does not"),
    ],
)
def test_ld_alpha_refusals(flags: dict[str, Any], message: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(cli.arguments(tmp_path, tmp_path, tmp_path / "run", **flags)) == 2
    assert f"config error: {message}\n" in capsys.readouterr().err
