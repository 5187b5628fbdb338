"""`python -m open_po sweep`: one reference pass, every setting once, failures and interruptions."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from open_po.commands import sweep
from open_po.commands.processes import Slots
from open_po.commands.sweep import read_grid
from open_po.errors import ConfigError
from open_po.output.files import lock_folder
from tests import cli, tiny
from tests.stores import stored

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def words(llama: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.text_rows(7, seed=9))
    return cli.arguments(llama, pairs_file, tmp_path / "sweep", eval_mixer_list=[held_out, "1.0"], max_train_steps=2)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_reference_pass_uses_a_device_of_the_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('OMP_NUM_THREADS'))"
    for devices, jobs, said in ((["2", "3"], 2, "2 None\n"), ([None], 2, "None None\n")):
        log = tmp_path / f"log of {said.strip()}"
        assert Slots.of(devices, jobs).run_alone([sys.executable, "-c", script], log) == 0
        assert log.read_text() == said


def test_the_folder_of_a_training_run_is_refused(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "config.yaml").write_text("beta: 1\n")
    assert sweep.main([*words, "--grid", "beta=1"]) == 1
    assert cli.only_error(capsys.readouterr().err) == (
        f"error: output_dir {tmp_path}/sweep: holds a training run; choose another folder with --output_dir"
    )


@pytest.mark.slow
def test_a_grid_that_never_begins_leaves_another_ones_table(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.csv").write_text("mine\n")
    broken = ["--reference_model_name_or_path", str(tmp_path / "nowhere")]
    assert sweep.main([*words, *broken, "--grid", "beta=1,2"]) == 1
    shown = capsys.readouterr()
    assert "so these do not start: beta=1; beta=2" in shown.out
    assert "Table: " not in shown.out
    assert (tmp_path / "sweep" / "sweep.csv").read_text() == "mine\n"


def test_help_is_shown(capsys: Capture) -> None:
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            sweep.main([flag])
        assert ended.value.code == 0
        assert "--grid NAME=VALUE" in capsys.readouterr().out


def test_a_grid_is_every_combination() -> None:
    assert read_grid(["beta=1, 2", "gamma=0"]) == [{"beta": "1", "gamma": "0"}, {"beta": "2", "gamma": "0"}]
    for items, said in (
        (["beta"], "--grid beta: must be NAME=VALUE,VALUE; configuration files come first"),
        (["beta=1,"], "--grid beta=1,: has an empty value; must be NAME=VALUE,VALUE without blanks"),
        (["beta=1,,2"], "--grid beta=1,,2: has an empty value; must be NAME=VALUE,VALUE without blanks"),
        (["=1"], "--grid =1: must be NAME=VALUE,VALUE; configuration files come first"),
        (["beta=1", "beta=2"], "--grid beta: is given twice"),
        (["output_dir=x"], "--grid output_dir: is set by the sweep itself"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_grid(items)
        assert caught.value.problems == (said,)


def test_mistakes_are_reported_at_once_and_before_anything_runs(
    words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    def problems(*more: str) -> list[str]:
        capsys.readouterr()
        assert sweep.main([*words, *more]) == 2
        return capsys.readouterr().err.splitlines()

    assert problems("--grid", "learnig_rate=1", "beta=-1") == [
        "config error: learnig_rate: unknown field; did you mean learning_rate?",
        "config error: loss_type dpo: beta is -1 but must lie in (0, inf)",
    ]
    assert problems("--grid", "beta=1", "--push_to_hub") == [
        "config error: push_to_hub: runs of a sweep would overwrite each other's model; upload the best by hand"
    ]
    assert problems("--grid", "beta=1,2,1.0", "max_grad_norm=1") == [
        "config error: --grid: beta=1,max_grad_norm=1 and beta=1.0,max_grad_norm=1 are the same run; leave one out"
    ]
    assert problems("--grid", "beta=1", "--jobs", "0") == ["config error: --jobs: must be above 0, got 0"]
    without = [word for word in words if "held_out" not in word]
    place = without.index("--eval_mixer_list")
    capsys.readouterr()
    assert sweep.main([*without[:place], *without[place + 2 :], "--grid", "beta=1"]) == 2
    said = "config error: eval_mixer_list: is required, a sweep compares runs on held-out data\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "sweep").exists()


def test_every_setting_runs_once_on_one_reference_pass(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    """A setting that fails is tried once more and reported; what is complete does not run again."""
    broken = ["--learning_rate", "1e-3", "--warmup_ratio", "0", "--lr_scheduler_type", "constant"]
    grid = ["--grid", "learning_rate=1e-3,1e30", "--jobs", "2"]
    capsys.readouterr()
    assert sweep.main([*words, *broken, *grid]) == 1
    shown = capsys.readouterr()
    folder = tmp_path / "sweep"
    assert shown.err == "error: 1 of 2 runs failed: learning_rate=1e30\n"
    assert "learning_rate=1e30: failed, is tried again (step 2: the loss is not finite" in shown.out
    assert "learning_rate=1e30: failed twice (step 2" in shown.out
    assert f"Best: learning_rate=1e-3, in {folder}/runs/learning_rate=1e-3" in shown.out
    good, bad = table(folder)
    assert (good["learning_rate"], good["status"], bad["status"]) == ("1e-3", "completed", "failed")
    summary = cli.summary(folder / "runs" / "learning_rate=1e-3")
    assert float(good["rewards/accuracy"]) == summary["eval"]["rewards/accuracy"]
    assert float(good["rewards/margin"]) == summary["eval"]["rewards/margin"]
    assert (summary["reference"]["pairs_computed"], summary["reference"]["rows_verified"]) == (0, 0)
    assert len(stored(tmp_path / "reference")) == 2 * (24 + 7)
    assert (folder / "sweep.png").stat().st_size > 10_000
    weights = (folder / "runs" / "learning_rate=1e-3" / "model.safetensors").stat().st_mtime_ns
    assert sweep.main([*words, *broken, "--grid", "learning_rate=1e-3"]) == 0
    assert "Sweep of 1 runs in" in capsys.readouterr().out
    assert (folder / "runs" / "learning_rate=1e-3" / "model.safetensors").stat().st_mtime_ns == weights
    capsys.readouterr()
    other = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.text_rows(5, seed=8))
    assert sweep.main([*words, *broken, "--eval_mixer_list", str(other), "1.0", "--grid", "learning_rate=1e-3"]) == 1
    line = cli.only_error(capsys.readouterr().err)
    assert f"output_dir {folder}: holds a sweep of another configuration (eval_mixer_list was [" in line
    elsewhere = [*words, *broken, "--max_seq_length", "99", "--grid", "learning_rate=2e-3"]
    assert sweep.main(elsewhere) == 1, "a sweep of another configuration, whatever its grid"
    assert "(max_seq_length was 128, is 99)" in cli.only_error(capsys.readouterr().err)
    held = lock_folder(folder, "a test")
    assert held is not None
    assert sweep.main([*words, *broken, *grid]) == 1
    line = cli.only_error(capsys.readouterr().err)
    assert line == f"error: output_dir {folder}: another sweep is writing to it; choose another folder"
    os.close(held)
    assert sweep.main([*words, *broken, "--seed", "7", *grid]) == 1
    line = cli.only_error(capsys.readouterr().err)
    assert f"output_dir {folder}: holds a sweep of another configuration (seed was 42, is 7)" in line


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_goes_on(how: signal.Signals, words: list[str], tmp_path: Path) -> None:
    """Its runs end with it, the ones that were complete stay, the same command does the rest."""
    command: list[Any] = [sys.executable, "-m", "open_po", "sweep", *words, "--grid", "beta=0.1,0.3,1", "gamma=0,1"]
    command += ["--loss_type", "dpo_gamma", "--jobs", "2"]
    process = subprocess.Popen(
        command,
        env=cli.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    folder = tmp_path / "sweep"
    deadline = time.monotonic() + 120
    while not (folder / "sweep.csv").exists() and time.monotonic() < deadline:  # written when a run has ended
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert stderr == "error: interrupted; the same command goes on from here\n"
    while running(folder):
        assert time.monotonic() < deadline, "its runs outlive it"
        time.sleep(0.1)
    done = {path.parent: path.stat().st_mtime_ns for path in folder.glob("runs/*/model.safetensors")}
    assert 1 <= len(done) < 6
    again = subprocess.run(command, env=cli.environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [row["status"] for row in table(folder)] == ["completed"] * 6
    assert all((path / "model.safetensors").stat().st_mtime_ns == time for path, time in done.items())
    assert len(stored(tmp_path / "reference")) == 2 * (24 + 7)


def running(folder: Path) -> bool:
    """Whether any process works in `folder`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"dpo_tune_cache" in words and str(folder).encode() in words:
                return True
    return False
