"""Scripts and recipes: what they would start, and two machines that start it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from open_po.commands import launch
from open_po.config import load_config
from tests import cli, tiny

SCRIPTS = sorted(
    path for kind in ("scripts/**/*.sh", "scripts/**/*.sbatch", "configs/**/*.sh") for path in cli.REPOSITORY.glob(kind)
)
RECIPES = {
    "tulu3/dpo_8b.sh": ("allenai/Llama-3.1-Tulu-3-8B-SFT", "allenai/llama-3.1-tulu-3-8b-preference-mixture", 5e-7, 8),
    "olmo2/dpo_7b.sh": ("allenai/OLMo-2-1124-7B-SFT", "allenai/olmo-2-1124-7b-preference-mix", 1e-6, 42),
    "olmo2/dpo_13b.sh": ("allenai/OLMo-2-1124-13B-SFT", "allenai/olmo-2-1124-13b-preference-mix", 8e-7, 8),
}
DryRun = Callable[..., str]
PLACE = (
    *("NUM_NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "PROCESSES_PER_NODE"),
    *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_GPUS_ON_NODE"),
)


def named(path: Path) -> str:
    return str(path.relative_to(cli.REPOSITORY))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPEN_PO_SKIP_INSTALL", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # the Python that runs the tests
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)


def run(*words: str | Path, **environment: str) -> tuple[int, str, str]:
    return cli.finished(cli.start(words, **environment), timeout=120)


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_script_parses(script: Path) -> None:
    assert run("bash", "-n", script) == (0, "", "")


def test_shellcheck_finds_nothing() -> None:
    assert run("shellcheck", "-x", *SCRIPTS) == (0, "", "")


@pytest.mark.parametrize("script", RECIPES)
def test_a_recipe_is_the_published_one(script: str) -> None:
    model, data, rate, seed = RECIPES[script]
    words = Path(cli.REPOSITORY, "scripts/train", script).read_text().split()
    config = load_config([str(cli.REPOSITORY / word) for word in words if re.fullmatch(r"configs/.*\.yaml", word)])
    assert (config.model.model_name_or_path, config.data.mixer_list) == (model, [data, "1.0"])
    assert (config.train.learning_rate, config.train.seed) == (rate, seed)
    assert (config.loss.names, config.loss.beta, config.data.max_seq_length) == (["dpo_norm"], 5, 2048)
    schedule = (config.train.lr_scheduler_type, config.train.warmup_ratio, config.train.weight_decay)
    assert schedule == ("linear", 0.1, 0.0)
    assert (config.train.num_epochs, config.model.gradient_checkpointing) == (1, True)
    assert config.data.scored_turns == "all"
    assert config.output.resume_from_checkpoint == "auto"
    assert config.output.checkpointing_steps is not None


@pytest.fixture
def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """The dry run of a script, with what it hands on to the launcher handed to the launcher in this process."""
    noted = tmp_path / "noted"
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "python").write_text(
        f"""#!{sys.executable} -S
import json, os, sys
if sys.argv[1] == "-c":
    print(sys.argv[0])
else:
    open("{noted}", "w").write(json.dumps([sys.argv[1:], dict(os.environ)]))
"""
    )
    (shim / "python").chmod(0o755)

    def of(script: str, *words: str, **environment: str) -> str:
        path = f"{shim}:{os.environ['PATH']}"
        code, _, stderr = run("bash", script, "--dry-run", *words, PATH=path, **environment)
        assert code == 0, stderr
        command, given = json.loads(noted.read_text())
        assert command[:3] == ["-m", "open_po", "launch"]
        with monkeypatch.context() as patch:
            for name in PLACE:
                if name in given:
                    patch.setenv(name, given[name])
            patch.chdir(cli.REPOSITORY)
            assert launch.main(command[3:]) == 0
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("script", RECIPES)
def test_a_recipes_dry_run(script: str, dry_run: DryRun) -> None:
    text = dry_run(f"scripts/train/{script}", "--pairs", "270000", MASTER_ADDR="gpu0")
    assert "4 nodes x 8 GPU processes, 32 ranks" in text
    assert "Engine: parallel zero3" in text
    assert "Global batch: 128 pairs = per_device_train_batch_size 1 x gradient_accumulation_steps 4 x 32 ranks" in text
    assert "Steps: 2110 = 1 x ceil(pairs / 128)" in text
    command = "MASTER_ADDR=gpu0 MASTER_PORT=29500 GPUS_PER_NODE=8 bash scripts/train/launch.sh configs/models/"
    assert text.count(command) == 4


def test_variables_and_slurm_change_a_recipes_nodes(dry_run: DryRun) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    text = dry_run("scripts/train/tulu3/dpo_8b.sh", **slurm)
    assert "2 nodes x 4 GPU processes" in text
    assert "MASTER_ADDR=a1 MASTER_PORT=15007" in text
    assert "1 node x 2 GPU" in dry_run("scripts/train/olmo2/dpo_7b.sh", NUM_NODES="1", GPUS_PER_NODE="2")
    assert "1 node x 3 CPU" in dry_run("scripts/train/olmo2/dpo_13b.sh", NUM_NODES="1", PROCESSES_PER_NODE="3")


def test_the_debug_scripts_dry_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From end to end, and then the launcher's own of the commands that it prints."""
    place = {"NUM_NODES": "2", "PROCESSES_PER_NODE": "4"}
    code, stdout, stderr = run("bash", "scripts/train/debug/dpo_multi.sh", "--dry-run", "--parallel", "zero2", **place)
    assert code == 0, stderr
    commands = dict(re.findall(r"] (\w+)[^:]*: python -m open_po launch (.*)", stdout))
    assert list(commands) == ["sft", "dpo_norm"]
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(cli.REPOSITORY)
    for stage, engine, batch in (("sft", "auto", 64), ("dpo_norm", "zero2", 32)):
        assert launch.main([*shlex.split(commands[stage]), "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "2 nodes x 4 CPU processes, 8 ranks" in text
        assert f"Engine: parallel {engine}" in text
        each = f"per_device_train_batch_size {batch // 8} x gradient_accumulation_steps 1 x 8 ranks"
        assert f"Global batch: {batch} pairs = {each}" in text


# --------------------------------------------------------------------------------------------------------------- Slurm


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with stand-ins for srun, which passes signals on, and scontrol, which notes what it is asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = f"""#!{sys.executable}
import signal, subprocess, sys, time
child, early = None, []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: child.send_signal(number) if child else early.append(number))
child = subprocess.Popen([word for word in sys.argv[1:] if not word.startswith("--")])
for number in early:
    child.send_signal(number)
sys.exit(child.wait())
"""
    scontrol = f'#!/bin/sh\necho "$@" >>{tmp_path}/scontrol\n'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (3, False), (0, False)])
def test_a_preempted_job_goes_back_into_the_queue(slurm: Path, tmp_path: Path, code: int, requeued: bool) -> None:
    script = tmp_path / "script.sh"
    ready = tmp_path / "ready"
    script.write_text(f"trap 'exit {code}' USR1\ntouch {ready}\nwhile :; do sleep 0.05; done\n")
    path = f"{slurm}:{os.environ['PATH']}"
    job = cli.start(["bash", "scripts/train/slurm.sbatch", script], PATH=path, SLURM_JOB_ID="42")
    while not ready.exists():
        assert job.poll() is None
    job.send_signal(10)  # SIGUSR1, as Slurm sends it to the batch script
    assert cli.finished(job, timeout=20)[0] == (0 if requeued else code)
    assert (tmp_path / "scontrol").exists() == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 42\n"


def test_a_job_without_a_script() -> None:
    code, _, stderr = run("bash", "scripts/train/slurm.sbatch", "--nodes")
    assert code == 2
    assert stderr.startswith("error: --nodes: is no launch script; sbatch ")


# ------------------------------------------------------------------------------------------------------- two machines


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable: as far as a network goes, two machines."""
    names = [f"open-po-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            ends = [f"op{os.getpid() % 100000}{letter}" for letter in "ab"]
            _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
            for number, (name, end) in enumerate(zip(names, ends, strict=True)):
                _ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", end)
                _ip("-n", name, "link", "set", end, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here ({error})")
        yield names
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def launch_on(
    machines: Sequence[str], words: Sequence[str], numbers: Sequence[int] = (0, 1)
) -> list[tuple[int, str, str]]:
    """The same command on both; what each comes to."""
    started = []
    for number, name in zip(numbers, machines, strict=True):
        where = {"NUM_NODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "10.77.0.1", "PROCESSES_PER_NODE": "1"}
        command = ["ip", "netns", "exec", name, "bash", "scripts/train/launch.sh", *words]
        started.append(cli.start(command, **where))
    return [cli.finished(process, timeout=240) for process in started]


@pytest.mark.slow
def test_two_machines_train_as_one(machines: list[str], llama: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(9, seed=6))
    same = {"num_epochs": 3, "optimizer": "sgd", "learning_rate": 0.1}
    one = cli.train(llama, data, tmp_path / "one" / "run", per_device_train_batch_size=4, **same)
    two = tmp_path / "two" / "run"
    words = cli.arguments(llama, data, two, per_device_train_batch_size=2, **same)
    found = launch_on(machines, words)
    assert [code for code, _, _ in found] == [0, 0], found
    assert [stdout.count("Run completed") for _, stdout, _ in found] == [1, 0]
    assert "2 nodes x 1 CPU process (" in found[0][1]
    cli.assert_close_weights(cli.weights(two), cli.weights(one), cli.weights(llama))


@pytest.mark.slow
def test_two_machines_end_when_one_has_no_model(machines: list[str], tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_rows(9))
    found = launch_on(machines, cli.arguments(tmp_path / "nowhere", data, tmp_path / "run"))
    assert [code for code, _, _ in found] == [1, 1]
    assert "error: rank " in found[0][2].splitlines()[-1]


@pytest.mark.slow
def test_two_machines_that_both_are_node_0(machines: list[str], tmp_path: Path) -> None:
    found = launch_on(machines, cli.arguments(tmp_path / "model", tmp_path / "data", tmp_path / "run"), (0, 0))
    lines = {cli.only_error(stderr) for _, _, stderr in found}
    assert [code for code, _, _ in found] == [1, 1]
    assert len(lines) == 1
    assert "error: NODE_RANK 0: is given twice" in lines.pop()
