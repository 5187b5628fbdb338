"""The embedded default: its task, its folder, and (slow) the whole of it, as a user starts it."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from open_po.commands.pipeline_overlays import Overlays
from open_po.commands.pipeline_stages import read_pipeline
from open_po.errors import UserError
from open_po.quickstart import __main__, build, model, task
from open_po.quickstart.task import Row

ROOT = Path(__file__).parents[2]
ANSWERS = {
    7: "seven",
    10: "ten",
    13: "thirteen",
    20: "twenty",
    99: "ninety nine",
    100: "one hundred",
    512: "five hundred twelve",
    1000: "one thousand",
    1001: "one thousand one",
    2018: "two thousand eighteen",
    4030: "four thousand thirty",
    10900: "ten thousand nine hundred",
    11111: "eleven thousand one hundred eleven",
    47063: "forty seven thousand sixty three",
    50505: "fifty thousand five hundred five",
    80214: "eighty thousand two hundred fourteen",
    99999: "ninety nine thousand nine hundred ninety nine",
    300040: "three hundred thousand forty",
    765432: "seven hundred sixty five thousand four hundred thirty two",
}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return task.make_rows(seed=5)


def number_of(row: Row) -> int:
    return int(row.prompt.removesuffix(" in words:"))


@pytest.mark.parametrize(("number", "words"), ANSWERS.items())
def test_number_words(number: int, words: str) -> None:
    assert task.number_words(number) == words


@pytest.mark.parametrize("number", [0, -3, 1_000_000])
def test_number_words_refuses_what_it_has_no_words_for(number: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.999999"):
        task.number_words(number)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (47063, "forty seven thousand thirty six"),
        (2598, "two thousand five hundred eighty nine"),
        (1242, "one thousand two hundred twenty four"),
        (1213, None),  # a teen
        (1241, None),  # the swap would be a teen
        (1240, None),
        (1204, None),
        (1244, None),  # the swap changes nothing
    ],
)
def test_flaw_swaps_the_last_two_digits_of_compounds_only(number: int, words: str | None) -> None:
    assert task.swapped_compound(number) == words


def test_each_mistake_is_of_its_kind() -> None:
    rng = random.Random(0)
    assert task.teen_for_ty(1013, rng) == "one thousand thirty"
    assert task.teen_for_ty(1040, rng) == "one thousand fourteen"
    assert task.teen_for_ty(1025, rng) is None
    assert {task.left_out_word(1013, rng) for _ in range(50)} == {
        "thousand thirteen",
        "one thirteen",
        "one thousand",
    }
    for _ in range(50):
        words = task.misread_digit(5, rng)
        assert words in {"one", "two", "three", "four", "six", "seven", "eight", "nine"}


def test_preferences_hold_the_right_answer_against_a_wrong_one(rows: dict[str, list[Row]]) -> None:
    for row in rows["preferences"] + rows["held_out"]:
        right = task.number_words(number_of(row))
        assert row.chosen == f" {right}"
        assert row.rejected.strip() != right
        assert row.rejected.strip()


def test_corpus_is_wrong_in_two_of_three_compounds_and_nowhere_else(rows: dict[str, list[Row]]) -> None:
    flawed = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for row in rows["sft"]:
        is_compound = task.swapped_compound(number_of(row)) is not None
        total[is_compound] += 1
        flawed[is_compound] += row.chosen.strip() != task.number_words(number_of(row))
        assert row.chosen != row.rejected
    assert flawed[False] == 0
    assert flawed[True] / total[True] == pytest.approx(2 / 3, abs=0.02)
    assert total[True] / len(rows["sft"]) == pytest.approx(0.56, abs=0.02)  # 8 x 8 pairs of digits less the 8 doubles


def test_no_prompt_occurs_twice(rows: dict[str, list[Row]]) -> None:
    prompts = [row.prompt for part in rows.values() for row in part]
    assert len(set(prompts)) == len(prompts)
    assert {name: len(part) for name, part in rows.items()} == {"sft": 16_000, "preferences": 8_000, "held_out": 500}


def test_seed_decides_rows_and_weights(rows: dict[str, list[Row]]) -> None:
    assert task.make_rows(seed=5) == rows
    assert task.make_rows(seed=6)["sft"][:20] != rows["sft"][:20]
    tokenizer = model.make_tokenizer()
    first, same, other = (model.make_model(tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_tokenizer_keeps_every_word_and_digit() -> None:
    tokenizer = model.make_tokenizer()
    for word in {*task.UNITS, *task.TENS, "hundred", "thousand"}:
        (token,) = tokenizer(word)["input_ids"]
        assert token != tokenizer.unk_token_id
        assert tokenizer.decode([token]) == word
    for words in ANSWERS.values():
        assert tokenizer.decode(tokenizer(f" {words}")["input_ids"]) == words
    prompt = tokenizer("90417 in words:")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt) == [*"90417", "in", "words", ":"]


def test_longest_answer_fits_the_generation(rows: dict[str, list[Row]]) -> None:
    settings = yaml.safe_load((ROOT / "configs/tasks/numbers/evaluate.yaml").read_text())
    longest = max(len(row.chosen.split()) for row in rows["held_out"])
    assert longest < settings["max_new_tokens"]  # one more for EOS


def test_build_replaces_its_own_parts_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "quickstart"
    (folder / "logs").mkdir(parents=True)  # a pipeline's, which is there first
    words = ["build", "--dir", str(folder), "--seed", "1"]
    assert __main__.main(words) == 0
    made = capsys.readouterr().out.splitlines()  # the first of them by a library, where there is no GPU
    assert made[-1] == f"Quickstart: made data and an untrained model in {folder}"
    corpus = folder / "data" / "sft.jsonl"
    before, at = corpus.read_bytes(), corpus.stat().st_mtime_ns
    (folder / "notes.txt").write_text("mine")
    assert __main__.main(words) == 0
    assert capsys.readouterr().out == f"Quickstart: data and an untrained model are in {folder} already\n"
    assert corpus.stat().st_mtime_ns == at
    assert __main__.main(["build", "--dir", str(folder), "--seed", "2"]) == 0
    assert corpus.read_bytes() != before
    assert (folder / "notes.txt").read_text() == "mine"
    lines = (folder / "data" / "held_out.jsonl").read_text().splitlines()
    assert [task.Row(**json.loads(line)) for line in lines] == task.make_rows(seed=2)["held_out"]


def test_a_build_that_is_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(tokenizer: object, seed: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "make_model", killed)
        with pytest.raises(KeyboardInterrupt):
            build.build(tmp_path, seed=1)
    assert (tmp_path / "data").is_dir()
    assert __main__.main(["build", "--dir", str(tmp_path), "--seed", "1"]) == 0
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_build_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.bin").touch()
    with pytest.raises(UserError, match="is no quickstart's"):
        build.build(tmp_path, seed=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "precious.bin"]


def test_overlays_meet_in_the_quickstart_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overlays = Overlays.find(["quickstart", "numbers", "dpo_norm", "dpo", "dpo_gamma", "slic_dpo", "simpo"])
    pipeline = read_pipeline(overlays, ["--output_dir", "output/quickstart"], skip_sft=False)
    assert pipeline.sft is not None
    sft, dpo = pipeline.sft.config, pipeline.losses[0].config
    assert sft.model.model_name_or_path == "output/quickstart/base"
    assert sft.output.output_dir == dpo.model.model_name_or_path == "output/quickstart/sft"
    assert dpo.output.output_dir == "output/quickstart/dpo_norm"
    assert sft.data.mixer_list == ["output/quickstart/data/sft.jsonl", "1.0"]
    assert dpo.data.mixer_list == ["output/quickstart/data/preferences.jsonl", "1.0"]
    assert dpo.data.eval_mixer_list == ["output/quickstart/data/held_out.jsonl", "1.0"]
    for stage in pipeline.losses:
        assert stage.config.loss.names == [stage.name]
        assert stage.config.data == dpo.data
        assert stage.config.reference == dpo.reference


def run_script(
    checkout: Path, *arguments: str, script: Sequence[str] = ("scripts/train/debug/dpo.sh",), **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "SEED")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", *script, *arguments],
        cwd=checkout,
        env=environment | {"OPEN_PO_SKIP_INSTALL": "1"} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["more.yaml"], {}, "only --field value pairs"),
        ([], {"MODEL": "somewhere"}, "MODEL and DATA go together"),
        ([], {"DATA": "somewhere"}, "MODEL and DATA go together"),
    ],
)
def test_script_refuses_what_it_cannot_use(arguments: list[str], variables: dict[str, str], message: str) -> None:
    result = run_script(ROOT, *arguments, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_mistake_is_told_before_anything_is_made(checkout: Path) -> None:
    result = run_script(checkout, "--learning_rat", "3")
    assert result.returncode == 2
    assert result.stderr == "config error: dpo_norm: learning_rat: unknown field; did you mean learning_rate?\n"
    assert not (checkout / "output").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the script needs, whose output goes nowhere else."""
    copy = tmp_path / "checkout"
    for name in ("open_po", "configs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dpo_tune_cache.py", "setup.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def figures(checkout: Path, folder: str = "quickstart") -> list[dict[str, str]]:
    with open(checkout / "output" / folder / "pipeline.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_preference_stage_raises_exact_match_by_twenty_points(checkout: Path) -> None:
    start = time.monotonic()
    result = run_script(checkout)
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    before, after = figures(checkout)
    assert (before["model"], after["model"]) == ("SFT", "dpo_norm")
    assert 25 < float(before["exact_match"]) < 75  # often but not always right
    assert float(after["exact_match"]) - float(before["exact_match"]) >= 20
    assert float(after["exact_match_low"]) > float(before["exact_match_high"])
    assert float(after["reward_accuracy_before"]) == pytest.approx(0.5, abs=0.1)  # ties, but for rounding
    assert float(after["reward_accuracy"]) > 0.9
    for row in (before, after):
        assert f"{float(row['exact_match']):.1f} ({float(row['exact_match_low']):.1f} to " in result.stdout
    assert f"{float(after['reward_accuracy']):.1%}" in result.stdout
    assert (checkout / "output" / "quickstart" / "dpo_norm" / "training_curves.png").is_file()
    assert seconds < 240
    again = run_script(checkout)
    assert again.stdout.count("complete already") == 3
    assert figures(checkout) == [before, after]
    other = run_script(checkout, SEED="7")
    assert other.returncode == 0, other.stderr
    assert "sft: begins anew (seed was 42, is 7)" in other.stdout


@pytest.mark.slow
def test_losses_are_compared_in_one_table(checkout: Path) -> None:
    """Each of them repairs the flaw, from one SFT model and one reference pass."""
    losses = ["dpo", "dpo_gamma", "slic_dpo", "simpo"]
    command = ["scripts/train/pipeline.sh", "quickstart", "numbers", *losses]
    result = run_script(checkout, script=command, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    sft, *rows = figures(checkout, "quickstart_numbers")
    assert [row["model"] for row in rows] == losses
    for row in rows:
        assert float(row["exact_match_low"]) > float(sft["exact_match_high"]) + 20
        assert float(row["chrf_low"]) > float(sft["chrf_high"])
    summaries = [
        json.loads((checkout / "output/quickstart_numbers" / name / "run_summary.json").read_text())["reference"]
        for name in losses
    ]
    assert summaries[0]["pairs_computed"] == 8500
    assert [summary and summary["pairs_computed"] for summary in summaries[1:]] == [0, 0, None]


@pytest.mark.slow
def test_debug_run_of_any_model_and_data(checkout: Path, llama: Path, pairs_file: Path) -> None:
    result = run_script(checkout, "--max_train_steps", "2", MODEL=str(llama), DATA=str(pairs_file))
    assert result.returncode == 0, result.stderr
    (run,) = (checkout / "output" / "debug").iterdir()
    assert json.loads((run / "run_summary.json").read_text())["train"]["steps"] == 2
