"""Faults made for real: each ends the run with one line that says what is wrong, and nothing good is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import open_po.reference.fill
from open_po.packing import Sampler
from open_po.training.trainer import Trainer
from tests import cli, tiny

Capture = pytest.CaptureFixture[str]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's content and time of change."""
    return {name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in cli.files(folder)}


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of `llama` to damage."""
    return shutil.copytree(llama, tmp_path / "model")


# --------------------------------------------------------------------------------------------------- models, tokenizers


def test_a_missing_model_folder(pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    line = cli.failure(capsys, cli.arguments(tmp_path / "nowhere", pairs_file, tmp_path / "run"))
    assert line == f"error: model_name_or_path: {tmp_path}/nowhere is no folder"


def remove_the_config(model: Path) -> None:
    (model / "config.json").unlink()


def remove_the_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncate_the_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 5000)


def name_an_unknown_architecture(model: Path) -> None:
    edit_json(model / "config.json", model_type="never_heard_of", architectures=None)


@pytest.mark.parametrize(
    "damage", [remove_the_config, remove_the_weights, truncate_the_weights, name_an_unknown_architecture]
)
def test_a_folder_that_is_no_model(
    damage: Callable[[Path], None], model: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    damage(model)
    line = cli.failure(capsys, cli.arguments(model, pairs_file, tmp_path / "run"))
    said = "holds no weights, neither " if damage is remove_the_weights else "no causal language model can be loaded ("
    assert line.startswith(f"error: {model}: {said}")


def test_a_model_folder_without_tokenizer(model: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    line = cli.failure(capsys, cli.arguments(model, pairs_file, tmp_path / "run"))
    assert line.startswith(f"error: {model}: no tokenizer can be loaded (")


def test_a_tokenizer_without_eos(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    tiny.make_tokenizer(tmp_path / "tokenizer", eos_token=None)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", tokenizer_name=tmp_path / "tokenizer")
    line = cli.failure(capsys, words)
    assert f"{tmp_path}/tokenizer: the tokenizer has no EOS token" in line


def test_a_tokenizer_without_padding_trains_the_same(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    tiny.make_tokenizer(tmp_path / "tokenizer", pad_token=None)
    with_pad = cli.train(llama, pairs_file, tmp_path / "with")
    without = cli.train(llama, pairs_file, tmp_path / "without", tokenizer_name=tmp_path / "tokenizer")
    assert cli.equal(cli.weights(with_pad), cli.weights(without))
    assert AutoTokenizer.from_pretrained(without).pad_token is None


def test_a_tokenizer_with_ids_beyond_the_vocabulary(pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tiny.make_model_folder(tmp_path / "model", vocab_size=100)
    line = cli.failure(capsys, cli.arguments(model, pairs_file, tmp_path / "run"))
    assert "token id" in line
    assert "the model's vocabulary has 100 entries" in line


def test_an_id_beyond_the_vocabulary_in_a_later_pair(tmp_path: Path, capsys: Capture) -> None:
    tokenizer = tiny.make_tokenizer(tmp_path / "model")
    rows = [{"prompt": f"{i}", "chosen": " 1", "rejected": " 2"} for i in range(10, 14)]
    rows[2]["chosen"] = " quickly"
    highest = [max(max(tokenizer(text)["input_ids"]) for text in row.values()) for row in rows]
    assert highest[2] > max(highest[0], 200)
    tiny.make_model(tmp_path / "model", vocab_size=highest[2])
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    line = cli.failure(capsys, cli.arguments(tmp_path / "model", data, tmp_path / "run"))
    assert f"the model's vocabulary has {highest[2]} entries" in line


def test_a_model_whose_weights_are_not_finite(model: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """As a training run leaves it that diverged."""
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = cli.failure(capsys, cli.arguments(model, pairs_file, tmp_path / "run"))
    assert "not finite" in line
    assert "architecture" not in line


def test_liger_kernels_without_a_gpu(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", use_liger_kernel=True))
    assert "use_liger_kernel: Liger's kernels need CUDA" in line


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("field", ["output_dir", "reference_cache_dir"])
@pytest.mark.parametrize("where", ["below a file", "a file", "read-only"])
def test_a_folder_that_cannot_be_written(
    field: str, where: str, llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    paths = {"below a file": pairs_file / "folder", "a file": pairs_file, "read-only": Path("/proc/open_po")}
    before = pairs_file.read_bytes()
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", **{field: paths[where]}))
    assert str(paths[where]) in line
    assert pairs_file.read_bytes() == before


def test_another_runs_folder_is_left_alone(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    run = cli.train(llama, pairs_file, tmp_path / "run", checkpointing_steps=3)
    before = snapshot(run)
    same = cli.arguments(llama, pairs_file, run, checkpointing_steps=3)
    assert "holds another run" in cli.failure(capsys, same)
    other = [*same, "--beta", "0.3", "--seed", "9", "--resume_from_checkpoint", "auto"]
    line = cli.failure(capsys, other)
    assert "beta was 0.1, is 0.3" in line
    assert "seed was 42, is 9" in line
    assert snapshot(run) == before


def test_a_running_runs_folder_is_left_alone(llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """In its first minutes a run has made nothing but its configuration and a summary that says `running`."""
    run = tmp_path / "run"
    words = cli.arguments(llama, pairs_file, run)
    assert cli.forked(words, cli.kill_at_file_event(9, run)) == -signal.SIGKILL
    assert cli.summary(run) == {"status": "running"}
    before = snapshot(run)
    assert "holds another run" in cli.failure(capsys, words)
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", ".hidden"])
def test_a_folder_with_foreign_files_is_left_alone(
    name: str, llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("- a list\n- of mine\n")
    before = snapshot(tmp_path / "run")
    for resume in (None, "auto"):
        words = cli.arguments(llama, pairs_file, tmp_path / "run", resume_from_checkpoint=resume)
        assert "choose another folder" in cli.failure(capsys, words)
    assert snapshot(tmp_path / "run") == before


def test_a_run_that_failed_before_it_made_anything_can_be_corrected(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A typing error in the model's name must not use up the output folder."""
    cli.failure(capsys, cli.arguments(tmp_path / "typo", pairs_file, tmp_path / "run"))
    assert cli.summary(tmp_path / "run")["status"] == "failed"
    assert "typo is no folder" in cli.summary(tmp_path / "run")["error"]
    cli.train(llama, pairs_file, tmp_path / "run")
    assert cli.summary(tmp_path / "run")["status"] == "completed"


# ----------------------------------------------------------------------------------------------------------- full disks


def resumes_to(expected: Path, words: list[str]) -> bool:
    """Whether the run of `words`, resumed, comes to the same end as `expected`."""
    assert cli.main([*words, "--resume_from_checkpoint", "auto"]) == 0
    output = Path(words[words.index("--output_dir") + 1])
    assert cli.without_perf(cli.metrics(output)) == cli.without_perf(cli.metrics(expected))
    assert cli.files(output) == cli.files(expected)
    assert cli.summary(output)["status"] == "completed"
    return cli.equal(cli.weights(output), cli.weights(expected))


def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_ones_before(
    disk: Callable[[str], Path], llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    fields = {"checkpointing_steps": 1, "reference_cache_dir": tmp_path / "reference"}
    expected = cli.train(llama, pairs_file, tmp_path / "expected", **fields)
    run = disk("1200k") / "run"
    words = cli.arguments(llama, pairs_file, run, **fields)
    line = cli.failure(capsys, words)
    assert f"{run}/checkpoints/step_000003: the checkpoint cannot be written (No space left on device)" in line
    assert "older ones are kept" in line
    assert cli.checkpoints(run) == ["step_000001", "step_000002"]
    assert cli.summary(run)["status"] == "failed"
    disk("8m")
    assert resumes_to(expected, words)
    assert "Resuming from" in capsys.readouterr().out


@pytest.mark.parametrize("size", [568, 728, *(pytest.param(size, marks=pytest.mark.slow) for size in (488, 648))])
def test_a_disk_that_is_full_at_the_end_keeps_the_checkpoint(
    size: int, disk: Callable[[str], Path], llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Whatever file of the final output does not fit."""
    fields = {"checkpointing_steps": 4, "reference_cache_dir": tmp_path / "reference"}
    expected = cli.train(llama, pairs_file, tmp_path / "expected", **fields)
    run = disk(f"{size}k") / "run"
    words = cli.arguments(llama, pairs_file, run, **fields)
    line = cli.failure(capsys, words)
    assert str(run) in line
    assert "No space left on device" in line
    assert cli.checkpoints(run) == ["step_000004"]
    assert not (run / ".staging").exists()
    assert cli.summary(run)["status"] == "failed"
    disk("8m")
    assert resumes_to(expected, words)


def test_a_disk_that_is_full_in_the_reference_pass_keeps_what_was_computed(
    disk: Callable[[str], Path],
    llama: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_po.reference.fill, "_SHARD_SECONDS", 0.0)
    cache = disk("24k") / "cache"
    fields = {"max_tokens_per_batch": 1, "reference_max_tokens_per_batch": 60}  # a prompt or two a file
    words = cli.arguments(llama, pairs_file, tmp_path / "run", reference_cache_dir=cache, **fields)
    line = cli.failure(capsys, words)
    assert str(cache) in line
    assert "reference log-probs cannot be written (" in line
    disk("8m")
    assert cli.main([*words, "--resume_from_checkpoint", "auto"]) == 0
    reference = cli.summary(tmp_path / "run")["reference"]
    assert 1 <= reference["pairs_reused"] <= 12
    assert reference["pairs_computed"] == 24 - reference["pairs_reused"]
    expected = cli.train(llama, pairs_file, tmp_path / "expected", **fields)
    assert cli.equal(cli.weights(tmp_path / "run"), cli.weights(expected))


def test_a_disk_that_is_full_for_a_line_of_metrics(
    disk: Callable[[str], Path], llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = disk("16k") / "run"
    fields = {"per_device_train_batch_size": 1, "reference_cache_dir": tmp_path / "reference"}
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, run, **fields))
    assert line == f"error: {run}/metrics.jsonl cannot be written (No space left on device); checkpoints are kept"


@pytest.mark.parametrize("damage", ["cut", *(pytest.param(how, marks=pytest.mark.slow) for how in ("empty", "noise"))])
def test_damaged_reference_log_probs(
    damage: str, llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    cli.train(llama, pairs_file, tmp_path / "first", max_train_steps=1)
    (rows,) = (tmp_path / "reference").glob("*/rows-*")
    content = rows.read_bytes()
    rows.write_bytes({"cut": content[:-100], "empty": b"", "noise": b"\x07" * len(content)}[damage])
    capsys.readouterr()
    assert cli.main(cli.arguments(llama, pairs_file, tmp_path / "run", max_train_steps=1)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Damaged")]
    assert said == [
        f"Damaged reference log-probs are set aside and computed again: {rows}: its content does not fit the hash in "
        "its name"
    ]
    assert cli.summary(tmp_path / "run")["reference"]["pairs_computed"] == 24
    assert (rows.parent / f"damaged-{rows.name}").is_file()


# -------------------------------------------------------------------------------------------------- numbers, interrupts


def row_numbers(line: str) -> list[int]:
    """The rows of a data set that an error line names."""
    return [int(part.split()[0].rstrip(";")) for part in line.split(" row ")[1:]]


def test_a_loss_that_is_not_finite_stops_before_the_update(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A learning rate that throws the weights away: the step after it stops, and names its pairs."""
    fields = {"learning_rate": 1e30, "warmup_ratio": 0, "lr_scheduler_type": "constant", "checkpointing_steps": 1}
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", **fields))
    assert "step 2: the loss is not finite, stopped before the update" in line
    sampler = Sampler(num_pairs=24, global_batch=4, seed=42)
    assert row_numbers(line) == sorted(index + 1 for index in sampler.step_pairs(1))
    assert cli.checkpoints(tmp_path / "run") == ["step_000001"]
    kept = load_file(tmp_path / "run" / "checkpoints" / "step_000001" / "weights.safetensors")
    assert all(weight.isfinite().all() for weight in kept.values())
    assert [record["training_step"] for record in cli.metrics(tmp_path / "run")] == [1]
    assert cli.summary(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_only_the_pairs_with_a_bad_loss_are_named(model: Path, tmp_path: Path, capsys: Capture) -> None:
    weights = load_file(model / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["y"])
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = tiny.text_rows(12)
    for number, row in enumerate(rows, 1):
        row["chosen"] = " y" if number in (5, 9) else " a cat"
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    fields = {"loss_type": "sft", "per_device_train_batch_size": 12}
    line = cli.failure(capsys, cli.arguments(model, data, tmp_path / "run", **fields))
    assert "step 1: the loss is not finite" in line
    assert row_numbers(line) == [5, 9]


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    llama: Path, pairs_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The loss is finite, its slope of 1e38 times a log-prob's gradient is not."""
    fields = {"beta": 1e38, "per_device_train_batch_size": 24, "checkpointing_steps": 1}
    line = cli.failure(capsys, cli.arguments(llama, pairs_file, tmp_path / "run", **fields))
    assert "step 1: the gradient is not finite, stopped before the update" in line
    assert len(row_numbers(line)) == 8
    assert "and 16 more" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def interrupt_at_step(number: int) -> Callable[[], object]:
    """For `cli.forked`: SIGINT, as Ctrl-C sends it, at the start of an optimizer step."""
    step = Trainer.train_step

    def interrupted(self: Trainer) -> Any:
        if self.state.progress.step + 1 == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        Trainer.train_step = interrupted  # type: ignore[method-assign]

    return prepare


def test_ctrl_c_keeps_the_checkpoints(
    llama: Path, pairs_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = cli.train(llama, pairs_file, tmp_path / "expected", checkpointing_steps=2)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", checkpointing_steps=2)
    capfd.readouterr()
    assert cli.forked(words, interrupt_at_step(4)) == 130
    assert cli.only_error(capfd.readouterr().err) == (
        "error: interrupted; what is on disk is kept, and the same command goes on from there (training does with "
        "--resume_from_checkpoint auto)"
    )
    assert cli.checkpoints(tmp_path / "run") == ["step_000002"]
    assert cli.summary(tmp_path / "run") == {"status": "interrupted", "error": "KeyboardInterrupt"}
    assert resumes_to(expected, words)


@pytest.mark.slow
def test_the_script_tells_faults_in_one_line_too(pairs_file: Path, tmp_path: Path) -> None:
    """The whole process, with what libraries print while it starts and ends."""
    words = cli.arguments(tmp_path / "nowhere", pairs_file, tmp_path / "run")
    code, stdout, stderr = cli.finished(cli.start([sys.executable, "dpo_tune_cache.py", *words]), timeout=120)
    assert code == 1
    assert stdout == ""
    assert cli.only_error(stderr).endswith("nowhere is no folder")


def test_the_summary_says_running_while_it_runs(
    llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    step = Trainer.train_step

    def watched(self: Trainer) -> Any:
        seen.append(cli.summary(tmp_path / "run")["status"])
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", watched)
    cli.train(llama, pairs_file, tmp_path / "run")
    assert seen == 6 * ["running"]


@pytest.mark.slow
def test_output_that_nobody_reads_any_more_ends_the_run(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = cli.arguments(llama, pairs_file, tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "dpo_tune_cache.py", *words],
        cwd=cli.REPOSITORY,
        env=cli.environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    said = "standard output was closed by its reader; what is on disk is kept"
    assert (process.returncode, process.stderr) == (1, f"error: {said}\n")
    assert cli.summary(tmp_path / "run") == {"status": "failed", "error": said}
