"""Greedy answers at each evaluation: what they are, and that training does not notice them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from open_po.distributed import parallelism
from open_po.model.generation import Prompts, answer_ids, end_tokens
from open_po.model.load import load_scorer
from open_po.model.numerics import Numerics
from open_po.model_files import ModelSource
from open_po.training.trainer import Trainer
from tests import cli, tiny

FLOAT32 = Numerics(compute_dtype=torch.float32, weights_dtype=torch.float32, use_liger=False)
SAMPLES = {"sample_during_eval": 3, "sample_max_new_tokens": 12}
Samples = list[dict[str, Any]]


def samples(output: Path) -> Samples:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def naive_answer(model: Any, prompt: list[int], count: int, end: int = 1) -> list[int]:
    """One prompt, no padding, no cache: the likeliest token, again and again."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == end:
                break
            ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Five pairs of four prompts."""
    rows = tiny.text_rows(5, seed=9)
    return tiny.write_jsonl(tmp_path / "held_out.jsonl", [*rows[:3], rows[0] | {"chosen": " the yes"}, rows[4]])


def fields(held_out: Path) -> dict[str, Any]:
    return {"eval_mixer_list": [held_out, "1.0"], "eval_steps": 2, "max_train_steps": 4, "beta": 1.0}


# --------------------------------------------------------------------------------------------------- what they say


def test_they_are_the_models_own_greedy_answers(llama: Path, pairs_file: Path, held_out: Path, tmp_path: Path) -> None:
    """Before training those of the starting weights, at the end those of the saved model."""
    output = cli.train(llama, pairs_file, tmp_path / "run", save_dtype="float32", **fields(held_out), **SAMPLES)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    picked = [rows[0], rows[2], rows[4]]  # of the first, second, third and fifth, whose prompts differ
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = samples(output)
    assert [sample["training_step"] for sample in found] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    for folder, step in ((llama, 0), (output, 4)):
        model = tiny.plain_model(folder)
        for row, sample in zip(picked, [x for x in found if x["training_step"] == step], strict=True):
            answer = naive_answer(model, tokenizer(row["prompt"])["input_ids"], SAMPLES["sample_max_new_tokens"])
            assert sample["answer"] == tokenizer.decode(answer, skip_special_tokens=True)
            assert {name: sample[name] for name in row} == row
            assert sample["origin"] == f"{held_out} row {rows.index(row) + 1}"
    assert set(found[0]) == {"training_step", "prompt", "answer", "chosen", "rejected", "origin"}
    assert found[0]["answer"] != found[-3]["answer"], "training changes what it says"


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_oss", "mixtral", "mamba", "bloom", "llama_dynamic"])
def test_prompts_of_one_batch_are_answered_as_each_alone(name: str, tmp_path: Path) -> None:
    """Padding on the left changes nothing, nor does the layout that the scorer was in."""
    known = tiny.SHARING | tiny.ROWS_ONLY
    scorer = load_scorer(
        ModelSource(name=str(tiny.make_model_folder(tmp_path, name, **known[name]))), FLOAT32, torch.device("cpu")
    )
    if name in tiny.SHARING:
        scorer.use_layout("shared")
    scorer.train()
    layout = scorer.layout
    prompts = [[5, 9, 30, 44, 7], [12, 50, 60, 70, 80, 33, 21, 20, 9, 11, 14, 15], [8]]
    batches = [[prompt] for prompt in prompts] if scorer.row_by_row else [prompts]
    seen: list[int] = []
    got = [
        answer
        for batch in batches
        for answer in scorer.answer(
            Prompts.of(batch, max_new_tokens=10, ends=[1], pad=2, on_token=lambda: seen.append(1))
        )
    ]
    assert (scorer.layout, scorer.training) == (layout, True)
    assert len(seen) <= 10 * len(batches)
    scorer.use_layout("rows")
    scorer.eval()
    assert got == [naive_answer(scorer.base, prompt, 10) for prompt in prompts]


def test_what_ends_an_answer() -> None:
    model = tiny.make_model()
    assert end_tokens(model.generation_config, 1) == [1]
    assert end_tokens(GenerationConfig(eos_token_id=[7, 1, 9]), 1) == [1, 7, 9]
    assert end_tokens(None, 3) == [3]
    tokens = torch.tensor([[5, 6, 7, 2], [1, 2, 2, 2], [5, 6, 5, 6]])
    assert answer_ids(tokens, [1, 7]) == [[5, 6], [], [5, 6, 5, 6]]


def test_settings_that_come_with_a_model_do_not_make_it_less_greedy(llama: Path) -> None:
    """A penalty and a temperature, as instruction models have them; they are still there afterwards."""
    scorer = load_scorer(ModelSource(name=str(llama)), FLOAT32, torch.device("cpu"))
    settings = GenerationConfig(repetition_penalty=9.0, temperature=0.5, do_sample=True, eos_token_id=1)
    scorer.base.generation_config = settings
    got = scorer.answer(Prompts.of([[5, 9, 30]], max_new_tokens=10, ends=[1], pad=2))
    assert got == [naive_answer(scorer.eval().base, [5, 9, 30], 10)]
    assert scorer.base.generation_config is settings


def test_a_turn_that_ends_without_eos_ends_the_answer(tmp_path: Path, pairs_file: Path) -> None:
    """As with a chat template whose last token of a turn is not the tokenizer's EOS."""
    from open_po.evaluation.samples import AnswerSampler

    tokenizer = tiny.make_tokenizer(tmp_path, additional_special_tokens=["<end>"])
    pair = type("Pair", (), {"prompt_ids": [5], "chosen_ids": [6, len(tokenizer) - 1, 9], "rejected_ids": [7, 1]})

    class Rows:
        prompt_numbers, origins = [0], ["row 0"]

        def __getitem__(self, index: int) -> Any:
            return pair

    train = type("Train", (), {"sample_during_eval": 1, "sample_max_new_tokens": 4, "token_budget": 99})
    assert AnswerSampler(Rows(), tokenizer, train)._turn_ends == {len(tokenizer) - 1}


def test_learned_positions_limit_them(pairs_file: Path, held_out: Path, tmp_path: Path) -> None:
    """By default they may have 256 tokens, this model has 64 positions."""
    model = tiny.make_model_folder(tmp_path / "gpt2", "gpt2", max_position_embeddings=64)
    more = {"max_seq_length": 60, "max_train_steps": 1, "sample_during_eval": 4}
    found = samples(cli.train(model, pairs_file, tmp_path / "run", **fields(held_out) | more))
    tokenizer = AutoTokenizer.from_pretrained(model)
    longest = max(len(tokenizer(sample["prompt"])["input_ids"]) for sample in found)
    plain = tiny.plain_model(model)
    for sample in found[:4]:
        answer = naive_answer(plain, tokenizer(sample["prompt"])["input_ids"], 64 - longest)
        assert sample["answer"] == tokenizer.decode(answer, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------- training beside them


def test_training_does_not_notice_them(llama: Path, pairs_file: Path, held_out: Path, tmp_path: Path) -> None:
    """Adapters with dropout draw random numbers."""
    lora = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2}
    with_them = cli.train(llama, pairs_file, tmp_path / "with", **fields(held_out), **lora, **SAMPLES)
    without = cli.train(llama, pairs_file, tmp_path / "without", **fields(held_out), **lora)
    assert cli.equal(cli.weights(with_them), cli.weights(without))
    records = cli.without_perf(cli.metrics(with_them))
    assert sum(record.pop("eval/lengths/generated", 0) > 0 for record in records) == 3
    assert records == cli.without_perf(cli.metrics(without))
    assert not (without / "samples.jsonl").exists()


def test_a_resumed_run_has_each_once(llama: Path, pairs_file: Path, held_out: Path, tmp_path: Path) -> None:
    """Killed after the evaluation of step 4, and resumed from the checkpoint of step 3, after that of step 2."""
    more = fields(held_out) | {"max_train_steps": 6, "checkpointing_steps": 3, "resume_from_checkpoint": "auto"}
    whole = cli.train(llama, pairs_file, tmp_path / "whole", **more, **SAMPLES)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **more, **SAMPLES)

    def prepare() -> None:
        train = Trainer.train_step

        def trap(self: Trainer) -> Any:
            if self.state.progress.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return train(self)

        Trainer.train_step = trap  # type: ignore[method-assign]

    assert cli.forked(words, prepare) == -signal.SIGKILL
    assert samples(tmp_path / "run")[-1]["training_step"] == 4
    assert cli.forked(words) == 0
    assert samples(tmp_path / "run") == samples(whole)


@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "ddp", "zero1", "zero2", "zero3", "tp")],
)
def test_every_engine_gives_the_answers_of_one_process(
    engine: str, llama: Path, held_out: Path, tmp_path: Path
) -> None:
    pairs = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(9))
    of_rank = 4 if engine == "tp" else 2  # whose ranks all have the same pairs
    more = fields(held_out) | {"max_tokens_per_batch": 60}
    run = {"parallel": engine, "per_device_train_batch_size": of_rank}
    prepare: Callable[[int], None] = _allow_tensor_parallelism
    words = cli.arguments(llama, pairs, tmp_path / "run", **run, **more, **SAMPLES)
    assert cli.forked_ranks(words, prepare) == [0, 0]
    alone = cli.train(llama, pairs, tmp_path / "alone", **more, **SAMPLES)
    assert samples(tmp_path / "run") == samples(alone)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_no_engine_notices_them(engine: str, llama: Path, held_out: Path, tmp_path: Path) -> None:
    pairs = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(9))
    lora = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2}
    more = fields(held_out) | lora | {"parallel": engine, "per_device_train_batch_size": 2}
    runs = {"with": SAMPLES, "without": {}}
    cli.forked_ranks_in_turn([cli.arguments(llama, pairs, tmp_path / name, **more, **x) for name, x in runs.items()])
    assert cli.equal(cli.weights(tmp_path / "with"), cli.weights(tmp_path / "without"))
    with_them, without = (cli.without_perf(cli.metrics(tmp_path / name)) for name in runs)
    assert [{k: v for k, v in record.items() if k != "eval/lengths/generated"} for record in with_them] == without


def _allow_tensor_parallelism(rank: int) -> None:
    parallelism._has_cuda = lambda: True
