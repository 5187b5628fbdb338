"""`python -m open_po pipeline`: which files its words mean, what is run again and what is not, faults, the table."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from open_po.commands import pipeline
from open_po.commands.pipeline_overlays import Overlays
from open_po.commands.pipeline_stages import Pipeline, read_pipeline
from open_po.config import load_config
from open_po.output.files import lock_folder
from tests import cli, tiny
from tests.stores import stored

Capture = pytest.CaptureFixture[str]
PLACE = ("NUM_NODES", "NODE_RANK", "GPUS_PER_NODE", "PROCESSES_PER_NODE", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES")


@pytest.fixture(autouse=True)
def _one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def overlays(llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with overlays of a tiny model, task and two losses, which is the working directory."""
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.text_rows(7, seed=9))
    files = {
        "models/tiny.yaml": f"model_name_or_path: {llama}\nreference_cache_dir: reference\nmodel_revision: null\n",
        "tasks/words_sft.yaml": f"mixer_list: [{pairs_file}, 1.0]\nloss_type: sft\nlearning_rate: 1e-2\n",
        "tasks/words.yaml": f"mixer_list: [{pairs_file}, 1.0]\neval_mixer_list: [{held_out}, 1.0]\nbeta: 3\n",
        "tasks/words/simpo.yaml": "gamma: 0.25\nlearning_rate: 3e-3\n",
        "losses/dpo.yaml": "loss_type: dpo\nbeta: 0.2\n",
        "losses/simpo.yaml": "loss_type: simpo\ngamma: 0.9\n",
    }
    more = "max_seq_length: 128\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 1\n"
    more += "preprocessing_num_workers: 1\ncheckpointing_steps: 2\n"
    for name, text in files.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + (more if name.startswith("tasks/words") and "/words/" not in name else ""))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*words: str, skip_sft: bool = False) -> Pipeline:
    names = [word for word in words if not word.startswith("--")][:3]
    return read_pipeline(Overlays.find(names), words[len(names) :], skip_sft=skip_sft)


def refused(capsys: Capture, *words: str, code: int = 2) -> list[str]:
    capsys.readouterr()
    assert pipeline.main(words) == code
    return capsys.readouterr().err.splitlines()


# --------------------------------------------------------------------------------------------------- words and settings


def test_stages_merge_their_files_and_take_their_flags(overlays: Path, llama: Path) -> None:
    found = read("tiny", "words", "simpo", "--num_epochs", "2", "--sft.num_epochs=3", "--seed", "7")
    assert found.sft is not None
    sft, (simpo,) = found.sft.config, found.losses
    assert (sft.model.model_name_or_path, sft.train.num_epochs, sft.train.learning_rate) == (str(llama), 3, 1e-2)
    assert (sft.loss.names, sft.train.seed, sft.output.output_dir) == (["sft"], 42, "output/tiny_words/sft")
    config = simpo.config
    assert config.model.model_name_or_path == "output/tiny_words/sft"
    assert (config.train.num_epochs, config.train.seed, config.train.learning_rate) == (2, 7, 3e-3)
    assert (config.loss.names, config.loss.beta, config.loss.gamma) == (["simpo"], 3.0, 0.25)  # the task's, its loss's
    assert (config.output.output_dir, config.output.exp_name) == ("output/tiny_words/simpo", "tiny_words_simpo")
    assert config.output.resume_from_checkpoint == "auto"


def test_a_loss_overlay_wins_over_the_task_and_both_may_be_paths(overlays: Path) -> None:
    (overlays / "mine.yaml").write_text("loss_type: [dpo, sft]\nbeta: [7, null]\n")
    (mine,) = read("configs/models/tiny.yaml", "configs/tasks/words.yaml", "mine.yaml", "--output_dir", "here").losses
    assert (mine.name, mine.config.loss.names, mine.config.loss.beta) == ("mine", ["dpo", "sft"], [7.0, None])
    assert mine.config.output.output_dir == "here/mine"
    assert mine.config.model.model_name_or_path == "here/sft"


def test_without_an_sft_stage_preferences_start_from_the_model(overlays: Path, llama: Path) -> None:
    skipped = read("tiny", "words", "dpo", skip_sft=True)
    (overlays / "configs/tasks/words_sft.yaml").unlink()
    absent = read("tiny", "words", "dpo")
    for found in (skipped, absent):
        assert found.sft is None
        assert found.models == [str(llama), "output/tiny_words/dpo"]


def test_one_loss_that_needs_log_probs_by_token_has_all_kept_so(overlays: Path) -> None:
    (overlays / "ld.yaml").write_text("loss_type: dpo\nld_alpha: 0.5\n")
    found = read_pipeline(Overlays.find(["tiny", "words", "dpo", "ld.yaml"]), [], skip_sft=False)
    assert [stage.config.reference.reference_cache_level for stage in found.losses] == ["token", "token"]


def test_wrong_names_list_what_there_is(overlays: Path, capsys: Capture) -> None:
    (overlays / "configs/tasks/lonely_sft.yaml").touch()
    assert refused(capsys, "tny", "words_sft.yml", "dop", "simpo") == [
        "config error: model tny: there is no configs/models/tny.yaml; did you mean tiny? configs/models has tiny; or "
        "name a YAML file",
        "config error: task words_sft.yml: there is no words_sft.yml; configs/tasks has lonely_sft, words; or name a "
        "YAML file",
        "config error: loss dop: there is no configs/losses/dop.yaml; did you mean dpo? configs/losses has dpo, simpo; "
        "or name a YAML file",
    ]
    (line,) = refused(capsys, "tiny", "words", "dpo", "dpo")
    assert line == "config error: loss dpo: is named twice; leave one out"
    (line,) = refused(capsys, "tiny", "words", "--seed", "1")
    assert line == (
        "config error: MODEL TASK LOSS [LOSS ...]: must come first, got tiny words; configs/models has tiny; or name a "
        "YAML file"
    )
    os.chdir(overlays / "configs")
    (line,) = refused(capsys, "tiny", "tasks/words.yaml", "losses/dpo.yaml")
    assert "there are none in configs/models, which lies in the repository" in line


def test_mistakes_of_every_stage_are_told_before_anything_runs(overlays: Path, capsys: Capture) -> None:
    words = ["tiny", "words", "dpo", "simpo", "--sft.learning_rat", "1", "--beta=-1", "--resume_from_checkpoint", "hub"]
    assert refused(capsys, *words) == [
        "config error: resume_from_checkpoint: is set by the pipeline itself, every stage goes on",
        "config error: sft: learning_rat: unknown field; did you mean learning_rate?",
        "config error: dpo: loss_type dpo: beta is -1 but must lie in (0, inf)",
        "config error: simpo: loss_type simpo: beta is -1 but must lie in (0, inf)",
    ]
    for given, said in (
        (["--model_name_or_path", "m"], "model_name_or_path: is the SFT stage's model; give --sft.model_name_or_path"),
        (["--loss_type", "ipo"], "loss_type: is what LOSS names; name its file there"),
        (["--sft.output_dir", "x"], "sft.output_dir: is set by the pipeline itself"),
        (["--skip-sft", "--sft.seed", "1"], "sft.seed: there is no SFT stage to set it for"),
        (["--push_to_hub", "--hf_repo_revision", "x"], "hf_repo_revision: stages would overwrite one another's branch"),
        (["-x", "more"], "-x: MODEL TASK LOSS come first"),
    ):
        (line,) = refused(capsys, "tiny", "words", "dpo", "simpo", *given)
        assert said in line
    (overlays / "configs/tasks/words/evaluate.yaml").write_text("task: [exact\n")
    (line,) = refused(capsys, "tiny", "words", "dpo")
    assert line.startswith("config error: configs/tasks/words/evaluate.yaml: cannot be read (")
    assert not (overlays / "output").exists()


def test_a_dry_run_has_commands_that_describe_the_stages(
    overlays: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (overlays / "configs/tasks/words/evaluate.yaml").write_text("task: exact\ndata: [x y.jsonl]\nmetrics: [chrf]\n")
    (overlays / "configs/tasks/words/prepare.sh").touch()
    words = ["tiny", "words", "dpo", "simpo", "--dry-run", "--evaluate.metrics", "bleu"]
    for processes, program in ((None, ["-m", "dpo_tune_cache"]), ("2", ["-m", "open_po", "launch"])):
        if processes is not None:
            monkeypatch.setenv("PROCESSES_PER_NODE", processes)
        assert pipeline.main(words) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert head == "Pipeline tiny_words in output/tiny_words; nothing is started"
        stages = [re.fullmatch(r"\[\d/5\] (\w+): (.*)", line) for line in lines]
        commands = {match[1]: shlex.split(match[2]) for match in stages if match is not None}
        assert list(commands) == ["prepare", "sft", "dpo", "simpo", "evaluation"]
        assert commands["prepare"] == ["bash", "configs/tasks/words/prepare.sh"]
        found = {
            stage.name: stage.config for stage in read_pipeline(Overlays.find(words[:4]), [], skip_sft=False).trainings
        }
        for name, config in found.items():
            assert commands[name][:1] + commands[name][1 : 1 + len(program)] == ["python", *program]
            assert load_config(commands[name][1 + len(program) :]) == config
        ranks = "" if processes is None else "torch.distributed.run --standalone --nproc_per_node 2 -m "
        assert shlex.join(commands["evaluation"]) == (
            f"python -m {ranks}open_po evaluate --model output/tiny_words/sft output/tiny_words/dpo "
            "output/tiny_words/simpo --max_seq_length 128 --preprocessing_num_workers 1 --task exact --data "
            "'x y.jsonl' --metrics bleu --out output/tiny_words/evaluation"
        )
    assert not (overlays / "output").exists()


def test_evaluation_reads_held_out_data_as_the_preference_stage_does(overlays: Path, capsys: Capture) -> None:
    (overlays / "configs/tasks/words/evaluate.yaml").write_text("task: sum\n")
    task = overlays / "configs/tasks/words.yaml"
    common = "mixer_list: [x.jsonl, 1.0]\nprompt_template: '{a} {b}: '\nadd_bos: true\n"
    task.write_text(
        common + "eval_mixer_list: [some/set, 0.5, held_out.jsonl, 40]\neval_mixer_list_splits: [test, 'train[:9]']\n"
        "eval_mixer_list_configs: [axis, null]\n"
    )
    assert read("tiny", "words", "dpo").evaluate == {
        "prompt_template": ["{a} {b}: "],
        "add_bos": ["true"],
        "data": ["some/set", "0.5", "held_out.jsonl", "40"],
        "mixer_list_splits": ["test", "train[:9]"],
        "mixer_list_configs": ["axis", "null"],
        "task": ["sum"],
    }
    part = "{{dataset: {}, format: {}}}"
    entries = [part.format("x.jsonl", "text"), part.format("y.jsonl", "messages")]
    task.write_text(common.splitlines()[0] + f"\neval_mixture: [{entries[0]}]\n")
    assert read("tiny", "words", "dpo").evaluate == {"data": ["x.jsonl", "1.0"], "format": ["text"], "task": ["sum"]}
    task.write_text(common.splitlines()[0] + f"\neval_mixture: [{', '.join(entries)}]\n")
    (line,) = refused(capsys, "tiny", "words", "dpo")
    assert line.startswith("config error: evaluate.data: the parts of eval_mixture differ in format; ")
    task.write_text(common)
    (overlays / "configs/tasks/words/evaluate.yaml").write_text("metrics: chrf\n")
    lines = refused(capsys, "tiny", "words", "dpo", "--skip-sft", "--model_revision", "v2", "--evaluate.out", "x")
    assert [line.split(";")[0].removeprefix("config error: ") for line in lines] == [
        "evaluate.out: is set by the pipeline itself",
        "evaluate.data: is required where the task has no eval_mixer_list",
        "evaluate.task: is required, mt, sum or exact",
        "model_revision v2: cannot be evaluated beside models that have none",
    ]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (["--evaluate.xyz", "chrf"], "xyz: unknown field; --help lists all fields"),
        (["--evaluate.metrics", "crhf"], "metrics: there is no crhf; did you mean chrf?"),
        (["--evaluate.learning_rate", "1e-6"], "learning_rate: evaluate does not train; leave it out"),
    ],
)
def test_mistakes_of_evaluation_are_told_before_training(
    flag: list[str], said: str, overlays: Path, capsys: Capture
) -> None:
    (overlays / "configs/tasks/words/evaluate.yaml").write_text("task: exact\ndata: held_out.jsonl\n")
    assert refused(capsys, "tiny", "words", "dpo", *flag) == [f"config error: {said}"]


# ------------------------------------------------------------------------------------------------ done, changed, failed


def finish(found: Pipeline, accuracy: float = 0.75) -> None:
    """Folders as complete runs leave them."""
    for stage in found.trainings:
        stage.folder.path.mkdir(parents=True)
        stage.folder.config.write_text(stage.config.to_yaml())
        (stage.folder.path / "config.json").write_text("{}")
        (stage.folder.path / "model.safetensors").write_text(stage.name)
        content: dict[str, Any] = {"status": "completed", "train": {}, "data": {}, "run": {}}
        if stage.name != "sft":
            content |= {"eval_before": {"rewards/accuracy": 0.5}, "eval": {"rewards/accuracy": accuracy}}
            estimate = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.05}
            of_all = {"pairs": 6, "figures": {"rewards/accuracy": estimate}}
            parts: dict[str, Any] = {"by_source": {}, "by_length": {}, "by_longer": {}}
            content |= {"held_out": {"all": of_all, **parts}} if stage.name != "simpo" else {}  # an earlier version's
        stage.folder.summary.write_text(json.dumps(content))


def test_what_is_complete_stays_and_what_has_changed_is_told(overlays: Path, capsys: Capture) -> None:
    finish(read("tiny", "words", "dpo"))
    assert pipeline.main(["tiny", "words", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert "[1/2] sft: complete already\n" in shown
    assert "[2/2] dpo: complete already, held-out reward accuracy 50.0% -> 75.0% (65.0% to 80.0%)\n" in shown
    assert not list((overlays / "output/tiny_words/logs").iterdir()), "no process was started"
    line = "; --restart runs it and what follows from it anew, --output_dir keeps it"
    run = "output/tiny_words/dpo holds a run of another configuration"
    assert refused(capsys, "tiny", "words", "dpo", "--beta", "9", code=1) == [
        f"error: dpo: {run} (beta was 0.2, is 9.0){line}"
    ]
    held_out = overlays / "held_out.jsonl"
    assert "eval_mixer_list was" in refused(capsys, "tiny", "words", "dpo", "--eval_mixer_list", "x", "1", code=1)[0]
    text = held_out.read_text()
    tiny.write_jsonl(held_out, tiny.text_rows(6, seed=9))
    assert refused(capsys, "tiny", "words", "dpo", code=1) == [
        f"error: dpo: {run} ({held_out} has changed since){line}"
    ]
    held_out.write_text(text)
    (overlays / "output/tiny_words/sft/model.safetensors").write_text("other weights")
    assert refused(capsys, "tiny", "words", "dpo", code=1) == [
        f"error: dpo: {run} (output/tiny_words/sft has changed since){line}"
    ]


def test_all_that_a_stage_reads_on_this_machine_counts(overlays: Path, llama: Path, capsys: Capture) -> None:
    """A change of any of it is told, and undone is none; what is beside it in a folder is not looked at."""
    reference, tokenizer, rows = overlays / "reference_model", overlays / "a_tokenizer", overlays / "rows"
    for folder, name in ((reference, "model.safetensors"), (tokenizer, "tokenizer.json"), (rows, "train.parquet")):
        folder.mkdir()
        (folder / name).write_text("old")
    (overlays / "template.jinja").write_text("old")
    (overlays / "rows_of_mine.py").write_text("old")
    part = f"{{dataset: {rows}, format: 'rows_of_mine:read'}}"
    words = ["tiny", "words", "dpo", "--skip-sft", "--mixer_list", "null", "--mixture", f"[{part}]"]
    words += ["--reference_model_name_or_path", str(reference), "--tokenizer_name", str(tokenizer)]
    words += ["--chat_template_name", str(overlays / "template.jinja")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(overlays))
        stage = read(*[word for word in words if word != "--skip-sft"], skip_sft=True).losses[0]
        before = stage.inputs()
        (tokenizer / "notes.txt").write_text("no part of it")
        assert stage.inputs() == before
        for path, name in (
            (reference / "model.safetensors", str(reference)),
            (tokenizer / "tokenizer.json", f"the tokenizer in {tokenizer}"),
            (rows / "train.parquet", str(rows)),
            (overlays / "template.jinja", str(overlays / "template.jinja")),
            (overlays / "rows_of_mine.py", "the module of rows_of_mine:read"),
        ):
            path.write_text("new")
            now = stage.inputs()
            assert {key for key, _ in now.items() ^ before.items()} == {name}
            assert now.keys() == before.keys()
            path.write_text("old")
        assert stage.inputs() == before


def test_what_an_earlier_version_did_not_record_is_recorded(overlays: Path, capsys: Capture) -> None:
    found = read("tiny", "words", "dpo")
    finish(found)
    assert pipeline.main(["tiny", "words", "dpo"]) == 0
    path = overlays / "output/tiny_words/.pipeline.json"
    whole = json.loads(path.read_text())
    name = next(name for name in whole["sft"] if name.startswith("the tokenizer in"))
    less = {**whole, "sft": {key: value for key, value in whole["sft"].items() if key != name}}
    path.write_text(json.dumps(less))
    assert pipeline.main(["tiny", "words", "dpo"]) == 0
    assert json.loads(path.read_text()) == whole
    path.write_text(json.dumps({**whole, "sft": {**whole["sft"], name: "other"}}))
    (line,) = refused(capsys, "tiny", "words", "dpo", code=1)
    assert f"({name} has changed since)" in line


def test_a_stage_that_fails_is_named_with_its_log(overlays: Path, capsys: Capture) -> None:
    script = overlays / "configs/tasks/words/prepare.sh"
    script.write_text("echo some words\necho 'error: the disk has gone' >&2\nexit 3\n")
    assert refused(capsys, "tiny", "words", "dpo", code=1) == [
        "error: stage prepare failed with exit code 3 (the disk has gone); its log: output/tiny_words/logs/prepare.log"
    ]
    script.write_text("kill -KILL $$\n")
    (line,) = refused(capsys, "tiny", "words", "dpo", code=1)
    assert line.startswith("error: stage prepare was ended by SIGKILL (")
    script.write_text("echo 'stopped: step 3 is saved'\nexit 75\n")
    assert refused(capsys, "tiny", "words", "dpo", code=75) == ["stopped: stage prepare: stopped: step 3 is saved"]
    held = lock_folder(overlays / "output/tiny_words", "a test")
    assert held is not None
    (line,) = refused(capsys, "tiny", "words", "dpo", code=1)
    assert line == "error: output_dir output/tiny_words: another pipeline is writing to it; choose another folder"
    os.close(held)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_and_says_that_it_goes_on(
    how: signal.Signals, code: int, overlays: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    # A training run in this process, of an earlier test, has left a thread that ends it at a second signal.
    request.addfinalizer(partial(signal.set_wakeup_fd, signal.set_wakeup_fd(-1)))
    script = "trap 'echo saved >>prepared; exit 75' TERM\necho started >>prepared\nwhile :; do sleep 0.05; done\n"
    (overlays / "configs/tasks/words/prepare.sh").write_text(script)

    def send() -> None:
        while not (overlays / "prepared").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), how)

    before = signal.getsignal(how)
    threading.Thread(target=send).start()
    said = f"stopped: {how.name}; what is on disk is kept, and the same command goes on from here"
    assert refused(capsys, "tiny", "words", "dpo", code=code) == [said]
    assert (overlays / "prepared").read_text() == "started\nsaved\n"
    assert signal.getsignal(how) == before


def test_it_is_no_rank(overlays: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert refused(capsys, "tiny", "words", "dpo") == [
        "config error: torchrun: a pipeline is no run; start it by itself, it starts the ranks of each stage"
    ]


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_says_what_evaluation_found(overlays: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of evaluation.json is in pipeline.csv; the console and pipeline.md show them rounded."""
    (overlays / "configs/tasks/words/evaluate.yaml").write_text("task: exact\ndata: held_out.jsonl\n")
    finish(read_pipeline(Overlays.find(["tiny", "words", "dpo", "simpo"]), [], skip_sft=False))
    models = {
        name: {
            "metrics": {
                "exact_match": {"value": v, "low": v - 2.5, "high": v + 1.25},
                "chrf": {"value": v / 2, "low": 0, "high": 99},
            },
            "lengths": {"chosen": 7.0, "rejected": 7.5, "generated": v / 10},
        }
        for name, v in {"sft": 42.0, "dpo": 61.5, "simpo": 87.75}.items()
    }
    noted = overlays / "noted"
    program = overlays / "evaluate.py"
    program.write_text(
        "import json, pathlib, sys\n"
        f"open({str(noted)!r}, 'a').write('once\\n')\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir(exist_ok=True)\n"
        f"(out / 'evaluation.json').write_text({json.dumps({'models': models})!r})\n"
    )
    monkeypatch.setattr(
        "open_po.commands.pipeline_run._evaluation",
        lambda found, place: [sys.executable, str(program), *found.evaluation_words()],
    )
    for _ in range(2):
        assert pipeline.main(["tiny", "words", "dpo", "simpo"]) == 0
    assert noted.read_text() == "once\n", "what is evaluated is not evaluated again"
    shown = capsys.readouterr().out
    assert "[4/4] evaluation: complete already" in shown
    folder = overlays / "output/tiny_words"
    with open(folder / "pipeline.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["SFT", "dpo", "simpo"]
    for row, model in zip(rows, models.values(), strict=True):
        for name, figures in model["metrics"].items():
            assert [float(row[name + end]) for end in ("", "_low", "_high")] == list(figures.values())
        assert float(row["mean_answer_tokens"]) == model["lengths"]["generated"]
    columns = [f"reward_accuracy{end}" for end in ("_before", "", "_low", "_high")]
    assert [[row[name] for name in columns] for row in rows] == [
        [""] * 4,
        ["0.5", "0.75", "0.65", "0.8"],
        ["0.5", "0.75", "", ""],
    ]
    assert "| simpo | 87.8 (85.2 to 89.0) | 43.9 (0.0 to 99.0) | 50.0% -\\> 75.0% | 8.8 |" in (
        (folder / "pipeline.md").read_text().replace("->", "-\\>")
    )
    assert re.search(
        r"dpo +│ +61.5 \(59.0 to 62.8\) │ +30.8 \(0.0 to 99.0\) │ +50.0% -> 75.0% \(65.0% to 80.0%\) │ +6.2", shown
    )
    (folder / "dpo/model.safetensors").write_text("trained anew")
    assert pipeline.main(["tiny", "words", "dpo", "simpo"]) == 0
    assert noted.read_text() == "once\nonce\n", "other weights are evaluated"


# --------------------------------------------------------------------------------------------------------- whole ones


@pytest.fixture
def command(overlays: Path) -> list[str]:
    (overlays / "configs/tasks/words/evaluate.yaml").write_text("task: exact\ndata: held_out.jsonl\n")
    return [sys.executable, "-m", "open_po", "pipeline", "tiny", "words", "dpo", "simpo", "--num_epochs", "4"]


def finished(command: list[str], *more: str) -> str:
    done = subprocess.run([*command, *more], env=cli.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_pipeline_killed_in_each_stage_ends_as_one_that_never_was(command: list[str], overlays: Path) -> None:
    """SIGKILL amid SFT, each loss and evaluation, of the stage's process too: the same weights, bit for bit."""
    whole = overlays / "output/tiny_words"
    finished(command)
    assert cli.summary(whole / "simpo")["reference"] is None
    assert len(stored(overlays / "reference")) == 2 * (24 + 7)
    killed = overlays / "killed"
    signs = {name: killed / name / "checkpoints" / "step_000002" for name in ("sft", "dpo", "simpo")}
    signs["evaluation"] = killed / "logs" / "evaluation.log"
    for name, sign in signs.items():
        process = subprocess.Popen([*command, "--output_dir", "killed"], env=cli.environment(), stdout=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not sign.exists():
            assert process.poll() is None, f"{name} was over before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if name != "dpo":  # whose own process is left to find out
            process.send_signal(signal.SIGSTOP)
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.communicate()
    finished(command, "--output_dir", "killed")
    for name in ("sft", "dpo", "simpo"):
        assert cli.equal(cli.weights(killed / name), cli.weights(whole / name)), name
    tables = [(folder / "pipeline.csv").read_text().replace(str(folder.name), "") for folder in (killed, whole)]
    assert tables[0].replace("output/", "").replace("//", "/") == tables[1].replace("output/", "").replace("//", "/")
    times = {path: path.stat().st_mtime_ns for path in killed.glob("*/model.safetensors")}
    shown = finished(command, "--output_dir", "killed")
    assert shown.count("complete already") == 4
    assert times == {path: path.stat().st_mtime_ns for path in killed.glob("*/model.safetensors")}


@pytest.mark.slow
def test_restart_runs_anew_what_changed_and_what_follows(command: list[str], overlays: Path) -> None:
    finished(command)
    folder = overlays / "output/tiny_words"
    before = {name: cli.weights(folder / name) for name in ("sft", "dpo", "simpo")}
    (overlays / "configs/tasks/words/simpo.yaml").write_text("gamma: 0.5\nlearning_rate: 3e-3\n")
    shown = finished(command, "--restart")
    assert "simpo: begins anew (gamma was 0.25, is 0.5)" in shown
    assert shown.count("complete already") == 2
    shown = finished(command, "--restart", "--sft.seed", "3")
    assert "sft: begins anew (seed was 42, is 3)" in shown
    for name in ("dpo", "simpo"):
        assert f"{name}: begins anew (output/tiny_words/sft has changed since)" in shown
    for name, weights in before.items():
        assert not cli.equal(cli.weights(folder / name), weights), name
