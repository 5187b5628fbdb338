"""The tables that a person looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from open_po.output.estimate import Groups
from open_po.output.metrics import (
    CHOSEN_LENGTH,
    CHOSEN_LOGPS,
    GENERATED_LENGTH,
    LOSS,
    REJECTED_LENGTH,
    REWARD_ACCURACY,
    REWARD_MARGIN,
)
from open_po.output.samples import Sample
from open_po.output.summary import RunResult, Status

_FORMS = {REWARD_ACCURACY: ".1%", REWARD_MARGIN: ".3f", LOSS: ".4f"}
_PROMPT, _ANSWER = 300, 600  # characters of a sample that the console shows; samples.jsonl has all


def make_table(title: str, *columns: str, header: bool = False) -> Table:
    """A table whose columns fold what is too long."""
    table = Table(title=title, title_justify="left", show_header=header)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def packing_line(shares: dict[str, float]) -> str:
    """`PackingStats.summary` in words."""
    packs = f"{shares['packs']:,} pack{'' if shares['packs'] == 1 else 's'}"
    if shares["packs_over_budget"]:
        packs += f", {shares['packs_over_budget']:,} of them over the budget because a pair is not cut"
    return (
        f"{packs}, {shares['fill']:.0%} full; {shares['prompt_tokens_saved']:.0%} of prompt tokens "
        f"saved, {shares['padding_avoided']:.0%} padding avoided"
    )


def result_table(result: RunResult, folder: Path) -> Table:
    """What a complete run found, as a table for the console."""
    table = Table(title=f"Run {Status.COMPLETED}", title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", overflow="fold")
    reference, train = result.reference, result.train
    if reference is not None:
        counts = f"{reference.pairs_computed:,} pairs computed, {reference.pairs_reused:,} from the cache"
        table.add_row("reference", f"{counts}, {reference.seconds:.1f} s")
    rate = train.pairs / train.seconds if train.seconds else 0.0
    table.add_row("training", f"{train.steps:,} steps, {train.pairs:,} pairs, {train.seconds:.1f} s of steps")
    table.add_row("throughput", f"{rate:,.1f} pairs/s, {train.tokens:,} tokens, {train.response_tokens:,} scored")
    table.add_row("packing", packing_line(train.packing))
    for name, label in (
        (LOSS, "held-out loss"),
        (REWARD_ACCURACY, "held-out reward accuracy"),
        (REWARD_MARGIN, "held-out reward margin"),
        (CHOSEN_LOGPS, "held-out chosen log-prob"),
    ):
        if result.eval is not None and name in result.eval:
            start = f"{result.eval_before[name]:.4f} -> " if result.eval_before is not None else ""
            estimate = None if result.held_out is None else result.held_out.all.figures.get(name)
            interval = "" if estimate is None else f" ({estimate.interval('.4f')})"
            table.add_row(label, f"{start}{result.eval[name]:.4f}{interval}")
    if lengths := _lengths(result):
        table.add_row("mean tokens", lengths)
    predicted = result.predicted_memory_bytes
    planned = "" if predicted is None else f", {predicted / 1e9:.2f} GB predicted"
    table.add_row("peak memory", f"{result.peak_memory_bytes / 1e9:.2f} GB{planned}")
    table.add_row("output", str(folder))
    return table


def _lengths(result: RunResult) -> str:
    """Mean lengths of held-out responses, and of what the model answers."""
    before, after = result.eval_before or {}, result.eval or {}
    words = []
    for name in (CHOSEN_LENGTH, REJECTED_LENGTH, GENERATED_LENGTH):
        if name in after:
            start = f"{before[name]:.1f} -> " if name == GENERATED_LENGTH and name in before else ""
            words.append(f"{name.removeprefix('lengths/')} {start}{after[name]:.1f}")
    return ", ".join(words)


def groups_table(groups: Groups, title: str) -> Table:
    """Preference metrics by source and by length, with the intervals that their true values lie in, 95 of 100 times."""
    table = Table(title=f"{title}, with 95% intervals", title_justify="left")
    table.add_column("pairs", style="bold", overflow="fold")
    shown = {name: form for name, form in _FORMS.items() if name in groups.all.figures}
    for name in ("count", *shown):
        table.add_column(name.replace("/", " "), justify="right")
    for label, group in {"all": groups.all, **groups.parts()}.items():
        table.add_row(label, f"{group.pairs:,}", *(group.figures[name].text(form) for name, form in shown.items()))
    return table


def samples_table(samples: Sequence[Sample]) -> Table:
    """Answers to held-out prompts beside what the data prefer: of a prompt its end, of an answer its beginning."""
    table = Table(title=f"Samples, step {samples[0].training_step}", title_justify="left", show_lines=True)
    for name in ("prompt", "answer", "chosen"):
        table.add_column(name, overflow="fold", ratio=1)
    for sample in samples:
        prompt = sample.prompt if len(sample.prompt) <= _PROMPT else f"... {sample.prompt[-_PROMPT:]}"
        answers = [text if len(text) <= _ANSWER else f"{text[:_ANSWER]} ..." for text in (sample.answer, sample.chosen)]
        table.add_row(*(Text(_printable(text.strip())) for text in (prompt, *answers)))
    return table


def _printable(text: str) -> str:
    """Text that moves no cursor: what a model says may hold control characters."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)
