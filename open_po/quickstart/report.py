"""What the preference stage did: both stages' models compared on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from open_po.config import ModelConfig
from open_po.data.tokenizer import load_tokenizer, pad_token_id
from open_po.errors import UserError
from open_po.evaluation.generation import Greedy
from open_po.evaluation.metrics import Answered
from open_po.evaluation.metrics.texts import exact_match
from open_po.evaluation.questions import read
from open_po.model.generation import end_tokens
from open_po.model.load import load_scorer
from open_po.model.numerics import Numerics
from open_po.model_files import ModelSource
from open_po.output.files import write_atomically
from open_po.output.metrics import REWARD_ACCURACY
from open_po.output.run_folder import RunFolder
from open_po.output.summary import RunResult, Status
from open_po.quickstart.build import REPORT_FILE
from open_po.quickstart.task import Row, read_rows

MAX_ANSWER_TOKENS = 12
_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Change:
    """A share, 0 to 1, before and after the preference stage."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the preference stage did on the held-out prompts."""

    prompts: int
    exact_match: Change  # greedy answers
    reward_accuracy: Change  # share of pairs whose chosen response has the higher reward, ties counted half


def measure(folder: Path, device: torch.device) -> Report:
    """Evaluate both stages' models on `device`. Raises UserError if a stage has not been run to its end."""
    _, result = (_result(folder / stage) for stage in ("sft", "dpo"))
    before, after = result.eval_before, result.eval
    if before is None or after is None:
        raise UserError(f"{folder / 'dpo'}: the run had no held-out data; leave eval_mixer_list as it is")
    rows = read_rows(folder / "data" / "held_out.jsonl")
    return Report(
        prompts=len(rows),
        exact_match=Change(
            before=_exact_match(folder / "sft", rows, device), after=_exact_match(folder / "dpo", rows, device)
        ),
        reward_accuracy=Change(before=before[REWARD_ACCURACY], after=after[REWARD_ACCURACY]),
    )


def _result(run: Path) -> RunResult:
    summary = RunFolder(run).read_summary()
    if summary is None or summary.status != Status.COMPLETED or summary.result is None:
        raise UserError(f"{run}: holds no completed run; `bash scripts/train/debug/dpo.sh` runs all stages")
    return summary.result


def _exact_match(run: Path, rows: Sequence[Row], device: torch.device) -> float:
    """The share of greedy answers that are right."""
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(run)))
    numerics = Numerics(compute_dtype=torch.float32, weights_dtype=torch.float32, use_liger=False)
    scorer = load_scorer(ModelSource(name=str(run)), numerics, device)
    ends = end_tokens(scorer.base.generation_config, tokenizer.eos_token_id)
    greedy = Greedy(ends=ends, pad=pad_token_id(tokenizer), max_new_tokens=MAX_ANSWER_TOKENS, budget=_BATCH_TOKENS)
    prompts = tokenizer([row.prompt for row in rows])["input_ids"]
    answers = [""] * len(rows)
    for batch in greedy.batches(scorer, [len(prompt) for prompt in prompts]):
        found = greedy.answer(scorer, [prompts[index] for index in batch.indices], batch.max_new_tokens)
        for index, text in zip(batch.indices, read(tokenizer, found), strict=True):
            answers[index] = text
    right = exact_match(Answered.of(answers, [row.chosen for row in rows]))
    return sum(right) / len(right) / 100


def report_table(report: Report) -> Table:
    """The report for the console."""
    table = Table(
        title=f"Quickstart: {report.prompts} held-out numbers into words",
        title_justify="left",
        caption="Reward accuracy starts at one half: a policy that still is its reference prefers neither answer.",
        caption_justify="left",
    )
    table.add_column("", style="bold", overflow="fold")
    table.add_column("before (SFT)", justify="right")
    table.add_column("after (preferences)", justify="right")
    table.add_column("change", justify="right")
    for label, change in (("exact match", report.exact_match), ("reward accuracy", report.reward_accuracy)):
        points = 100 * (change.after - change.before)
        table.add_row(label, f"{change.before:.1%}", f"{change.after:.1%}", f"{points:+.1f} points")
    return table


def tell(report: Report, folder: Path, console: Console) -> None:
    """Write the report to `report.json`, and print it with the paths of what to look at next."""
    write_atomically(folder / REPORT_FILE, lambda path: path.write_text(json.dumps(asdict(report), indent=2) + "\n"))
    console.print(report_table(report))
    for label, path in (("curves", folder / "dpo" / "training_curves.png"), ("model", folder / "dpo")):
        console.print(f"{label}: {path}", soft_wrap=True, markup=False)
