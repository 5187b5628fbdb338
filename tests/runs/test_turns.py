"""Whole runs on conversations of several turns, all of which are scored, against a plain trainer on masked labels."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from open_po.data.chat_templates import chat_template
from open_po.packing import Sampler
from tests import cli, tiny
from tests.masked import MaskedPlain, masked
from tests.messages import assistant, user
from tests.plain import REJECTED, Recipe, assert_metrics
from tests.recipes import LEARNING_RATE
from tests.runs.test_end_to_end import dpo, likelihood

ALL = {"scored_turns": "all", "chat_template_name": "zephyr", "max_seq_length": 512}


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Distinct rows of one to three turns; two in a row share their prompt, and some answers have several messages."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(tiny.WORDS) for _ in range(rng.randint(1, most)))

    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt = [message for _ in range(number % 3) for message in (user(words(5)), assistant(words(4)))]
        prompt = rows[-1]["chosen"][: rows[-1]["turns"]] if number % 4 == 1 else [*prompt, user(f"{number}")]
        more = [user(words(2)), assistant(words(3))] if number % 5 == 0 else []
        answers = [[assistant(f"{words(4)} {word}"), *more] for word in ("yes", "no")]
        rows.append({"chosen": prompt + answers[0], "rejected": prompt + answers[1], "turns": len(prompt)})
    for row in rows:
        del row["turns"]
    return rows


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has the template, and room for conversations."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tiny.make_tokenizer(folder)
    tokenizer.chat_template = chat_template("zephyr")
    tokenizer.save_pretrained(folder)
    tiny.make_model(folder, max_position_embeddings=512)
    return folder


RECIPES = {
    "dpo_norm": Recipe(loss=dpo(5.0, per_token=True), flags={"loss_type": "dpo_norm"}),
    "dpo": Recipe(loss=dpo(0.1), flags={"loss_type": "dpo", "prompt_sharing": "off"}),
    "sft": Recipe(loss=likelihood, flags={"loss_type": "sft"}, tokens_divide=True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_equals_a_plain_trainer_on_masked_labels(name: str, chat: Path, tmp_path: Path) -> None:
    recipe, rows, held_out = RECIPES[name], conversations(7, seed=1), conversations(4, seed=2)
    output = cli.train(
        chat,
        tiny.write_jsonl(tmp_path / "data.jsonl", rows),
        tmp_path / "run",
        per_device_train_batch_size=4,
        num_epochs=2,
        max_tokens_per_batch=400,
        eval_mixer_list=[tiny.write_jsonl(tmp_path / "held_out.jsonl", held_out), "1.0"],
        **(ALL | recipe.flags),
    )
    plain, before = MaskedPlain.of_rows(chat, rows, recipe), MaskedPlain.of_rows(chat, held_out, recipe)
    sampler = Sampler(num_pairs=7, global_batch=4, seed=42)
    plain.train([sampler.step_pairs(step) for step in range(4)], learning_rate=2e-3)
    cli.assert_close_weights(cli.weights(output), plain.model.state_dict(), cli.weights(chat))
    for mine, expected in zip(cli.steps(output), plain.records, strict=True):
        if name == "sft":
            expected = {k: v for k, v in expected.items() if k not in REJECTED}
        assert_metrics(mine, {"train_loss" if k == "loss" else k: v for k, v in expected.items()})
    reference = before.score(range(4), grad=False)
    expected, _ = MaskedPlain(plain.model, before.pairs, recipe).metrics(range(4), reference, grad=False)
    last = [record for record in cli.metrics(output) if "eval/loss" in record][-1]
    assert_metrics(last, {k if k == "ties" else f"eval/{k}": v for k, v in expected.items()})
    tokenizer = AutoTokenizer.from_pretrained(chat)
    labels = [masked(rows[i][side], tokenizer)[1] for i in range(7) for side in ("chosen", "rejected")]
    counts = [sum(label != -100 for label in each[1:]) for each in labels]
    assert cli.summary(output)["train"]["response_tokens"] == 2 * sum(counts[:: 2 if name == "sft" else 1])


def test_reference_log_probs_are_kept_by_what_is_scored(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of one turn are found whichever turns are scored, the others computed anew, and then found as well."""
    rows = conversations(9, seed=3)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    single = {number for number, row in enumerate(rows) if len(row["chosen"]) == 2}
    assert 0 < len(single) < 9
    computed = []
    for number, turns in enumerate(("last", "all", "last", "all")):
        output = tmp_path / str(number)
        cli.train(chat, data, output, max_train_steps=1, **(ALL | {"scored_turns": turns}))
        computed.append(cli.summary(output)["reference"]["pairs_computed"])
    assert computed == [9, 9 - len(single), 0, 0]
    assert "scored turns: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
def test_two_ranks_take_the_steps_of_one(engine: str, chat: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", conversations(9, seed=4))
    fields = ALL | {"num_epochs": 1, "max_tokens_per_batch": 300, "loss_type": "dpo_norm", "beta": 5}
    one = cli.train(chat, data, tmp_path / "one" / "run", **fields)
    ranks = fields | {"parallel": engine, "per_device_train_batch_size": 2}
    cli.forked_ranks_in_turn([cli.arguments(chat, data, tmp_path / "two" / "run", **ranks)], lambda rank: None)
    cli.assert_close_weights(cli.weights(tmp_path / "two" / "run"), cli.weights(one), cli.weights(chat), share=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"ld_alpha": 0.4, "loss_type": "dpo"}, {"loss_type": "wpo"}, {"loss_type": "orpo"}])
def test_no_step_depends_on_the_layout(fields: dict[str, Any], chat: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "data.jsonl", conversations(8, seed=5))
    run = ALL | {"num_epochs": 2, "optimizer": "sgd", "max_grad_norm": 0, "learning_rate": LEARNING_RATE} | fields
    shared = cli.train(chat, data, tmp_path / "shared" / "run", **run)
    off = cli.train(chat, data, tmp_path / "off" / "run", prompt_sharing="off", max_tokens_per_batch=1, **run)
    cli.assert_close_weights(cli.weights(off), cli.weights(shared), cli.weights(chat), share=3e-4)
    assert not torch.equal(cli.weights(off)["lm_head.weight"], cli.weights(chat)["lm_head.weight"])
