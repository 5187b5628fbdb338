"""`python -m open_po report`: what the page says, against what the runs' files say."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from open_po.commands import report
from tests import cli, tiny
from tests.report.pages import Page, make_page, make_run, write_lines

Capture = pytest.CaptureFixture[str]

NASTY = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">&amp;{{ 7*7 }}</title>"
TITLES = {  # by the name in metrics.jsonl
    "train_loss": "Loss",
    "rewards/accuracy": "Reward accuracy",
    "rewards/margin": "Reward margin",
    "logps/chosen": "Log-prob of chosen responses",
    "logps/rejected": "Log-prob of rejected responses",
    "rewards/chosen": "Reward of chosen responses",
    "rewards/rejected": "Reward of rejected responses",
    "rewards/average": "rewards/average",
    "grad_norm": "Gradient norm",
    "optim/update_fraction": "Weights changed",
    "learning_rate": "Learning rate",
    "perf/pairs_per_second": "Throughput in pairs",
    "perf/tokens_per_second": "Throughput in tokens",
    "perf/peak_memory_gb": "Peak memory",
}


@pytest.fixture
def finished(llama: Path, pairs_file: Path, tmp_path: Path) -> Path:
    """A run of six steps with held-out pairs."""
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.text_rows(7, seed=5))
    fields: dict[str, Any] = {"eval_mixer_list": [held_out, "1.0"], "eval_steps": 3, "exp_name": "finished"}
    return cli.train(llama, pairs_file, tmp_path / "finished", loss_type="dpo_norm", **fields)


def test_a_run_s_curves_and_figures_are_those_of_its_files(finished: Path, tmp_path: Path) -> None:
    page = make_page(tmp_path / "page.html", finished)
    records, summary = cli.metrics(finished), cli.summary(finished)
    drawn = {figure["title"] for figure in page.figures}
    assert drawn == set(TITLES.values())
    for name, title in TITLES.items():
        train = [record for record in records if "train_loss" in record]
        assert len(train) == 6
        steps, values = page.points(title, 0, "line")
        assert steps == [record["training_step"] for record in train]
        assert values == pytest.approx([record[name] for record in train], rel=1e-5, abs=1e-12)
        held_out = [record for record in records if f"eval/{name.removeprefix('train_')}" in record]
        if held_out:
            steps, values = page.points(title, 0, "held_out")
            assert steps == [0, 3, 6]
            expected = [record[f"eval/{name.removeprefix('train_')}"] for record in held_out]
            assert values == pytest.approx(expected, rel=1e-5, abs=1e-12)
    (row,) = page.rows("runs")
    before, after = summary["eval_before"], summary["eval"]
    assert (row["status"], row["loss type"], row["seed"]) == ("completed", "dpo_norm", "42")
    assert row["steps"] == "6 | epoch 1"
    intervals = summary["held_out"]["all"]["figures"]
    for label, name, form in (
        ("accuracy", "rewards/accuracy", ".1%"),
        ("margin", "rewards/margin", ".4g"),
        ("loss", "loss", ".4g"),
    ):
        value, first = (format(figures[name], form) for figures in (after, before))
        low, high = (intervals[name][side] for side in ("low", "high"))
        interval = f"{low:{form}} to {high:{form}}" if low < high else "all alike"  # every pair is won
        assert row[f"held-out {label}"] == f"{value} | from {first}; 95%: {interval}"
    best = max(
        (record for record in records if "eval/loss" in record),
        key=lambda record: (record["eval/rewards/accuracy"], record["eval/rewards/margin"]),
    )
    assert row["best step"] == f"{best['training_step']} | accuracy {best['eval/rewards/accuracy']:.1%}"
    assert row["pairs/s"] == f"{summary['train']['pairs'] / summary['train']['seconds']:,.1f}"
    assert row["peak memory"] == f"{summary['peak_memory_bytes'] / 1e9:.2f} GB"
    assert row["time in steps"] == f"{summary['train']['seconds']:.1f} s"
    assert dict(page.tables["shared"])["learning_rate"] == "0.002"
    for figure in page.figures:  # plotly's own library accepts them
        plotly.graph_objects.Figure(data=figure["data"], layout=figure["layout"])


def test_the_page_needs_nothing_else_and_can_load_nothing(tmp_path: Path) -> None:
    page = make_page(tmp_path / "page.html", make_run(tmp_path / "run"))
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes), (tag, attributes)
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (given["content"] for _, given in page.elements if given.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    running = [text for attributes, text in page.scripts if attributes.get("type") is None]
    assert len(running) == 2
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running]
    assert f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';" in policy
    assert page.source.count("plotly.js v") == 1


# -------------------------------------------------------------------------------------------------- what may be written


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    one = make_run(
        tmp_path / "one", name=NASTY, mixer_list=[NASTY, "1.0"], summary={"status": "failed", "error": NASTY}
    )
    other = make_run(tmp_path / f"{NASTY.replace('/', '')}", name="other")
    sample = {"training_step": 0, "prompt": NASTY, "answer": NASTY, "chosen": NASTY, "rejected": "", "origin": NASTY}
    write_lines(one / "samples.jsonl", [sample])
    write_lines(one / "metrics.jsonl", [{"training_step": 1, "train_loss": 1.0, NASTY: 2.0}])
    page = make_page(tmp_path / "page.html", one, other)
    assert page.source.count("<script") == 3 + sum(text.count("<script") for _, text in page.scripts)
    assert "<img" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(NASTY) >= 7
    names = {trace["name"] for figure in page.figures for trace in figure["data"]}
    assert not any("<" in name for name in names)  # plotly reads HTML there
    assert "<" not in "".join(figure["layout"]["yaxis"]["title"]["text"] for figure in page.figures)
    (figures,) = (text for attributes, text in page.scripts if attributes.get("id") == "figures")
    assert "<" not in figures


def test_samples_stand_before_and_after(tmp_path: Path) -> None:
    def sample(step: int, answer: str, prompt: str = "2 + 2 =") -> dict[str, Any]:
        return {
            **{"training_step": step, "prompt": prompt, "answer": answer},
            **{"chosen": " four", "rejected": " five", "origin": "held_out.jsonl:3"},
        }

    one, other = (make_run(tmp_path / name, name=name) for name in ("one", "other"))
    write_lines(
        one / "samples.jsonl", [sample(0, "five"), sample(20, "fish"), sample(40, "four"), sample(40, "x", "y")]
    )
    write_lines(other / "samples.jsonl", [sample(0, "long " * 2000)])
    with open(other / "samples.jsonl", "a") as file:
        file.write('{"training_step": 40, "prom')
    page = make_page(tmp_path / "page.html", one, other)
    first, second = (table for name, table in page.tables.items() if name.startswith("table"))
    assert first[:3] == [["prompt | held_out.jsonl:3", "2 + 2 ="], ["chosen", "four"], ["rejected", "five"]]
    before, after = "after step 0 is the rejected one", "after step 40 is the chosen one | 1 between are not shown"
    assert first[3:5] == [["one", before, after], ["five", "four"]]
    assert first[5] == ["other", "after step 0"]
    assert first[6] == [("long " * 2000)[:6000] + " ... (4,000 more characters)"]
    assert second[3:] == [["one", "after step 40"], ["x"]]
    assert "fish" not in page.text


# ------------------------------------------------------------------------------------------------------- states of runs


def test_runs_that_are_not_complete(tmp_path: Path) -> None:
    running = make_run(tmp_path / "running")
    failed = make_run(tmp_path / "failed", every=0, summary={"status": "failed", "error": "step 3: not finite"})
    interrupted = make_run(tmp_path / "interrupted", steps=1, every=1, summary={"status": "interrupted"})
    begun = make_run(tmp_path / "begun", steps=0, every=0)
    (begun / "metrics.jsonl").unlink()
    lost = make_run(tmp_path / "lost")
    (lost / "run_summary.json").write_text('{"status": "runn')
    (lost / "config.yaml").write_text("a: [")
    with open(lost / "metrics.jsonl", "ab") as file:
        file.write(b'{"training_step": 41, "train_l\xff\n7\nnull\n{"train_loss": 1.0}\n{"training_step": 42, "tr')
    page = make_page(tmp_path / "page.html", running, failed, interrupted, begun, lost)
    rows = page.rows("runs")
    assert [row["status"].split(" | ")[0] for row in rows] == [
        *("running", "failed", "interrupted", "running", "unknown"),
    ]
    assert re.fullmatch(r"running \| last wrote \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", rows[0]["status"])
    assert rows[1]["status"] == "failed | step 3: not finite"
    assert [row["steps"].split(" | ")[0] for row in rows] == ["40", "40", "1", "0", "40"]
    assert rows[0]["held-out accuracy"] == "90.0% | from 50.0%"
    assert rows[0]["best step"] == "40 | accuracy 90.0%"
    assert rows[0]["peak memory"] == "1.40 GB | so far"
    assert [rows[1][name] for name in ("held-out accuracy", "held-out loss", "best step")] == ["-", "-", "-"]
    assert "config.yaml is missing or damaged in: lost." in page.text
    assert page.points("Reward margin", 2, "line")[0] == [1]
    (alone,) = (trace for trace in page.figure("Loss")["data"] if trace["meta"] == {"run": 2, "kind": "line"})
    assert "markers" in alone["mode"]  # or one point would not be seen


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    begun = make_run(tmp_path / "begun", steps=0, every=0)
    page = make_page(tmp_path / "page.html", begun)
    assert page.figures == []
    assert "No metrics have been written yet." in page.text


def test_what_is_no_number_is_left_out_and_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4, every=2)
    text = (run / "metrics.jsonl").read_text().splitlines()
    at = next(at for at, line in enumerate(text) if '"training_step": 2, "train_loss"' in line)
    text[at] = '{"training_step": 2, "train_loss": NaN, "grad_norm": Infinity}'
    text[-1] = '{"training_step": 4, "eval/loss": NaN, "eval/rewards/accuracy": NaN}'
    (run / "metrics.jsonl").write_text("\n".join(text))
    page = make_page(tmp_path / "page.html", run)
    assert page.points("Loss", 0, "line")[0] == [1, 3, 4]
    assert page.points("Gradient norm", 0, "line")[0] == [1, 3, 4]
    assert page.points("Loss", 0, "held_out")[0] == [0, 2]
    assert "4 values are no numbers and are left out." in page.text
    assert page.rows("runs")[0]["held-out accuracy"] == "nan% | from 50.0%"
    assert page.rows("runs")[0]["best step"] == "2 | accuracy 50.0%"


# --------------------------------------------------------------------------------------------------------- several runs


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, name="same") for name in ("a/run", "b/run", "c/other")]
    page = make_page(tmp_path / "page.html", *folders, tmp_path / "a" / ".." / "a" / "run")
    labels = [row["run"].split(" | ")[0] for row in page.rows("runs")]
    assert labels == ["same (a/run)", "same (b/run)", "same (other)"]
    names = [trace["name"] for trace in page.figure("Loss")["data"] if trace["meta"]["kind"] == "held_out"]
    assert names == labels


def test_only_settings_that_differ_are_shown_as_such(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", name="one", learning_rate=2.5e-7, dtype=None, mixer_list=["a", "1.0"])
    other = make_run(tmp_path / "other", name="other", learning_rate=1e-06, gamma=0.5, mixer_list=["a", "1.0"])
    page = make_page(tmp_path / "page.html", one, other)
    assert page.rows("differing") == [
        {"run": "one", "learning_rate": "2.5e-07", "gamma": "not set"},
        {"run": "other", "learning_rate": "1e-06", "gamma": "0.5"},
    ]
    shared = dict(page.tables["shared"])
    assert shared == {"loss_type": "dpo", "beta": "0.1", "seed": "1", "mixer_list": "a, 1.0", "dtype": "not set"}


def make_sweep(folder: Path, settings: list[dict[str, Any]]) -> Path:
    for at, setting in enumerate(settings):
        name = ",".join(f"{field}={value}" for field, value in sorted(setting.items()))
        make_run(folder / "runs" / name, accuracy=0.6 + at / 100, **setting)
    return folder


def test_a_sweep_stands_for_its_runs_and_has_a_heat_map(tmp_path: Path) -> None:
    grid = [{"beta": beta, "learning_rate": rate} for beta in (0.5, 0.1) for rate in (2e-6, 1e-6, 1e-7)]
    sweep = make_sweep(tmp_path / "sweep", grid[:-1])
    names = [f"beta={setting['beta']},learning_rate={setting['learning_rate']}" for setting in grid]
    lines = [f"{sweep}/runs/{name}".join(("x,", "")) for name in names]
    (sweep / "sweep.csv").write_text("beta,folder\n" + "".join(f'1,"{line[2:]}"\n' for line in lines))
    page = make_page(tmp_path / "page.html", sweep)
    assert "Sweep sweep: 5 runs" in page.text
    assert [row["run"] for row in page.rows("runs")] == [name.replace(",", ", ") for name in names[:-1]]
    assert f"1 more of its settings has not started ({names[-1]})." in page.text
    accuracy, margin = (page.figure(f"Held-out reward {what}")["data"][0] for what in ("accuracy", "margin"))
    assert (accuracy["type"], accuracy["x"], accuracy["y"]) == ("heatmap", ["1e-07", "1e-06", "2e-06"], ["0.1", "0.5"])
    assert accuracy["z"] == [[None, 0.64, 0.63], [0.62, 0.61, 0.6]]
    assert margin["z"] == [[None, 4.0, 4.0], [4.0, 4.0, 4.0]]


def test_a_sweep_of_one_field_has_a_line_and_of_three_parallel_coordinates(tmp_path: Path) -> None:
    line = make_sweep(tmp_path / "one" / "sweep", [{"beta": beta} for beta in (1.0, 0.2, 0.05)])
    words = make_sweep(tmp_path / "words", [{"loss_type": loss} for loss in ("simpo", "ipo")])
    three = [{"beta": 1.0, "seed": 3, "loss_type": "ipo"}, {"beta": 2.0, "seed": 4, "loss_type": "ipo"}]
    parallel = make_sweep(tmp_path / "three" / "sweep", [*three, {"beta": 2.0, "seed": 3, "loss_type": "dpo"}])
    page = make_page(tmp_path / "page.html", line, words, parallel)
    labels = [row["run"] for row in page.rows("runs")]
    assert labels[0].startswith("sweep (one/sweep): beta=0.05")
    assert labels[-1].startswith("sweep (three/sweep): beta=2.0, loss_type=ipo")
    of_line, of_words, of_three = (figure for figure in page.figures if figure["title"] == "Held-out reward accuracy")
    (trace,) = of_line["data"]
    assert (trace["mode"], trace["x"], trace["y"]) == ("lines+markers", ["0.05", "0.2", "1"], [0.62, 0.61, 0.6])
    (trace,) = of_words["data"]
    assert (trace["mode"], trace["x"], trace["y"]) == ("markers", ["ipo", "simpo"], [0.61, 0.6])  # no order, no line
    worst, middle, best = of_three["data"]
    assert worst["x"] == ["beta", "loss_type", "seed", "held-out accuracy"]
    assert [worst["y"], middle["y"], best["y"]] == [[0, 1, 0, 0], [1, 1, 1, pytest.approx(0.5)], [1, 0, 0, 1]]
    assert [trace["customdata"][0] for trace in of_three["data"]] == [0.6, 0.61, 0.62]
    assert {(mark["x"], mark["y"], mark["text"]) for mark in of_three["layout"]["annotations"]} == {
        *(("beta", 0, "1"), ("beta", 1, "2"), ("loss_type", 0, "dpo"), ("loss_type", 1, "ipo")),
        *(("seed", 0, "3"), ("seed", 1, "4"), ("held-out accuracy", 0, "60.0%"), ("held-out accuracy", 1, "62.0%")),
    }
    for figure in page.figures:
        plotly.graph_objects.Figure(data=figure["data"], layout=figure["layout"])


# ------------------------------------------------------------------------------------------------------------ long runs


def test_long_curves_keep_their_ends_and_extremes(tmp_path: Path) -> None:
    """With a spike of one step up and one down, and their means as naive code has them."""
    steps, random_ = 20_000, random.Random(3)
    values = [random_.gauss(0, 1) for _ in range(steps)]
    values[7_777], values[13_131] = 50.0, -60.0
    run = make_run(tmp_path / "run", steps=0)
    write_lines(
        run / "metrics.jsonl", [{"training_step": at + 1, "train_loss": value} for at, value in enumerate(values)]
    )
    page = make_page(tmp_path / "page.html", run)
    raw_steps, raw = page.points("Loss", 0, "raw")
    assert 1000 < len(raw_steps) <= 1500
    assert raw_steps == sorted(set(raw_steps))
    assert (raw_steps[0], raw_steps[-1]) == (1, steps)
    assert raw == pytest.approx([values[step - 1] for step in raw_steps], rel=1e-5)
    assert {7_778, 13_132} <= set(raw_steps)
    kept = dict(zip(raw_steps, raw, strict=True))
    for step in range(1, steps + 1, 7):  # whose stretch reaches no farther than 28 steps
        near = [kept[other] for other in range(step - 28, step + 29) if other in kept]
        assert min(near) - 1e-4 <= values[step - 1] <= max(near) + 1e-4
    mean_steps, means = page.points("Loss", 0, "mean")
    assert (mean_steps[0], mean_steps[-1]) == (1, steps)
    expected = [sum(values[max(0, step - 1000) : step]) / min(step, 1000) for step in mean_steps]
    assert means == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert "drawn with at most that many" in page.text
    assert "a run (20,000 values)" in page.text


def test_short_curves_are_drawn_whole(tmp_path: Path) -> None:
    page = make_page(tmp_path / "page.html", make_run(tmp_path / "run", steps=100))
    assert page.points("Gradient norm", 0, "raw")[0] == list(range(1, 101))
    assert page.points("Learning rate", 0, "line")[0] == list(range(1, 101))  # has no noise
    assert "drawn with at most" not in page.text


def test_fifty_runs_are_a_page_below_10_mb(tmp_path: Path) -> None:
    one = make_run(tmp_path / "0", steps=400)
    for number in range(1, 50):
        shutil.copytree(one, tmp_path / str(number))
    page = make_page(tmp_path / "page.html", *(tmp_path / str(number) for number in range(50)))
    assert len(page.source) < 10e6
    assert len(page.rows("runs")) == 50
    traces = page.figure("Loss")["data"]
    styles = {(trace["meta"]["run"] % 8, trace["line"]["dash"]) for trace in traces if trace["meta"]["kind"] == "mean"}
    assert len(styles) == 50  # colour and dash together


# ------------------------------------------------------------------------------------------------------------- mistakes


def error(capsys: Capture, *words: Path | str) -> str:
    capsys.readouterr()
    assert report.main([str(word) for word in words]) == 1
    return cli.only_error(capsys.readouterr().err)


def test_folders_without_a_run_are_named(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "empty" / "runs" / "nothing").mkdir(parents=True)
    (tmp_path / "empty" / "config.yaml").write_text("colour: blue\n")
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    out = tmp_path / "page.html"
    fix = "name the output_dir of a run, or of a sweep"
    assert error(capsys, run, missing, empty, "--out", out) == f"error: {missing}, {empty}: hold no run; {fix}"
    assert error(capsys, empty, "--out", out) == f"error: {empty}: holds no run; {fix}"
    assert not out.exists()


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    run = make_run(tmp_path / "run")
    assert error(capsys, run, "--out", tmp_path) == f"error: --out {tmp_path}: is a folder; name a file"
    (tmp_path / "file").touch()
    line = error(capsys, run, "--out", tmp_path / "file" / "page.html")
    assert line == f"error: --out {tmp_path}/file/page.html: its folder cannot be made (File exists)"


def test_plotly_is_missing(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    line = error(capsys, make_run(tmp_path / "run"), "--out", tmp_path / "page.html")
    assert line == "error: report: needs plotly, which is not installed; `pip install plotly`"


def test_the_command_from_outside(tmp_path: Path) -> None:
    """It writes report.html where it is called, and replaces it; transformers is not imported for it."""
    run = make_run(tmp_path / "run")
    (tmp_path / "report.html").write_text("an older one")
    command = "import sys; from open_po.__main__ import main; code = main(['report', 'run']); "
    command += "print(code, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=cli.environment(), capture_output=True, text=True, check=True
    )
    said, modules = done.stdout.splitlines()
    assert (done.stderr, modules) == ("", "0 False")
    assert re.fullmatch(r"Report on 1 run: report.html \(\d\.\d MB\)", said)
    assert Page((tmp_path / "report.html").read_text()).rows("runs")[0]["run"] == "a run | run"
    assert json.loads((run / "run_summary.json").read_text()) == {"status": "running"}  # nothing of the run changes
