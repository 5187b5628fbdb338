"""The page in a browser: it draws what it has, runs nothing that others have written, and reports no error."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report.pages import Page, make_page, make_run, write_lines
from tests.report.test_report import NASTY, make_sweep

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


def drawn(page: Path) -> tuple[str, list[str]]:
    """The page's elements after its scripts have run, and what the browser's console says."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--virtual-time-budget=20000", f"--user-data-dir={page.parent / 'chromium'}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_figures_are_drawn(tmp_path: Path) -> None:
    grid = [{"beta": beta, "learning_rate": rate} for beta in (0.5, 0.1) for rate in (2e-6, 1e-6)]
    sweep = make_sweep(tmp_path / "sweep", grid)
    three = [{"beta": 1.0, "seed": 3, "gamma": 0.5}, {"beta": 2.0, "seed": 4, "gamma": 0.0}]
    page = make_page(tmp_path / "page.html", sweep, make_sweep(tmp_path / "three", three), make_run(tmp_path / "run"))
    dom, console = drawn(tmp_path / "page.html")
    assert console == []
    assert f'data-drawn="{len(page.figures)}"' in dom
    lines = sum(
        trace["type"] == "scatter" and "lines" in trace["mode"] for figure in page.figures for trace in figure["data"]
    )
    assert dom.count('class="js-line"') == lines > 0
    assert dom.count('class="hm"') == 2
    for figure in page.figures:
        for axis in ("xaxis", "yaxis"):
            text = figure["layout"][axis].get("title", {}).get("text")
            assert text is None or f">{text}</text>" in dom, text


def test_runs_are_chosen_and_rows_sorted(tmp_path: Path) -> None:
    """By clicks that a script makes; the policy, which would not let it run, is taken out."""
    runs = [make_run(tmp_path / str(at), name=f"run {at}", accuracy=share) for at, share in enumerate((0.7, 0.9, 0.8))]
    page = tmp_path / "page.html"
    make_page(page, *runs)
    clicks = """
        const after = setInterval(() => {
          if (!document.body.dataset.drawn) return;
          clearInterval(after);
          const heads = [...document.querySelectorAll("#runs thead th")];
          heads.find((head) => head.textContent === "held-out accuracy").click();
          document.querySelector("[data-only='1']").click();
          document.querySelector("[data-kind='held_out']").click();
        }, 20);
    """
    source = page.read_text().replace("Content-Security-Policy", "no-policy")
    page.write_text(source.replace("</body>", f"<script>{clicks}</script></body>"))
    dom, console = drawn(page)
    assert console == []
    assert [row[0].split(" | ")[0] for row in Page(dom, figures=False).tables["runs"][1:]] == [
        "run 1",
        "run 2",
        "run 0",
    ]
    figures = Page(source).figures
    kept = [trace for figure in figures for trace in figure["data"] if trace["meta"] == {"run": 1, "kind": "line"}]
    assert dom.count('class="js-line"') == len(kept) == len(figures)


def test_what_others_wrote_does_not_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=NASTY, summary={"status": "failed", "error": NASTY})
    sample = {"training_step": 0, "prompt": NASTY, "answer": NASTY, "chosen": NASTY, "rejected": "", "origin": NASTY}
    write_lines(run / "samples.jsonl", [sample])
    records = [{"training_step": step, "train_loss": 1.0 / step, NASTY: 2.0} for step in range(1, 9)]
    write_lines(run / "metrics.jsonl", records)
    make_page(tmp_path / "page.html", run)
    dom, console = drawn(tmp_path / "page.html")
    assert console == []
    after = Page(dom, figures=False)
    assert ("img", {"src": "x"}) not in after.elements
    assert after.title == f"Run {NASTY}"


def test_a_script_that_were_written_raw_would_not_run(tmp_path: Path) -> None:
    """The second wall: the page's policy."""
    page = tmp_path / "page.html"
    make_page(page, make_run(tmp_path / "run"))
    raw = NASTY.replace("</title>", "")
    page.write_text(page.read_text().replace("<main>", f"<main>{raw}"))
    dom, console = drawn(page)
    assert Page(dom, figures=False).title == "Run a run"
    assert any("Content Security Policy" in line for line in console)
