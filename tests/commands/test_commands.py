"""`python -m open_po cache` and `score`: what they compute, print, change and refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from open_po import __main__ as program
from open_po.commands import cache, score
from open_po.data.tokenization import response_key
from open_po.reference.shards import shard_files
from tests import cli, tiny
from tests.stores import assert_same, expected_rows, stored, stores

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def filled(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> Path:
    """A cache with the reference log-probs of `pairs_file`, built without training."""
    assert cache.main(["build", *cli.arguments(llama, pairs_file, tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "24, of which 0 were there" in shown
    assert "48 responses in" in shown
    return tmp_path / "reference"


def only_line(capsys: Capture) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---------------------------------------------------------------------------------------------------------------- cache


def test_what_is_built_is_what_a_run_needs(llama: Path, pairs_file: Path, tmp_path: Path, filled: Path) -> None:
    assert not (tmp_path / "run").exists()
    assert_same(stored(filled), expected_rows(llama, tiny.text_rows(24)))
    run = cli.train(llama, pairs_file, tmp_path / "run", max_train_steps=1)
    assert cli.summary(run)["reference"]["pairs_computed"] == 0


def test_a_separate_reference_is_built_as_a_run_needs_it(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    other = tiny.make_model_folder(tmp_path / "other", seed=3)
    fields: dict[str, Any] = {"reference_model_name_or_path": other, "max_train_steps": 1}
    assert cache.main(["build", *cli.arguments(llama, pairs_file, tmp_path / "run", **fields)]) == 0
    assert_same(stored(tmp_path / "reference"), expected_rows(other, tiny.text_rows(24)))
    run = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    assert cli.summary(run)["reference"]["pairs_computed"] == 0


def test_a_store_is_no_cache(filled: Path, capsys: Capture) -> None:
    (store,) = stores(filled)
    capsys.readouterr()
    assert cache.main(["info", "--dir", str(store)]) == 1
    assert only_line(capsys) == f"error: {store}: is one store of a cache; name the folder it lies in"


def test_info_tells_models_rows_tokens_and_bytes(llama: Path, filled: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert cache.main(["info", "--dir", str(filled)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if stores(filled)[0].name[:12] in line]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    tokens = sum(tokens for _, tokens in stored(filled).values())
    assert str(llama).endswith(cells[0]) or cells[0] in str(llama)
    assert cells[2] == "float32, torch"
    assert cells[3:7] == ["48", str(tokens), "0", "1"]


def test_verify_finds_a_flipped_byte(filled: Path, capsys: Capture) -> None:
    assert cache.main(["verify", "--dir", str(filled)]) == 0
    assert "1 files are whole, 0 damaged" in capsys.readouterr().out
    (path,) = shard_files(stores(filled)[0])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (0, 0))
    assert cache.main(["verify", "--dir", str(filled)]) == 1
    shown = capsys.readouterr().out
    assert f"{path}: its content does not fit the hash in its name; is set aside" in shown
    assert "0 files are whole, 1 damaged" in shown
    assert not path.exists()
    assert cache.main(["info", "--dir", str(filled)]) == 0
    assert "(1 damaged)" in capsys.readouterr().out
    assert cache.main(["prune", "--damaged", "--dir", str(filled)]) == 0
    assert not stores(filled)


def test_a_file_that_cannot_be_read_stops_no_command(filled: Path, tmp_path: Path, capsys: Capture) -> None:
    (store,) = stores(filled)
    path = store / f"rows-{'0' * 32}.safetensors"
    path.symlink_to(path)  # too many levels of symbolic links
    for words, code, said in (
        (["verify", "--dir", str(filled)], 1, "1 files are whole, 0 damaged, 1 cannot be read"),
        (["info", "--dir", str(filled)], 0, " 48 "),
        (["merge", str(filled), "--into", str(tmp_path / "both")], 0, "Copied 1 files, 48 rows"),
        (["prune", "--dir", str(filled), "--key", store.name], 0, "2 of 2 files"),
    ):
        capsys.readouterr()
        assert cache.main(words) == code
        shown = capsys.readouterr()
        assert said in shown.out
        assert shown.err == f"left alone: {path}: cannot be read (Too many levels of symbolic links)\n"
    assert not store.exists()


def test_prune_by_key_model_and_age(
    llama: Path, pairs_file: Path, tmp_path: Path, filled: Path, capsys: Capture
) -> None:
    (first,) = stores(filled)
    other = tiny.make_model_folder(tmp_path / "another", seed=3)
    assert cache.main(["build", *cli.arguments(other, pairs_file, tmp_path / "run")]) == 0
    (second,) = set(stores(filled)) - {first}

    def prune(*words: str) -> set[Path]:
        assert cache.main(["prune", "--dir", str(filled), *words]) == 0
        return set(stores(filled))

    assert prune("--model", "another", "--dry-run") == {first, second}
    assert "Would free" in capsys.readouterr().out
    assert prune("--older-than", "1") == {first, second}
    assert prune("--model", "another", "--older-than", "1") == {first, second}
    assert prune("--model", "another") == {first}
    (path,) = shard_files(first)
    day = time.time() - 2 * 86_400
    os.utime(path, (day, day))
    assert prune("--older-than", "3") == {first}
    assert prune("--older-than", "1") == set()
    assert cache.main(["build", *cli.arguments(llama, pairs_file, tmp_path / "run")]) == 0
    assert prune("--key", first.name) == set()
    assert [path.name for path in filled.iterdir()] in ([], ["file_hashes.json"])
    for words, said in (
        ([], "prune: says not what to remove; give --key, --model, --older-than or --damaged"),
        (["--key", "x"], f"--key x: is the beginning of no store's name in {filled}, or of several; see info"),
        (["--model", "x"], f"--model x: no store in {filled} is of such a model; see info"),
    ):
        capsys.readouterr()
        assert cache.main(["prune", "--dir", str(filled), *words]) == 1
        assert only_line(capsys) == f"error: {said}"


def test_merge_joins_caches_and_copies_nothing_twice(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    more = tiny.write_jsonl(tmp_path / "more.jsonl", tiny.text_rows(6, seed=9))
    for folder, data in zip(folders, (pairs_file, more), strict=True):
        words = cli.arguments(llama, data, tmp_path / "run", reference_cache_dir=folder)
        assert cache.main(["build", *words]) == 0
    before = [stored(folder) for folder in folders]
    both = tmp_path / "both"
    for expected in ("Copied 2 files, 60 rows", "Copied 0 files, 0 rows"):
        capsys.readouterr()
        assert cache.main(["merge", *map(str, folders), "--into", str(both)]) == 0
        assert expected in capsys.readouterr().out
    assert stored(both) == before[0] | before[1]
    assert [stored(folder) for folder in folders] == before
    run = cli.train(llama, pairs_file, tmp_path / "run", reference_cache_dir=both, max_train_steps=1)
    assert cli.summary(run)["reference"]["pairs_computed"] == 0
    (path, *_) = shard_files(stores(both)[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    os.utime(path, (0, 0))
    assert cache.main(["merge", *map(str, folders), "--into", str(both)]) == 0
    assert path.read_bytes() == whole, "a damaged file is replaced by the whole one"
    for folder in folders:
        (stores(folder)[0] / "manifest.json").unlink()
    assert cache.main(["merge", *map(str, folders), "--into", str(tmp_path / "bare")]) == 0
    assert stored(tmp_path / "bare") == before[0] | before[1], "a store is its files, with a manifest or without"
    for words, said in (
        ([tmp_path / "nowhere"], f"{tmp_path}/nowhere: is no folder; name a reference_cache_dir"),
        ([pairs_file.parent], f"{pairs_file.parent}: holds no reference log-probs"),
        ([both], f"--into {both}: is one of the caches to take rows from; name another"),
        ([stores(folders[0])[0]], f"{stores(folders[0])[0]}: holds no reference log-probs"),
    ):
        capsys.readouterr()
        assert cache.main(["merge", *map(str, words), "--into", str(both)]) == 1
        assert only_line(capsys) == f"error: {said}"


def test_a_store_that_is_being_filled_is_not_pruned(filled: Path, capsys: Capture) -> None:
    (store,) = stores(filled)
    facts = {"host": "elsewhere", "pid": "1", "seconds": "60"}
    save_file({"keys": np.zeros((1, 16), np.uint8)}, store / "claim-of-another.safetensors", facts)
    capsys.readouterr()
    assert cache.main(["prune", "--dir", str(filled), "--key", store.name[:6]]) == 1
    assert only_line(capsys) == f"error: {store}: a process is filling this store; prune it afterwards"
    assert shard_files(store)
    for words in (["--damaged"], ["--older-than", "0.0001", "--damaged"]):
        assert cache.main(["prune", "--dir", str(filled), *words]) == 0
    assert shard_files(store)


def test_nothing_is_built_for_a_loss_without_reference(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert cache.main(["build", *cli.arguments(llama, pairs_file, tmp_path / "run", loss_type="simpo")]) == 0
    said = "loss_type simpo uses no reference log-probs: there is nothing to build\n"
    assert capsys.readouterr().out == said
    assert not (tmp_path / "reference").exists()


# ---------------------------------------------------------------------------------------------------------------- score


def test_scores_are_those_of_the_models(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """Log-probs one response at a time by transformers, rewards from both, and nothing computed the second time."""
    other = tiny.make_model_folder(tmp_path / "other", seed=3)
    out = tmp_path / "scores" / "scores.jsonl"
    words = ["--model", str(other), "--data", str(pairs_file), "--reference", str(llama), "--out", str(out)]
    words += ["--reference_cache_dir", str(tmp_path / "reference"), "--beta", "0.5", "--max_seq_length", "128"]
    assert score.main(words) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rows = tiny.text_rows(24)
    models, tokenizer = [expected_rows(folder, rows) for folder in (other, llama)], AutoTokenizer.from_pretrained(llama)
    wins = 0
    for number, (line, row) in enumerate(zip(lines, rows, strict=True)):
        assert line["pair"] == f"{pairs_file} row {number + 1}"
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            key = response_key(prompt, [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id])
            (logp, tokens), (reference, _) = models[0][key], models[1][key]
            assert line[f"{side}_logps"] == pytest.approx(logp, rel=1e-5)
            assert line[f"{side}_tokens"] == tokens
            assert line[f"reference_{side}_logps"] == pytest.approx(reference, rel=1e-5)
            assert line[f"{side}_rewards"] == pytest.approx(0.5 * (logp - reference), abs=1e-3)
        wins += line["chosen_rewards"] > line["rejected_rewards"]
    shown = capsys.readouterr().out
    assert f"{wins / 24:.1%} (a tie counts half)" in shown
    before = out.read_text()
    assert score.main(words) == 0
    assert out.read_text() == before
    assert "distinct responses in" not in capsys.readouterr().out


def test_a_model_against_itself_has_no_rewards(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    words = ["--model", str(llama), "--data", str(pairs_file), "--reference", str(llama), "--out", str(out)]
    assert score.main([*words, "--reference_cache_dir", str(tmp_path / "reference")]) == 0
    assert all(json.loads(line)["chosen_rewards"] == 0 for line in out.read_text().splitlines())


def test_scores_without_a_reference_and_of_a_mixture(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    words = ["--model", str(llama), "--data", str(pairs_file), "5", "--out", str(out)]
    assert score.main([*words, "--reference_cache_dir", str(tmp_path / "reference")]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 5
    assert set(lines[0]) == {"pair", "chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens"}


def test_what_score_refuses(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--model", str(llama), "--data", str(pairs_file), "--reference_cache_dir", str(tmp_path / "reference")]
    capsys.readouterr()
    assert score.main([*words, "--out", str(tmp_path / "x.jsonl"), "--learnig_rate", "1"]) == 2
    assert only_line(capsys) == "config error: learnig_rate: unknown field; did you mean learning_rate?"
    assert score.main([*words, "--out", str(pairs_file / "x.jsonl")]) == 1
    assert "its folder cannot be made (" in only_line(capsys)
    content = pairs_file.read_text()
    assert score.main([*words, "--out", str(pairs_file)]) == 1
    assert only_line(capsys) == f"error: --out {pairs_file}: is the data that is scored; choose another file"
    assert pairs_file.read_text() == content
    assert score.main([*words, "--out", str(tmp_path)]) == 1
    assert only_line(capsys) == f"error: --out {tmp_path}: is a folder; name a file"
    assert score.main([*words, "--out", str(tmp_path / "x.jsonl"), "--eval_mixer_list", "a", "1.0"]) == 2
    assert only_line(capsys) == "config error: eval_mixer_list: score takes this from --data"
    assert score.main([*words, "--out", str(tmp_path / "x.jsonl"), "--model_name_or_path", "b"]) == 2
    assert only_line(capsys) == "config error: model_name_or_path: score takes this from --model"
    assert score.main([*words, "--out", str(tmp_path / "x.jsonl"), "--reference", "nobody"]) == 1
    assert only_line(capsys).startswith("error: nobody: neither a local folder nor a Hub model that can be reached (")
    assert not list((tmp_path / "reference").rglob("rows-*")), "it is told before anything is computed"
    for field in ("use_lora", "gradient_checkpointing"):
        assert score.main([*words, "--out", str(tmp_path / "x.jsonl"), f"--{field}", "true"]) == 2
        assert only_line(capsys) == f"config error: {field}: score does not train; leave it out"
    assert score.main([*words, "--out", str(tmp_path / "x.jsonl"), "--max_tokens_per_batch", "512"]) == 2
    said = "config error: max_tokens_per_batch: score takes this from --reference_max_tokens_per_batch"
    assert only_line(capsys) == said
    assert score.main([*words, "--out", str(tmp_path / "x.jsonl"), "--learning_rate", "1"]) == 2
    assert only_line(capsys) == "config error: learning_rate: score does not train; leave it out"


# -------------------------------------------------------------------------------------------------------------- program


def test_the_program_names_its_commands(capsys: Capture) -> None:
    for words in (["--help"], []):
        assert program.main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"    {name} " in shown for name in ("cache", "score", "sweep"))
    assert program.main(["train"]) == 2
    assert only_line(capsys).startswith("error: train: is no command; there are cache, plan, inspect, score, ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("score --model x", "the following arguments are required: --data, --out; see python -m open_po score --help"),
        ("sweep --grid a=1 --jobs x", "argument --jobs: invalid int value: 'x'; see python -m open_po sweep --help"),
        ("cache prune --key=", "argument --key: is empty; see python -m open_po cache prune --help"),
        ("cache prune --model=", "argument --model: is empty; see python -m open_po cache prune --help"),
        (
            "cache prune --older-than=-1",
            "argument --older-than: must be days, 0 or more, got -1; see python -m open_po cache prune --help",
        ),
        (
            "score --model m --data d --reference r --out o --beta=nan",
            "argument --beta: must be above 0, got nan; see python -m open_po score --help",
        ),
        (
            "score --model m --data d --out o --beta 1",
            "argument --beta: implicit rewards need --reference; see python -m open_po score --help",
        ),
        (
            "score x.yaml --model m --data d --out o",
            "x.yaml: score takes no configuration files; give fields as --field value; see python -m open_po score "
            "--help",
        ),
        ("cache merge a", "the following arguments are required: --into; see python -m open_po cache merge --help"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: str, said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(words.split())
    assert ended.value.code == 2
    assert only_line(capsys) == f"config error: {said}"


@pytest.mark.slow
def test_it_starts_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "open_po", "cache", "info", "--dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env=cli.environment(),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}: holds no reference log-probs\n"


# -------------------------------------------------------------------------------------------------- how a process ends

LEAVING = (
    "import atexit, sys, threading, time; from open_po.commands.command_line import end\n"
    "atexit.register(print, 'exit function')\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
    "sys.stdout.write('unflushed, ')\n"
    "end(int(sys.argv[1]))\n"
)


def leave(code: int, stdout: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", LEAVING, str(code)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=buffered)


def test_a_process_ends_when_all_is_done_and_told() -> None:
    done = leave(3, subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, "unflushed, thread\nexit function\n", "")


@pytest.mark.parametrize(("code", "ends_with"), [(0, 120), (3, 3)])
def test_a_process_whose_output_is_lost_ends_as_pythons_do(code: int, ends_with: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread, open("/dev/full", "w") as full:
        done = leave(code, unread)
        assert (done.returncode, done.stderr) == (ends_with, "")
        done = leave(code, full)
        line = "error: what was printed is lost (No space left on device)\n"
        assert (done.returncode, done.stderr) == (ends_with, line)
