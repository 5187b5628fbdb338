"""What needs no run answers at once: help, and every mistake in a configuration, a command or its flags."""

from __future__ import annotations

import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from open_po.commands.command_line import run_command
from open_po.config import load_config
from tests import cli

HEAVY = {"torch", "numpy", "transformers", "datasets", "accelerate", "pandas", "matplotlib", "huggingface_hub", "wandb"}
LIMIT = 0.7  # seconds
TRAIN = "dpo_tune_cache.py"
ANSWERS = {  # the words, the exit code and what the last line says
    f"{TRAIN} --help": (0, ""),
    f"{TRAIN} mistake.yaml --num_epochs many --beta=-1": (2, "loss_type dpo: beta is -1 but must lie in (0, inf)"),
    f"{TRAIN} broken.yaml": (2, "broken.yaml, line 2: is not valid YAML"),
    f"{TRAIN} --model_name_or_path m --dataset_mixer_list a 1.0 --dpo_beta 0.2 --dry-run": (0, ""),
    "-m open_po": (0, ""),
    "-m open_po scores": (
        2,
        "error: scores: is no command; there are cache, plan, inspect, score, evaluate, sweep, pipeline",
    ),
    "-m open_po cache --help": (0, ""),
    "-m open_po cache build --help": (0, ""),
    "-m open_po cache build --learning_rte 1": (2, "mixer_list: is required"),
    "-m open_po cache prune --mdel x": (2, "unrecognized arguments: --mdel x; see python -m open_po cache --help"),
    "-m open_po score --help": (0, ""),
    "-m open_po score --model m --data d --out o --learning_rte 1": (2, "learning_rte: unknown field"),
    "-m open_po evaluate --help": (0, ""),
    "-m open_po evaluate --model m --task mt --data d --metrics chrff": (2, "there is no chrff; did you mean chrf?"),
    "-m open_po sweep --help": (0, ""),
    "-m open_po sweep --grid learning_rte=1,2 --jobs x": (2, "argument --jobs: invalid int value: 'x'"),
    "-m open_po sweep broken.yaml --grid beta=1,-1": (2, "loss_type dpo: beta is -1 but must lie in (0, inf)"),
    "-m open_po pipeline --help": (0, ""),
    "-m open_po pipeline a b c": (2, "config error: loss c: there is no configs/losses/c.yaml; there are none in"),
    "-m open_po watch --help": (0, ""),
    "-m open_po watch nowhere": (1, "error: nowhere: holds no run, and no sweep; name an output_dir"),
    "-m open_po watch nowhere --interval 0": (2, "argument --interval: 0: must be above 0"),
    "-m open_po report --help": (0, ""),
    "-m open_po inspect --help": (0, ""),
    "-m open_po inspect --learning_rte 1": (2, "mixer_list: is required"),
    "-m open_po plan --help": (0, ""),
    "-m open_po plan --learning_rte 1": (2, "mixer_list: is required"),
    "-m open_po upload --help": (0, ""),
    "-m open_po upload --patience x": (2, "argument --patience: invalid float value: 'x'"),
    "-m open_po launch --help": (0, ""),
    "-m open_po launch --learning_rte 1 --pairs 3": (2, "mixer_list: is required"),
    "-m open_po.quickstart --help": (0, ""),
    "-m open_po.quickstart build --sed 1": (2, "unrecognized arguments: --sed 1"),
}
RUN_AND_TELL = """
import atexit, runpy, sys
atexit.register(lambda: print("modules:", *{name.partition(".")[0] for name in sys.modules}))
if sys.argv[1] == "-m":
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mistake.yaml").write_text("learning_rte: 1\nloss_type: dpo\n")
    (tmp_path / "broken.yaml").write_text("mixer_list: [\n")
    (tmp_path / TRAIN).symlink_to(cli.REPOSITORY / TRAIN)
    return tmp_path


def answer(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=folder, env=cli.environment(), capture_output=True, text=True)


@pytest.mark.parametrize("words", ANSWERS)
def test_an_answer_imports_nothing_that_only_a_run_needs(words: str, folder: Path) -> None:
    code, said = ANSWERS[words]
    done = answer("-c", RUN_AND_TELL, *words.split(), folder=folder)
    assert done.returncode == code, done.stderr
    assert said in (done.stderr.splitlines() or [""])[-1]
    modules = re.findall(r"\S+", done.stdout.splitlines()[-1])
    assert {"modules:", "sys", "open_po"} <= set(modules)
    assert not HEAVY & set(modules)


def test_every_mistake_is_told_at_once(folder: Path) -> None:
    done = answer(TRAIN, "mistake.yaml", "--num_epochs", "many", "--beta=-1", "--loss_typ", "ipo", folder=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "config error: learning_rte: unknown field; did you mean learning_rate?",
        "config error: num_epochs: expects a whole number, got 'many'",
        "config error: loss_typ: unknown field; did you mean loss_type?",
        "config error: model_name_or_path: is required, a local folder or a Hub name",
        "config error: mixer_list: is required, the training data (or dataset_mixer or mixture in YAML)",
        "config error: loss_type dpo: beta is -1 but must lie in (0, inf)",
    ]


@pytest.mark.parametrize("words", [f"{TRAIN} --help", f"{TRAIN} mistake.yaml", "-m open_po sweep --grid x=1"])
def test_an_answer_takes_little_time(words: str, folder: Path) -> None:
    """The processor's, which other work on the machine does not add to, and the best of three."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    took = []
    for _ in range(3):
        before = used()
        answer(*words.split(), folder=folder)
        took.append(used() - before)
    assert min(took) < LIMIT


def test_the_collector_of_garbage_works_again_after_an_import_that_fails() -> None:
    def load() -> object:
        assert not gc.isenabled()
        raise ImportError("a library is broken")

    with pytest.raises(ImportError, match="a library is broken"):
        run_command(lambda: load_config(["--model_name_or_path", "m", "--mixer_list", "d", "1.0"]), load)  # type: ignore[arg-type]
    assert gc.isenabled()


def test_under_torchrun_the_launcher_gives_way_before_it_imports(folder: Path) -> None:
    """To the run, which is this process then."""
    script = """
import os, sys
os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
os.execv = lambda program, words: sys.exit(f"{words[1:]} {'torch' in sys.modules}")
from open_po.__main__ import main
main(["launch", "--model_name_or_path", "m", "--mixer_list", "d", "1.0"])
"""
    done = answer("-c", script, folder=folder)
    program = os.path.join(cli.REPOSITORY, TRAIN)
    assert done.stderr.strip() == f"{[program, '--model_name_or_path', 'm', '--mixer_list', 'd', '1.0']} False"
