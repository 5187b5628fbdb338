"""Two processes: the same steps as one, and an end for both when one of them fails."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from open_po.reference import ReferenceStore
from open_po.training.trainer import Trainer
from tests import cli, tiny
from tests.stores import assert_same, expected_rows, stored

TWO: dict[str, Any] = {"per_device_train_batch_size": 2, "num_epochs": 3}  # of each rank
ONE: dict[str, Any] = {"per_device_train_batch_size": 4, "num_epochs": 3}  # the same four pairs a step


@pytest.fixture
def nine_pairs(tmp_path: Path) -> Path:
    """The last step of each epoch has one pair, fewer than there are ranks."""
    return tiny.write_jsonl(tmp_path / "nine.jsonl", tiny.text_rows(9, seed=6))


def assert_same_run(two: Path, one: Path, start: Path) -> None:
    """Weights, metrics, counts and files."""
    cli.assert_close_weights(cli.weights(two), cli.weights(one), cli.weights(start))
    assert len(cli.metrics(two)) == len(cli.metrics(one))
    for mine, expected in zip(cli.without_perf(cli.metrics(two)), cli.without_perf(cli.metrics(one)), strict=True):
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            if name.removeprefix("eval/") == "rewards/accuracy" and mine["training_step"] <= 2:
                continue  # nothing has moved yet (the first step is taken at learning rate 0), so rounding decides
            # Of 65,536 sampled weights one or two may be rounded to what they were.
            slack = 5e-5 if "rewards" in name else 1e-4 if name == "optim/update_fraction" else 1e-6
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=slack), (name, expected["training_step"])
    counts = [cli.summary(folder)["train"] for folder in (two, one)]
    assert all(counts[0][name] == counts[1][name] for name in ("steps", "pairs", "tokens", "response_tokens"))
    assert cli.summary(two)["reference"] is None or cli.summary(two)["reference"]["pairs_reused"] == 0
    assert cli.files(two) == cli.files(one)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": "dpo", "max_tokens_per_batch": 1, "eval_steps": 2, "logging_steps": 2},
        pytest.param({"loss_type": "dpo_norm", "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "sft", "optimizer": "rmsprop"}, marks=pytest.mark.slow),
        {"use_lora": True, "lora_rank": 4, "learning_rate": 1e-2, "max_grad_norm": 0.1},
    ],
    ids=["dpo", "dpo_norm", "sft", "lora"],
)
def test_two_ranks_train_as_one(fields: dict[str, Any], llama: Path, nine_pairs: Path, tmp_path: Path) -> None:
    fields = fields | {"eval_mixer_list": [nine_pairs, "5"], "checkpointing_steps": 4}
    one = cli.train(llama, nine_pairs, tmp_path / "one" / "run", **(ONE | fields))
    two = tmp_path / "two" / "run"
    assert cli.forked_ranks(cli.arguments(llama, nine_pairs, two, **(TWO | fields))) == [0, 0]
    assert_same_run(two, one, llama)
    if fields.get("loss_type") != "sft":
        rows = tiny.text_rows(9, seed=6)
        assert_same(stored(tmp_path / "two" / "reference"), expected_rows(llama, rows))


def test_two_ranks_leave_a_reference_that_one_process_finds_whole(
    llama: Path, nine_pairs: Path, tmp_path: Path
) -> None:
    words = cli.arguments(llama, nine_pairs, tmp_path / "two", reference_model_name_or_path=llama, **TWO)
    assert cli.forked_ranks(words) == [0, 0]
    one = cli.train(llama, nine_pairs, tmp_path / "one", **ONE)
    assert cli.summary(one)["reference"]["pairs_computed"] == 0


@pytest.mark.parametrize("slow", [pytest.param("__init__", marks=pytest.mark.slow), "refresh"])
def test_a_rank_that_reads_the_store_late_shares_the_same_work(
    slow: str, llama: Path, nine_pairs: Path, tmp_path: Path
) -> None:
    """On a busy disk one rank's rows may be written before another has read what is there."""
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.text_rows(7, seed=1))
    words = cli.arguments(llama, nine_pairs, tmp_path / "run", eval_mixer_list=[held_out, "1.0"], **TWO)
    assert cli.forked_ranks(words, lambda rank: delay(slow) if rank == 1 else None) == [0, 0]
    rows = tiny.text_rows(9, seed=6) + tiny.text_rows(7, seed=1)
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, rows))


def delay(method: str) -> None:
    original = getattr(ReferenceStore, method)

    def late(self: ReferenceStore, *positional: Any, **named: Any) -> Any:
        time.sleep(1.5)
        return original(self, *positional, **named)

    setattr(ReferenceStore, method, late)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"use_lora": True, "lora_dropout": 0.3, "learning_rate": 1e-2},
    ],
)
def test_two_killed_ranks_resume_bit_for_bit(
    fields: dict[str, Any],
    llama: Path,
    nine_pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = TWO | fields | {"checkpointing_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.forked_ranks(cli.arguments(llama, nine_pairs, whole, **fields)) == [0, 0]
    words = cli.arguments(llama, nine_pairs, killed, resume_from_checkpoint="auto", **fields)
    assert cli.forked_ranks(words, lambda rank: die_at_step(6)) == [-signal.SIGKILL, -signal.SIGKILL]
    assert cli.checkpoints(killed)[-1] == "step_000004"
    alone = cli.failure(capsys, [*words, "--per_device_train_batch_size", "4"])
    assert "per_device_train_batch_size was 2, is 4" in alone
    assert cli.forked_ranks(words) == [0, 0]
    assert cli.equal(cli.weights(killed), cli.weights(whole))
    assert cli.without_perf(cli.metrics(killed)) == cli.without_perf(cli.metrics(whole))


def die_at_step(number: int) -> None:
    step = Trainer.train_step

    def dying(self: Trainer) -> Any:
        if self.state.progress.step + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer.train_step = dying  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------ one rank fails


@pytest.fixture
def poisoned(llama: Path, tmp_path: Path) -> Path:
    """A model that gives no finite log-prob to a text with a lone y."""
    model = shutil.copytree(llama, tmp_path / "poisoned")
    weights = load_file(model / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["y"])
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def with_one_bad_row(path: Path, rank: int) -> Path:
    """Eight pairs of growing length, dealt from the longest on to ranks 0 1 1 0 ..; the bad one is `rank`'s longest."""
    rows = [{"prompt": f"{i}" + " a" * i, "chosen": " red cat", "rejected": " dog"} for i in range(8)]
    rows[7 - rank]["chosen"] = " red y"
    return tiny.write_jsonl(path, rows)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["reference", "training"])
def test_a_number_that_is_not_finite_on_one_rank_ends_both(
    rank: int, where: str, poisoned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = with_one_bad_row(tmp_path / "data.jsonl", rank)
    loss = {"reference": "dpo", "training": "sft"}[where]
    words = cli.arguments(poisoned, data, tmp_path / "run", loss_type=loss, per_device_train_batch_size=4)
    capfd.readouterr()
    assert cli.forked_ranks(words) == [1, 1]
    line = cli.only_error(capfd.readouterr().err)
    assert f"row {8 - rank}" in line
    assert ("log-prob of the chosen response is" in line) == (where == "reference")
    assert ("step 1: the loss is not finite" in line) == (where == "training")
    assert cli.summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("fault", ["no model", "foreign folder", "no data"])
def test_a_fault_that_rank_0_finds_ends_both(
    fault: str, llama: Path, pairs_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    words = {
        "no model": cli.arguments(tmp_path / "nowhere", pairs_file, tmp_path / "run"),
        "foreign folder": cli.arguments(llama, pairs_file, foreign),
        "no data": cli.arguments(llama, tmp_path / "nothing.jsonl", tmp_path / "run"),
    }[fault]
    capfd.readouterr()
    assert cli.forked_ranks(words) == [1, 1]
    cli.only_error(capfd.readouterr().err)


def test_ranks_with_other_weights_under_one_name_are_refused(
    llama: Path, pairs_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one of two machines has an older copy: its rows would stand under the other's key."""
    for rank in range(2):
        tiny.make_model_folder(tmp_path / str(rank) / "model", seed=rank)
    words = cli.arguments("./model", pairs_file, tmp_path / "run")
    capfd.readouterr()
    assert cli.forked_ranks(words, lambda rank: os.chdir(tmp_path / str(rank))) == [1, 1]
    line = cli.only_error(capfd.readouterr().err)
    assert line == (
        "error: ./model: rank 1 has another model.safetensors than rank 0; give all machines the same files"
    )
    assert not list((tmp_path / "reference").rglob("rows-*"))


def test_a_full_disk_that_rank_0_meets_ends_both(
    disk: Callable[[str], Path],
    llama: Path,
    nine_pairs: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    small_disk = disk("600k")
    fields = TWO | {"checkpointing_steps": 2, "reference_cache_dir": tmp_path / "reference"}
    capfd.readouterr()
    assert cli.forked_ranks(cli.arguments(llama, nine_pairs, small_disk / "run", **fields)) == [1, 1]
    line = cli.only_error(capfd.readouterr().err)
    assert "step_000004: the checkpoint cannot be written (No space left on device)" in line
    assert cli.checkpoints(small_disk / "run") == ["step_000002"]


# ------------------------------------------------------------------------------------------------------------- torchrun

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "dpo_tune_cache.py"]


@pytest.mark.slow
def test_torchrun(llama: Path, nine_pairs: Path, tmp_path: Path) -> None:
    sgd = {"optimizer": "sgd", "learning_rate": 0.1}  # AdamW would blow rounding up to steps of its own
    one = cli.train(llama, nine_pairs, tmp_path / "one" / "run", **(ONE | sgd))
    two = tmp_path / "two" / "run"
    process = cli.start([*TORCHRUN, *cli.arguments(llama, nine_pairs, two, **(TWO | sgd))])
    code, stdout, stderr = cli.finished(process, timeout=120)
    assert code == 0, stderr
    assert stdout.count("Run completed") == 1
    assert_same_run(two, one, llama)


@pytest.mark.slow
def test_torchrun_ends_in_seconds_when_one_rank_fails(poisoned: Path, tmp_path: Path) -> None:
    data = with_one_bad_row(tmp_path / "data.jsonl", rank=1)
    process = cli.start([*TORCHRUN, *cli.arguments(poisoned, data, tmp_path / "run")])
    code, _, stderr = cli.finished(process, timeout=60)
    assert code != 0
    assert sum(line.startswith("error: ") for line in stderr.splitlines()) == 1, stderr
