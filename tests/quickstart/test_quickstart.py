"""The embedded default: its task, its folder, and (slow) the whole of it, as a user starts it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from open_po.config import load_config
from open_po.errors import UserError
from open_po.quickstart import __main__, build, model, report, task
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
    longest = max(len(row.chosen.split()) for row in rows["held_out"])
    assert longest < report.MAX_ANSWER_TOKENS  # one more for EOS


def test_build_replaces_its_own_parts_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    build.build(folder, seed=1)
    before = (folder / "data" / "sft.jsonl").read_bytes()
    (folder / "sft").mkdir()
    (folder / "sft" / "run_summary.json").touch()
    (folder / "notes.txt").write_text("mine")
    build.build(folder, seed=1)
    assert (folder / "data" / "sft.jsonl").read_bytes() == before
    assert not (folder / "sft").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert task.read_rows(folder / "data" / "held_out.jsonl") == task.make_rows(seed=1)["held_out"]


def test_build_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "precious.bin").touch()
    with pytest.raises(UserError, match="holds something else"):
        build.build(tmp_path, seed=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["precious.bin", "sft"]


def test_report_refuses_an_unfinished_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "run_summary.json").write_text('{"status": "failed"}')
    assert __main__.main(["report", "--dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'sft'}: holds no completed run; `bash scripts/train/debug/dpo.sh` runs all stages\n"
    )


def test_configurations_meet_in_the_quickstart_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sft, dpo = (load_config([f"configs/quickstart/{stage}.yaml"]) for stage in ("sft", "dpo"))
    assert sft.model.model_name_or_path == "output/quickstart/base"
    assert sft.output.output_dir == dpo.model.model_name_or_path == "output/quickstart/sft"
    assert dpo.output.output_dir == "output/quickstart/dpo"
    assert sft.data.mixer_list == ["output/quickstart/data/sft.jsonl", "1.0"]
    assert dpo.data.mixer_list == ["output/quickstart/data/preferences.jsonl", "1.0"]
    assert dpo.data.eval_mixer_list == ["output/quickstart/data/held_out.jsonl", "1.0"]


def run_script(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "SEED")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", "scripts/train/debug/dpo.sh", *arguments],
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


def test_a_mistake_in_what_comes_later_is_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", "--dir", str(tmp_path / "made"), "--", "configs/quickstart/dpo.yaml", "--learning_rat", "3"]
    assert __main__.main(words) == 2
    assert capsys.readouterr().err == "config error: learning_rat: unknown field; did you mean learning_rate?\n"
    assert not (tmp_path / "made").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the script needs, whose output goes nowhere else."""
    copy = tmp_path / "checkout"
    for name in ("open_po", "configs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dpo_tune_cache.py", copy)
    return copy


@pytest.mark.slow
def test_preference_stage_raises_exact_match_by_twenty_points(checkout: Path) -> None:
    start = time.monotonic()
    result = run_script(checkout)
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    report = json.loads((checkout / "output" / "quickstart" / "report.json").read_text())
    exact, accuracy = report["exact_match"], report["reward_accuracy"]
    assert 0.25 < exact["before"] < 0.75  # often but not always right
    assert exact["after"] - exact["before"] >= 0.20
    assert accuracy["before"] == pytest.approx(0.5, abs=0.1)  # ties, but for rounding
    assert accuracy["after"] > 0.9
    for change in (exact, accuracy):
        assert f"{change['before']:.1%}" in result.stdout
        assert f"{change['after']:.1%}" in result.stdout
    assert (checkout / "output" / "quickstart" / "dpo" / "training_curves.png").is_file()
    assert seconds < 240


@pytest.mark.slow
def test_debug_run_of_any_model_and_data(checkout: Path, llama: Path, pairs_file: Path) -> None:
    result = run_script(checkout, "--max_train_steps", "2", MODEL=str(llama), DATA=str(pairs_file))
    assert result.returncode == 0, result.stderr
    (run,) = (checkout / "output" / "debug").iterdir()
    assert json.loads((run / "run_summary.json").read_text())["train"]["steps"] == 2
