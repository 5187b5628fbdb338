"""A run drawn for a terminal, or told in lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from open_po.output.bars import Bar
from open_po.output.metrics import (
    CHOSEN_LOGPS,
    LEARNING_RATE,
    LOSS,
    PAIRS_PER_SECOND,
    PEAK_MEMORY_GB,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    STEP,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    Metrics,
    short_figures,
)
from open_po.output.phase import PhaseState, duration
from open_po.output.summary import Status
from open_po.watch.run_state import KILLED, SILENT, STARTING, RunState
from open_po.watch.small_curves import Points, small_curve

STYLES = {
    STARTING: "cyan",
    Status.RUNNING: "green",
    Status.COMPLETED: "bold green",
    Status.FAILED: "bold red",
    Status.INTERRUPTED: "yellow",
    KILLED: "bold red",
    SILENT: "yellow",
}
_CURVES = ((LOSS, "loss"), (REWARD_ACCURACY, "reward accuracy"), (REWARD_MARGIN, "reward margin"))
_CURVE_WIDTH, _CURVE_HEIGHT = 24, 6  # the least columns, and the lines, of one
_FIGURES = (
    (LOSS, "loss", "{:.4f}"),
    (REWARD_ACCURACY, "accuracy", "{:.3f}"),
    (REWARD_MARGIN, "margin", "{:.4f}"),
    (CHOSEN_LOGPS, "chosen", "{:.2f}"),
    (LEARNING_RATE, "lr", "{:.2e}"),
    (PAIRS_PER_SECOND, "pairs/s", "{:,.1f}"),
    (TOKENS_PER_SECOND, "tokens/s", "{:,.0f}"),
    (PEAK_MEMORY_GB, "peak GB", "{:.2f}"),
)


def ago(then: float, now: float) -> str:
    """How long ago something was."""
    return f"{duration(max(0.0, now - then))} ago"


# ------------------------------------------------------------------------------------------------------ for a terminal


class Picture:
    """A run: status, phases, newest figures, curves, checkpoints, as wide as the console."""

    def __init__(self, state: RunState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _heading(self._state)
        for part in (
            _phases(self._state),
            _figures(self._state, console, options.max_width),
            _curves(self._state, options.max_width),
            _checkpoints(self._state),
        ):
            if part is not None:
                yield Text()
                yield part


def _heading(state: RunState) -> Text:
    now = time.time()
    text = Text(str(state.config.get("exp_name") or state.folder.name), style="bold")
    text.append(f"  {state.folder}\n", style="not bold dim")
    text.append(f"● {state.status}", style=f"not bold {STYLES[state.status]}")
    facts = [f"{state.board.host}, process {state.board.pid}"] if state.board is not None else []
    if state.board is not None and state.alive:
        facts.append(f"for {duration(now - state.board.started)}")
    if state.updated is not None:
        facts.append(f"last update {ago(state.updated, now)}")
    text.append("".join(f"  {fact}" for fact in facts), style="not bold")
    if state.status == KILLED:
        text.append("\nno process holds its folder: it ended without a word", style="not bold red")
    if state.status == SILENT and state.board is not None:
        text.append(f"\nnothing heard of it for {duration(now - state.board.written)}", style="not bold yellow")
    if state.status == Status.COMPLETED and state.alive:
        text.append("\nits model is saved; it is still at work", style="not bold")
    if state.error is not None:
        text.append(f"\n{state.error}", style="not bold red")
    loss = state.config.get("loss_type")
    names = [str(state.config.get("model_name_or_path", "")), " + ".join(loss) if isinstance(loss, list) else loss]
    text.append("\n" + "  ".join(str(name) for name in names if name), style="not bold dim")
    return text


def _phases(state: RunState) -> RenderableType | None:
    if not state.phases:
        return None
    parts: list[RenderableType] = []
    for phase in state.phases:
        if phase.state == PhaseState.RUNNING:
            parts.append(Bar(phase))
        else:
            good = phase.state == PhaseState.DONE
            sign, style = ("✓ ", "green") if good else ("✗ ", "red")
            parts.append(Text.assemble((sign, style), phase.line()))
    return Group(*parts)


def _figures(state: RunState, console: Console, width: int) -> Table | None:
    """The newest figures of training, and of held-out pairs now and at the start, as many as there is room for."""
    rows: list[tuple[str, Metrics]] = []
    if training := state.training:
        rows.append(("training", _with_loss(training[-1])))
    if held_out := state.held_out:
        rows.append(("held out", held_out[-1]))
        if len(held_out) > 1:
            rows.append(("held out", held_out[0]))
    if not rows:
        return None
    shown = [figure for figure in _FIGURES if any(figure[0] in row for _, row in rows)]
    while len(shown) > 1 and console.measure(_table(rows, shown)).maximum > width:
        del shown[-1]
    return _table(rows, shown)


def _table(rows: Sequence[tuple[str, Metrics]], shown: Sequence[tuple[str, str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("step", justify="right")
    for _, name, _ in shown:
        table.add_column(name, justify="right")
    for label, row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, _, form in shown]
        table.add_row(label, f"{row[STEP]:,.0f}", *cells)
    return table


def _curves(state: RunState, width: int) -> RenderableType | None:
    training = [_with_loss(record) for record in state.training]
    series = [(title, _series(training, name), _series(state.held_out, name)) for name, title in _CURVES]
    series = [found for found in series if len(found[1]) > 1]
    if not series:
        return None
    side_by_side = max(1, min(len(series), width // (_CURVE_WIDTH + 2)))
    each = width // side_by_side - 2
    drawn = [small_curve(title, line, marks, width=each, height=_CURVE_HEIGHT) for title, line, marks in series]
    key = Text("over steps: ", style="dim").append("⠒⠒ ", style="not dim cyan").append("training")
    if state.held_out:
        key.append("  ● ", style="not dim yellow").append("held out")
    return Group(Columns(drawn, width=each, padding=(0, 2, 0, 0)), key)


def _checkpoints(state: RunState) -> Text | None:
    now = time.time()
    found = ", ".join(f"{name} ({ago(at, now)})" for name, at in state.checkpoints)
    lines = [f"checkpoints: {found}"] if found else []
    lines += [f"uploaded to: {state.uploaded_to}"] if state.uploaded_to is not None else []
    return Text("\n".join(lines)) if lines else None


def _with_loss(record: Metrics) -> Metrics:
    return {**record, LOSS: record[TRAIN_LOSS]}


def _series(records: Sequence[Metrics], name: str) -> Points:
    return [(record[STEP], record[name]) for record in records if name in record]


# ------------------------------------------------------------------------------------------------------------ in lines


def lines(state: RunState) -> Iterator[tuple[str, str]]:
    """What there is to tell, each with a name for what it is about: a line that differs from its last one is news."""
    error = f" ({state.error})" if state.error is not None else ""
    yield "status", f"{state.folder}: {state.status}{error}"
    for phase in state.phases:
        yield f"phase {phase.label} of {phase.total}", phase.line()
    if state.held_out:
        newest = state.held_out[-1]
        yield "held out", f"Held out, step {newest[STEP]:.0f}: {short_figures(newest)}"
    if state.checkpoints:
        yield "checkpoint", f"Checkpoint: {state.checkpoints[0][0]}"
    if state.uploaded_to is not None:
        yield "upload", f"Uploaded to: {state.uploaded_to}"
