"""Every loss through the command line: against a plain trainer with its formula by hand, and however a step is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_po.losses import LOSSES
from open_po.packing import Sampler
from open_po.trainer import Trainer
from tests import cli, tiny
from tests.plain import REJECTED, Plain, Recipe, Scores, assert_metrics

Formula = Callable[[Scores, Scores], tuple[Tensor, Tensor, Tensor]]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x): the logistic loss of -x."""
    return torch.log(1 + torch.exp(x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def on_ratios(beta: float, per_pair: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    """A loss of beta times each response's log-ratio; rewards are those products."""

    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
        return per_pair(chosen, rejected), chosen, rejected

    return loss


def on_likelihoods(
    beta: float, per_pair: Callable[[Tensor, Tensor], Tensor], *, means: bool = False, nll: Any = None
) -> Formula:
    """The same without a reference, of sums or of means per token, and with a likelihood term."""

    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen = beta * policy.chosen / (policy.chosen_tokens if means else 1)
        rejected = beta * policy.rejected / (policy.rejected_tokens if means else 1)
        return per_pair(chosen, rejected) + (nll(policy) if nll else 0), chosen, rejected

    return loss


def ipo(beta: float, *, means: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        margin = a / policy.chosen_tokens - d / policy.rejected_tokens if means else a - d
        return (margin - 0.5 / beta) ** 2, beta * a, beta * d

    return loss


def wpo(beta: float, *, aligned: bool, clamp: bool = False) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        w = policy.chosen - (policy.chosen_squares if aligned else 0)
        v = policy.rejected - (policy.rejected_squares if aligned else 0)
        weight = torch.exp(w / policy.chosen_tokens + v / policy.rejected_tokens).detach()
        weight = torch.minimum(weight, torch.ones_like(weight)) if clamp else weight
        return weight * softplus(-beta * (a - d)), beta * a, beta * d

    return loss


def kto(beta: float, *, detached: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        kl_chosen, kl_rejected = a.mean().clamp(min=0), d.mean().clamp(min=0)
        if detached:
            kl_chosen, kl_rejected = kl_chosen.detach(), kl_rejected.detach()
        losses = (1 - sigmoid(beta * (a - kl_rejected)) + 1 - sigmoid(beta * (kl_chosen - d))) / 2
        return losses, beta * a, beta * d

    return loss


def bco(beta: float, convention: str) -> Formula:
    seen: list[Tensor] = []

    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)
        now = torch.cat([chosen, rejected]).detach()
        if torch.is_grad_enabled():
            seen.append(now)
        shift = {
            "no_shift": torch.zeros(()),
            "reward_shift_first_step": now.mean(),
            "reward_shift": torch.cat(seen).mean() if seen else now.mean(),
        }[convention]
        return softplus(shift - chosen) + softplus(rejected - shift), chosen, rejected

    return loss


def aot(beta: float, *, paired: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        high = (policy.chosen - policy.rejected if paired else a).sort().values
        low = (reference.chosen - reference.rejected if paired else d).sort().values
        return softplus(-beta * (high - low)), beta * a, beta * d

    return loss


def odds_ratio(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def per_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
        w, v = chosen / beta, rejected / beta
        odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (w, v)]
        return beta * softplus(-torch.log(odds[0] / odds[1]))

    return per_pair


def token_nll(policy: Scores) -> Tensor:
    return -policy.chosen.sum() / policy.chosen_tokens.sum()


def whole_nll(policy: Scores) -> Tensor:
    return -(policy.chosen + policy.prompt).sum() / (policy.chosen_tokens + policy.prompt_tokens).sum()


def exo(e: float) -> Callable[[Tensor, Tensor], Tensor]:
    def per_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
        p = sigmoid(chosen - rejected)
        return p * torch.log(p / (1 - e)) + (1 - p) * torch.log((1 - p) / e)

    return per_pair


def discopop(tau: float) -> Callable[[Tensor, Tensor], Tensor]:
    def per_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
        z = chosen - rejected
        m = sigmoid(z / tau)
        return (1 - m) * softplus(-z) + m * torch.exp(-z)

    return per_pair


def divergence(beta: float, g: Callable[[Tensor], Tensor]) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        a, d = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        return softplus(-beta * (g(a) - g(d))), beta * a, beta * d

    return loss


def means_of_ratios(beta: float) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        chosen = beta * (policy.chosen - reference.chosen) / policy.chosen_tokens
        rejected = beta * (policy.rejected - reference.rejected) / policy.rejected_tokens
        return softplus(rejected - chosen), chosen, rejected

    return loss


def likelihood(*, per_token: bool) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        losses = token_nll(policy) * torch.ones_like(policy.chosen) if per_token else -policy.chosen
        return losses, policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens

    return loss


def mix(*parts: tuple[float, Formula]) -> Formula:
    def loss(policy: Scores, reference: Scores) -> tuple[Tensor, Tensor, Tensor]:
        values = [(weight, *formula(policy, reference)) for weight, formula in parts]
        return sum(weight * losses for weight, losses, _, _ in values), values[0][2], values[0][3]  # type: ignore[return-value]

    return loss


def logistic(chosen: Tensor, rejected: Tensor) -> Tensor:
    return softplus(rejected - chosen)


RECIPES: dict[str, tuple[dict[str, Any], Callable[[], Formula]]] = {
    "dpo": ({}, lambda: on_ratios(0.1, logistic)),
    "dpo-reference_free": ({"reference_free": True}, lambda: on_likelihoods(0.1, logistic)),
    "dpo-js": ({"f_divergence_type": "js_divergence"}, lambda: divergence(0.1, lambda x: -softplus(-x))),
    "dpo_norm": ({}, lambda: means_of_ratios(5.0)),
    "dpo_gamma": ({"gamma": 0.7}, lambda: on_ratios(0.1, lambda c, r: softplus(r - c + 0.7))),
    "slic_dpo": ({"delta": 0.5}, lambda: on_ratios(0.1, lambda c, r: torch.relu(0.5 - c + r))),
    "hinge": ({"beta": 0.3}, lambda: on_ratios(0.3, lambda c, r: torch.relu(1 - c + r))),
    "ipo-mean": ({"convention": "mean"}, lambda: ipo(0.1, means=True)),
    "ipo-sum": ({"convention": "sum"}, lambda: ipo(0.1, means=False)),
    "simpo": ({}, lambda: on_likelihoods(2.0, lambda c, r: softplus(r - c + 0.5), means=True)),
    "cpo-token": ({}, lambda: on_likelihoods(0.1, logistic, nll=token_nll)),
    "cpo-instance": (
        {"sft_type": "instance", "lambda_sft": 0.2},
        lambda: on_likelihoods(0.1, logistic, nll=lambda policy: -0.2 * policy.chosen),
    ),
    "slic": ({}, lambda: on_likelihoods(0.1, lambda c, r: torch.relu(1 - c + r), nll=token_nll)),
    "orpo-completion": ({}, lambda: on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=token_nll)),
    "orpo-prompt": (
        {"nll": "token_mean_prompt_and_completion"},
        lambda: on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=whole_nll),
    ),
    "orpo-sequence": (
        {"nll": "sequence_mean"},
        lambda: on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=lambda p: -p.chosen / p.chosen_tokens),
    ),
    "kto_pair-detached": ({}, lambda: kto(0.1, detached=True)),
    "kto_pair-graph": ({"convention": "kl_in_graph"}, lambda: kto(0.1, detached=False)),
    "wpo-aligned": ({}, lambda: wpo(0.1, aligned=True)),
    "wpo-clamped": ({"weight_clamp": True}, lambda: wpo(0.1, aligned=True, clamp=True)),
    "wpo-mean_logp": ({"convention": "mean_logp", "learning_rate": 1e4}, lambda: wpo(0.1, aligned=False)),
    "sft-token": ({}, lambda: likelihood(per_token=True)),
    "sft-sequence": ({"convention": "sequence_sum"}, lambda: likelihood(per_token=False)),
    "robust": (
        {"label_smoothing": 0.1},
        lambda: on_ratios(0.1, lambda c, r: (0.9 * softplus(r - c) - 0.1 * softplus(c - r)) / 0.8),
    ),
    "exo_pair": ({"label_smoothing": 0.01}, lambda: on_ratios(0.1, exo(0.01))),
    "nca_pair": ({}, lambda: on_ratios(0.1, lambda c, r: softplus(-c) + 0.5 * softplus(c) + 0.5 * softplus(r))),
    "bco_pair-running": ({}, lambda: bco(0.1, "reward_shift")),
    "bco_pair-step": ({"convention": "reward_shift_first_step"}, lambda: bco(0.1, "reward_shift_first_step")),
    "bco_pair-none": ({"convention": "no_shift"}, lambda: bco(0.1, "no_shift")),
    "sppo_hard": ({}, lambda: on_ratios(0.1, lambda c, r: (c / 0.1 - 5) ** 2 + (r / 0.1 + 5) ** 2)),
    "aot": ({}, lambda: aot(0.1, paired=True)),
    "aot_unpaired": ({}, lambda: aot(0.1, paired=False)),
    "apo_zero": ({}, lambda: on_ratios(0.1, lambda c, r: 1 - sigmoid(c) + sigmoid(r))),
    "apo_down": ({}, lambda: on_ratios(0.1, lambda c, r: sigmoid(c) + 1 - sigmoid(c - r))),
    "discopop": ({}, lambda: on_ratios(0.1, discopop(0.05))),
    "f_dpo-forward": ({"f_divergence_type": "forward_kl"}, lambda: divergence(0.1, lambda x: 1 - torch.exp(-x))),
    "f_dpo-alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        lambda: divergence(0.1, lambda x: (1 - torch.exp(-0.3 * x)) / 0.3),
    ),
    "mix": (
        {"loss_type": ["dpo_norm", "sft"], "loss_weights": [1.0, 0.1], "beta": [10, "null"]},
        lambda: mix((1.0, means_of_ratios(10.0)), (0.1, likelihood(per_token=True))),
    ),
    "mix-coupled": (
        {"loss_type": ["kto_pair", "aot", "orpo"], "loss_weights": [1.0, 0.5, 0.2]},
        lambda: mix(
            (1.0, kto(0.1, detached=True)),
            (0.5, aot(0.1, paired=True)),
            (0.2, on_likelihoods(0.1, odds_ratio(0.1), means=True, nll=token_nll)),
        ),
    ),
}
COUPLED = ("kto_pair-detached", "kto_pair-graph", "bco_pair-running", "aot", "aot_unpaired", "mix-coupled")
LEARNING_RATE = 0.1  # of SGD: AdamW's first step is the sign of the gradient, rounding included, where that is tiny


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def fields_of(name: str) -> dict[str, Any]:
    return {"loss_type": name.split("-")[0], "optimizer": "sgd", "learning_rate": LEARNING_RATE} | RECIPES[name][0]


def test_every_loss_has_a_recipe() -> None:
    assert {name.split("-")[0] for name in RECIPES} - {"mix"} == set(LOSSES)


@pytest.mark.parametrize("name", RECIPES)
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
CUTS: dict[str, dict[str, Any]] = {
    "8x1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_tokens_per_batch": 1},
    "odd": {"per_device_train_batch_size": 8, "max_tokens_per_batch": 137},
}
RANKS = {"per_device_train_batch_size": 4, "max_tokens_per_batch": 100}


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


@pytest.mark.parametrize("name", [*COUPLED, "orpo-prompt", "mix", "cpo-token"])
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
    backward = Trainer._backward

    def wrong(self: Trainer, indices: list[int], size: Any) -> Any:
        counts = replace(size.counts, pairs=2 * size.counts.pairs)
        return backward(self, indices, replace(size, counts=counts))

    one = cli.train(llama, eight_pairs, tmp_path / "one" / "run", **(steps_of("dpo", "sgd") | ONE_BATCH))
    monkeypatch.setattr(Trainer, "_backward", wrong)
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
