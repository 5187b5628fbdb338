"""Killed at any moment and resumed, a run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cli, tiny

COMMON: dict[str, Any] = {
    "num_epochs": 2,
    "checkpointing_steps": 3,
    "keep_last_n_checkpoints": 2,
    "eval_steps": 4,
    "per_device_train_batch_size": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "loss_type": "slic_dpo", "gradient_checkpointing": True},
    "lora": {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.3, "learning_rate": 1e-2},
    "sft": {"loss_type": "sft", "lr_scheduler_type": "cosine"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs, which 5 do not divide."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny.text_rows(24))


class Uninterrupted:
    """A variant's whole run, to compare with."""

    def __init__(self, name: str, model: Path, data: Path, folder: Path) -> None:
        self.name, self.model, self.data = name, model, data
        self.folder = cli.train(model, data, folder / "run", **self.fields)
        assert cli.checkpoints(self.folder) == ["step_000006", "step_000009"]
        assert cli.distance(cli.weights(self.folder), cli.weights(model)) > 0.05

    @property
    def fields(self) -> dict[str, Any]:
        return {**COMMON, "eval_mixer_list": [self.data, "3"], **VARIANTS[self.name]}

    def words(self, output: Path, **changes: Any) -> list[str]:
        return cli.arguments(self.model, self.data, output, **{**self.fields, **changes})

    def assert_same(self, output: Path) -> None:
        assert cli.equal(cli.weights(output), cli.weights(self.folder))
        assert cli.without_perf(cli.metrics(output)) == cli.without_perf(cli.metrics(self.folder))
        assert cli.files(output) == cli.files(self.folder)  # checkpoints pruned alike, and nothing left behind
        mine, theirs = cli.summary(output), cli.summary(self.folder)
        assert mine["status"] == "completed"
        for content in (mine["train"], theirs["train"]):
            del content["seconds"]
        assert mine["train"] == theirs["train"]
        assert mine["eval"] == theirs["eval"]
        last = "checkpoints/step_000009/weights.safetensors"
        assert (output / last).read_bytes() == (self.folder / last).read_bytes()


@pytest.fixture(scope="module")
def whole(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Variants by name, each run once."""
    done: dict[str, Uninterrupted] = {}

    def get(name: str) -> Uninterrupted:
        if name not in done:
            done[name] = Uninterrupted(name, llama, data, tmp_path_factory.mktemp(name))
        return done[name]

    return get


# --------------------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(
    "name", ["adamw", "lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rmsprop", "sft"))]
)
def test_killed_three_times_and_resumed(name: str, whole: Any, tmp_path: Path) -> None:
    """At file operations that the variant's name draws, of about sixty: between steps, in a checkpoint, at the end."""
    expected, draw = whole(name), random.Random(name)
    output = tmp_path / "run"
    words = expected.words(output, resume_from_checkpoint="auto")
    for moment in (draw.randint(20, 60), draw.randint(10, 25), draw.randint(10, 25)):
        assert cli.forked(words, cli.kill_at_file_event(moment, output)) == -signal.SIGKILL
        assert cli.summary(output) == {"status": "running"}
    assert cli.main(words) == 0
    expected.assert_same(output)


@pytest.mark.slow
def test_killed_at_every_file_operation_and_resumed(whole: Any, tmp_path: Path) -> None:
    expected, moment = whole("lora"), 0
    while True:
        moment += 1
        output = tmp_path / str(moment) / "run"
        words = expected.words(output, resume_from_checkpoint="auto")
        code = cli.forked(words, cli.kill_at_file_event(moment, tmp_path))  # the reference cache's operations too
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert cli.main(words) == 0, f"killed at file operation {moment}"
        expected.assert_same(output)
        shutil.rmtree(tmp_path / str(moment))
    assert moment > 60


@pytest.mark.slow
def test_killed_at_random_times_and_resumed(whole: Any, tmp_path: Path) -> None:
    """Between file operations too: in the middle of a step, or of a library's own writing."""
    expected = whole("adamw")
    for attempt in range(20):
        output = tmp_path / str(attempt) / "run"
        words = expected.words(output, resume_from_checkpoint="auto")
        for _ in range(random.randint(1, 3)):
            child = os.fork()
            if child == 0:
                os._exit(cli.main(words))
            time.sleep(random.uniform(0.02, 0.9))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert cli.main(words) == 0
        expected.assert_same(output)
        shutil.rmtree(tmp_path / str(attempt))


def test_a_process_of_its_own_killed_and_resumed(whole: Any, tmp_path: Path) -> None:
    """The same as above through the script, which starts from nothing each time."""
    expected, output = whole("lora"), tmp_path / "run"
    command = [sys.executable, "dpo_tune_cache.py", *expected.words(output, resume_from_checkpoint="auto")]
    process = cli.start(command)
    checkpoint = output / "checkpoints" / "step_000003"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    assert cli.main(command[2:]) == 0
    expected.assert_same(output)


# -------------------------------------------------------------------------------------------------------------- resumed


@pytest.mark.slow
def test_from_a_checkpoint_by_its_path_into_a_new_folder(whole: Any, tmp_path: Path) -> None:
    expected = whole("lora")
    checkpoint = expected.folder / "checkpoints" / "step_000006"
    words = expected.words(tmp_path / "run", resume_from_checkpoint=checkpoint)
    assert cli.main(words) == 0
    assert cli.equal(cli.weights(tmp_path / "run"), cli.weights(expected.folder))
    later = [record for record in cli.metrics(expected.folder) if record["training_step"] > 6]
    assert cli.without_perf(cli.metrics(tmp_path / "run")) == cli.without_perf(later)
    assert cli.summary(tmp_path / "run")["train"]["pairs"] == 48


def test_from_an_earlier_checkpoint_of_the_same_folder(whole: Any, tmp_path: Path) -> None:
    """The later ones are written again over those that exist."""
    expected = whole("adamw")
    output = shutil.copytree(expected.folder, tmp_path / "run")
    words = expected.words(output, resume_from_checkpoint=output / "checkpoints" / "step_000006")
    assert cli.main(words) == 0
    expected.assert_same(output)


def test_what_does_not_shape_the_result_may_change(whole: Any, tmp_path: Path) -> None:
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    words = expected.words(output, resume_from_checkpoint="auto", eval_steps=1, exp_name="other", save_dtype="bfloat16")
    assert cli.main(words) == 0
    saved = {name: weight.bfloat16() for name, weight in cli.weights(expected.folder).items()}
    assert cli.equal(cli.weights(output), saved)


def unfinished(expected: Uninterrupted, tmp_path: Path) -> Path:
    """A copy of a run that was killed after step 6."""
    output = shutil.copytree(expected.folder, tmp_path / "run")
    shutil.rmtree(output / "checkpoints" / "step_000009")
    (output / "run_summary.json").write_text('{"status": "running"}')
    return output


def test_auto_without_a_checkpoint_starts_over(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    shutil.rmtree(output / "checkpoints")
    assert cli.main(expected.words(output, resume_from_checkpoint="auto")) == 0
    assert "No checkpoint in" in capsys.readouterr().out
    expected.assert_same(output)


def test_auto_in_a_folder_that_is_not_there_starts_a_run(whole: Any, tmp_path: Path) -> None:
    expected = whole("adamw")
    assert cli.main(expected.words(tmp_path / "new" / "run", resume_from_checkpoint="auto")) == 0
    expected.assert_same(tmp_path / "new" / "run")


def test_auto_on_a_complete_run_does_nothing(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = whole("adamw")
    output = shutil.copytree(expected.folder, tmp_path / "run")
    before = {name: (output / name).stat().st_mtime_ns for name in cli.files(output)}
    assert cli.main(expected.words(output, resume_from_checkpoint="auto")) == 0
    assert {name: (output / name).stat().st_mtime_ns for name in cli.files(output)} == before
    assert "is complete; nothing to do" in capsys.readouterr().out


def test_a_checkpoint_inside_a_logging_window_keeps_its_first_half(llama: Path, data: Path, tmp_path: Path) -> None:
    fields = {"logging_steps": 4, "checkpointing_steps": 3}
    expected = cli.train(llama, data, tmp_path / "whole", **fields)
    checkpoint = expected / "checkpoints" / "step_000003"
    output = cli.train(llama, data, tmp_path / "run", resume_from_checkpoint=checkpoint, **fields)
    assert cli.without_perf(cli.metrics(output)) == cli.without_perf(cli.metrics(expected))


@pytest.mark.parametrize("keep", [1, 3, 10])
def test_only_the_newest_checkpoints_are_kept(keep: int, llama: Path, data: Path, tmp_path: Path) -> None:
    output = cli.train(llama, data, tmp_path / "run", checkpointing_steps=1, keep_last_n_checkpoints=keep)
    assert cli.checkpoints(output) == [f"step_{step:06d}" for step in range(max(1, 7 - keep), 7)]


def test_leftovers_and_strangers_among_the_checkpoints(whole: Any, tmp_path: Path) -> None:
    """What a killed run was writing or removing is cleared away; what is not a checkpoint is left alone."""
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    for name in (".step_000009.partial", ".step_000003.old"):
        shutil.copytree(output / "checkpoints" / "step_000006", output / "checkpoints" / name)
    (output / ".staging").mkdir()
    (output / ".run_summary.json.123.partial").write_text("{")
    shutil.copytree(output / "checkpoints" / "step_000006", output / "checkpoints" / "step_000006 (copy)")
    assert cli.main(expected.words(output, resume_from_checkpoint="auto")) == 0
    shutil.rmtree(output / "checkpoints" / "step_000006 (copy)")
    expected.assert_same(output)


# -------------------------------------------------------------------------------------------------------------- refused


def test_another_configuration_is_refused_and_its_fields_named(
    whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole("adamw")
    checkpoint = expected.folder / "checkpoints" / "step_000006"
    words = expected.words(tmp_path / "run", resume_from_checkpoint=checkpoint, learning_rate=1e-4, num_epochs=3)
    line = cli.failure(capsys, words)
    assert f"resume_from_checkpoint {checkpoint}: was written under another configuration" in line
    assert "(learning_rate was 0.002, is 0.0001; num_epochs was 2, is 3)" in line


def test_changed_data_under_the_same_path_are_refused_and_named(
    whole: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the file's size and times are those of before. Other words that make the same tokens are no change."""
    expected = whole("adamw")
    checkpoint = expected.folder / "checkpoints" / "step_000006"
    words = expected.words(tmp_path / "run", resume_from_checkpoint=checkpoint)
    content, times = data.read_bytes(), data.stat()
    lines = content.splitlines(keepends=True)
    try:
        data.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
        os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
        count = len(lines)
        assert cli.failure(capsys, words) == (
            f"error: resume_from_checkpoint {checkpoint}: the training data have changed ({data}: other pairs, "
            f"{count} before, {count} now); put them back, or start a new run"
        )
        data.write_bytes(b"".join(line.replace(b"{", b"{ ") for line in lines))
        assert cli.main(words) == 0
    finally:
        data.write_bytes(content)
    assert cli.equal(cli.weights(tmp_path / "run"), cli.weights(expected.folder))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "training.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_told_in_one_line(
    name: str, damage: str, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    checkpoint = output / "checkpoints" / "step_000006"
    path = checkpoint / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size - 20)
    line = cli.failure(capsys, expected.words(output, resume_from_checkpoint="auto"))
    assert f"resume_from_checkpoint {checkpoint}: is no whole checkpoint (" in line
    if damage == "cut":
        shutil.rmtree(checkpoint)
        assert cli.main(expected.words(output, resume_from_checkpoint="auto")) == 0
        expected.assert_same(output)


@pytest.mark.parametrize("content", ["[]", "{}", '{"progress": {"step": 6}, "config": 3}'])
def test_a_state_of_another_program_is_told_in_one_line(
    content: str, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    (output / "checkpoints" / "step_000006" / "trainer_state.json").write_text(content)
    assert "is no whole checkpoint" in cli.failure(capsys, expected.words(output, resume_from_checkpoint="auto"))


def test_a_folder_that_is_no_checkpoint_is_told_in_one_line(
    whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = whole("adamw").words(tmp_path / "run", resume_from_checkpoint=tmp_path / "nowhere")
    assert f"resume_from_checkpoint {tmp_path}/nowhere: is no folder" in cli.failure(capsys, words)


@pytest.mark.parametrize("content", ["", "[", '"text"', '{"status": "comp'])
def test_a_damaged_summary_is_not_taken_for_a_complete_run(content: str, whole: Any, tmp_path: Path) -> None:
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    (output / "run_summary.json").write_text(content)
    assert cli.main(expected.words(output, resume_from_checkpoint="auto")) == 0
    expected.assert_same(output)


def test_a_damaged_config_is_told_in_one_line(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    for content in (b"", b"\xff\xfe", b"a: [", b"- a"):
        (output / "config.yaml").write_bytes(content)
        line = cli.failure(capsys, expected.words(output, resume_from_checkpoint="auto"))
        assert "its config.yaml is damaged" in line


class Payload:
    """What an attacker would put into a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/open_po_payload",)


@pytest.mark.parametrize("name", ["optimizer.pt", "training.pt"])
def test_a_checkpoint_from_elsewhere_is_read_as_data_and_never_executed(
    name: str, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole("adamw")
    output = unfinished(expected, tmp_path)
    torch.save({"optimizer": Payload()}, output / "checkpoints" / "step_000006" / name)
    assert "is no whole checkpoint" in cli.failure(capsys, expected.words(output, resume_from_checkpoint="auto"))
    assert not Path("/tmp/open_po_payload").exists()
