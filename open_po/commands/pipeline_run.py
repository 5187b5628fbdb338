"""A pipeline from its first stage to its table: what is complete is left alone, what was stopped goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from open_po.commands.pipeline_stages import EVALUATION, SFT, Pipeline, Training
from open_po.commands.pipeline_table import Accuracy, tell_results
from open_po.commands.place import Place
from open_po.commands.processes import Slots, last_line
from open_po.errors import Preempted, UserError
from open_po.output.bars import Bar
from open_po.output.console import make_console
from open_po.output.files import is_locked, lock_folder, write_atomically
from open_po.output.phase import PhaseState, duration
from open_po.watch.run_state import RunReader

EVALUATION_FILE = "evaluation.json"  # what `evaluate` leaves in its folder
_RECORD = ".pipeline.json"  # what the stages were made from
_PATIENCE_SECONDS = 600.0  # for a stage that is asked to stop, and saves
_DRAW_SECONDS, _TELL_SECONDS = 1.0, 10.0  # between two looks at a stage: on a terminal, in a file
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_GOES_ON = "the same command goes on from here"


class StoppedError(Exception):
    """A signal asked the pipeline to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; else 75, as a run that a scheduler has stopped."""
        return 130 if self.number == signal.SIGINT else Preempted.exit_code

    @property
    def line(self) -> str:
        """What to tell."""
        return f"{signal.Signals(self.number).name}; what is on disk is kept, and {_GOES_ON}"


class StageStoppedError(UserError):
    """A stage saved and ended before its time, by its own clock or a scheduler's signal."""

    exit_code = Preempted.exit_code


def dry_run(pipeline: Pipeline, place: Place) -> Iterator[str]:
    """The command of every stage, and which are complete."""
    yield f"Pipeline {pipeline.name} in {pipeline.folder}; nothing is started"
    commands = [("prepare", _preparation(pipeline.prepare), False)] if pipeline.prepare is not None else []
    commands += [(stage.name, _command(stage, place), stage.folder.is_complete()) for stage in pipeline.trainings]
    if pipeline.evaluate is not None:
        commands.append((EVALUATION, _evaluation(pipeline, place), False))
    for number, (name, command, complete) in enumerate(commands, start=1):
        shown = ["python" if word == sys.executable else word for word in command]
        yield f"[{number}/{len(commands)}] {name}{' (complete)' if complete else ''}: {shlex.join(shown)}"


def _preparation(script: Path) -> list[str]:
    return ["bash", str(script)]


def _command(stage: Training, place: Place) -> list[str]:
    """By the launcher, if there is more than one rank to start."""
    program = ["open_po", "launch"] if place.ranks > 1 else ["dpo_tune_cache"]
    return [sys.executable, "-m", *program, *stage.words]


def _evaluation(pipeline: Pipeline, place: Place) -> list[str]:
    """On all processes of this node, which share the prompts."""
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(place.processes), "-m"]
    program = [*(ranks if place.processes > 1 else []), "open_po", "evaluate"]
    return [sys.executable, "-m", *program, *pipeline.evaluation_words()]


@dataclass(kw_only=True)
class PipelineRun:
    """The stages as processes, one after another."""

    pipeline: Pipeline
    place: Place  # this node; those after the first only train
    restart: bool  # run anew what was run with other settings

    def __post_init__(self) -> None:
        self._console: Console = make_console()
        self._slots = Slots([os.environ | {"PYTHON": sys.executable}])
        self._number = 0
        prepares, evaluates = self.pipeline.prepare is not None, self.pipeline.evaluate is not None
        self._stages = len(self.pipeline.trainings) + prepares + evaluates

    def run(self) -> None:
        """Run what is not complete yet. Raises UserError naming the stage that failed, StoppedError after a signal."""
        start = time.monotonic()
        handlers = {number: signal.signal(number, _stop) for number in _SIGNALS}
        try:
            if self.place.node == 0:
                with self._folder():
                    self._run_all()
                    found = self.pipeline.evaluation_folder / EVALUATION_FILE
                    tell_results(self.pipeline, found, self._console)
                self._say(f"All of it took {duration(time.monotonic() - start)}.")
            else:
                (self.pipeline.folder / "logs").mkdir(parents=True, exist_ok=True)
                for stage in self.pipeline.trainings:
                    self._number += 1
                    self._train(stage)
        finally:
            self._slots.stop(_PATIENCE_SECONDS)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def _folder(self) -> Iterator[None]:
        """The pipeline's folder, kept from others. Raises UserError."""
        folder = self.pipeline.folder
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {folder}: no folder can be made there ({error.strerror})") from error
        held = lock_folder(folder, f"output_dir {folder}: another pipeline")
        try:
            self._refuse_changed()
            yield
        finally:
            if held is not None:
                os.close(held)

    def _refuse_changed(self) -> None:
        """Before anything runs: a stage that stands there with other settings would stop the pipeline in the middle."""
        for stage in () if self.restart else self.pipeline.trainings:
            if changed := stage.changed():
                raise self._other(stage, changed)

    def _other(self, stage: Training, changed: str) -> UserError:
        return UserError(
            f"{stage.name}: {stage.folder.path} holds a run of another configuration ({changed}); --restart runs it "
            "and what follows from it anew, --output_dir keeps it"
        )

    def _run_all(self) -> None:
        pipeline = self.pipeline
        names = [stage.name for stage in pipeline.trainings]
        steps = ["prepare"] * (pipeline.prepare is not None) + names + [EVALUATION] * (pipeline.evaluate is not None)
        self._say(f"Pipeline {pipeline.name} in {pipeline.folder}: {', '.join(steps)}")
        lax = [stage.name for stage in pipeline.trainings if stage.config.output.checkpointing_steps is None]
        if lax:
            self._say(f"No checkpointing_steps: if {' or '.join(lax)} is stopped, it begins with its first step again")
        if pipeline.evaluate is None:
            self._say("No evaluation: the task has no evaluate.yaml; --evaluate.task and --evaluate.data ask for one")
        if pipeline.prepare is not None:
            self._number += 1
            seconds = self._run("prepare", _preparation(pipeline.prepare), None)
            self._done("prepare", f"{pipeline.prepare}, {seconds:.0f} s")
        for stage in pipeline.trainings:
            self._number += 1
            self._train_once(stage)
        if pipeline.evaluate is not None:
            self._number += 1
            self._evaluate_once()

    # ----------------------------------------------------------------------------------------------------------- stages

    def _train_once(self, stage: Training) -> None:
        """Train unless that is done, from what the earlier stages have come to."""
        self._wait_for_owner(stage)
        inputs, before = stage.inputs(), self._recorded(stage.name)
        exists = stage.folder.earlier_config() is not None
        changed = (stage.changed() or _differing(before, inputs)) if exists else ""
        if changed and not self.restart:
            raise self._other(stage, changed)
        if changed:
            self._say(f"{stage.name}: begins anew ({changed})")
            shutil.rmtree(stage.folder.path)
        if not exists or inputs != before:
            self._record(stage.name, inputs)
        if stage.folder.is_complete() and self.place.nodes == 1:
            self._done(stage.name, f"complete already{_figures(stage)}")
        else:
            seconds = self._train(stage)
            self._done(stage.name, f"{_totals(stage)}{_figures(stage)}, {seconds:.0f} s")

    def _train(self, stage: Training) -> float:
        return self._run(stage.name, _command(stage, self.place), stage)

    def _wait_for_owner(self, stage: Training) -> None:
        """A run whose pipeline was killed is saving: it ends by itself."""
        path, deadline = stage.folder.path, time.monotonic() + _PATIENCE_SECONDS
        if is_locked(path):
            self._say(f"{stage.name}: waits for the process of an earlier start to save and end")
        while is_locked(path):
            if time.monotonic() > deadline:
                raise UserError(f"{stage.name}: another run is writing to {path}; end it, or choose another output_dir")
            self._slots.wait()

    def _evaluate_once(self) -> None:
        """Evaluate all models, unless just these have been with the same flags."""
        words, folder = self.pipeline.evaluation_words(), self.pipeline.evaluation_folder
        made_from = {"words": words, "inputs": self.pipeline.evaluation_inputs()}
        if self._recorded(EVALUATION) == made_from and (folder / EVALUATION_FILE).is_file():
            self._done(EVALUATION, "complete already")
            return
        seconds = self._run(EVALUATION, _evaluation(self.pipeline, self.place), None)
        self._record(EVALUATION, made_from)
        self._done(EVALUATION, f"{len(self.pipeline.models)} models, {seconds:.0f} s")

    # -------------------------------------------------------------------------------------------------------- processes

    def _run(self, name: str, command: Sequence[str], stage: Training | None) -> float:
        """Run a stage's process to its end; returns its seconds. Raises UserError if it fails."""
        log = self.pipeline.log(name, self.place.node)
        if not self._console.is_terminal:
            self._say(f"[{self._number}/{self._stages}] {name}: started (log: {log})")
        self._slots.start(name, command, log)
        code, seconds = self._watch(name, stage)
        if code == Preempted.exit_code:
            raise StageStoppedError(f"stage {name}: {last_line(log)}")
        if code or (stage is not None and not stage.folder.is_complete()):
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            raise UserError(f"stage {name} {how} ({last_line(log)}); its log: {log}")
        return seconds

    def _watch(self, name: str, stage: Training | None) -> tuple[int, float]:
        """Show how far a stage's process is until it ends; returns its exit code and seconds."""
        reader = None if stage is None else RunReader(stage.folder.path)
        start, next_look, told = time.monotonic(), 0.0, ""
        drawing = (
            Live(console=self._console, auto_refresh=False, transient=True)
            if self._console.is_terminal
            else nullcontext()
        )
        with drawing as live:
            while True:
                for _, code, seconds in self._slots.ended():
                    return code, seconds
                if time.monotonic() >= next_look:
                    state = None if reader is None else reader.look()
                    phase = None if state is None else state.current
                    phase = phase if phase is not None and phase.state == PhaseState.RUNNING else None
                    if live is not None:
                        seconds = time.monotonic() - start
                        head = Text(f"[{self._number}/{self._stages}] {name}: {duration(seconds)}")
                        parts: list[RenderableType] = [head, *([Bar(phase)] if phase is not None else [])]
                        live.update(Group(*parts), refresh=True)
                    elif phase is not None and next_look and phase.line() != told:
                        told = phase.line()
                        self._say(f"  {name}: {told}")
                    next_look = time.monotonic() + (_DRAW_SECONDS if live is not None else _TELL_SECONDS)
                self._slots.wait()

    def _done(self, name: str, line: str) -> None:
        self._say(f"[{self._number}/{self._stages}] {name}: {line}")

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    # ----------------------------------------------------------------------------------------------------------- record

    def _recorded(self, stage: str) -> Any:
        """What a stage was made from; None if that is not known."""
        return self._read_record().get(stage)

    def _record(self, stage: str, made_from: object) -> None:
        content = self._read_record() | {stage: made_from}
        path = self.pipeline.folder / _RECORD
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))

    def _read_record(self) -> dict[str, Any]:
        try:
            content = json.loads((self.pipeline.folder / _RECORD).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _stop(number: int, _: FrameType | None) -> None:
    raise StoppedError(number)


def _differing(before: dict[str, str] | None, now: dict[str, str]) -> str:
    """The model or file that is another one than when the run began; empty if there is none, or that is not known.

    What was not recorded then is not known: an earlier version looked at less.
    """
    names = sorted(name for name, digest in (before or {}).items() if now.get(name) != digest)
    return f"{names[0]} has changed since" if names else ""


def _totals(stage: Training) -> str:
    summary = stage.folder.read_summary()
    if summary is None or summary.result is None:
        return "complete"
    train = summary.result.train
    return f"{train.steps:,} steps, {train.pairs:,} {'rows' if stage.name == SFT else 'pairs'}"


def _figures(stage: Training) -> str:
    """What a preference stage has come to on held-out pairs."""
    accuracy = None if stage.name == SFT else Accuracy.of(stage.folder)
    return "" if accuracy is None else f", held-out reward accuracy {accuracy.text()}"
