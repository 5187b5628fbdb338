"""The run's folder: who owns it, and the files that are not the model's."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from open_po.config import RunConfig
from open_po.errors import UserError, user_line
from open_po.output.files import disk_faults, is_locked, lock_folder, open_to_others, write_atomically
from open_po.output.summary import RunSummary, Status

_FROM_THE_NEWEST = ("auto", "hub")  # values of resume_from_checkpoint that name no folder
# How the names of the files begin that every run hides, or half-written ones of it
_HIDDEN = (".config.yaml.", ".progress.json", "..progress.json.", ".hub.", "..hub.json.")
CURVES = "training_curves.png"
FINAL = "final"  # what the model of a complete run is called where uploads are noted


def changed_fields(
    theirs: Mapping[str, Any], config: RunConfig, *, free: Collection[str] = (), more: Collection[str] = ()
) -> str:
    """The fields that shape a result and differ from those of an earlier run, with both values; empty if none do.

    `free` are fields that may differ, `more` others that may not.
    """
    ours = config.result_fields() | {name: config.flat()[name] for name in more}
    changed = [name for name in ours if name not in free and theirs.get(name) != ours[name]]
    return "; ".join(f"{name} was {theirs.get(name)}, is {ours[name]}" for name in changed)


class RunFolder:
    """`output_dir` and the paths in it."""

    # What stands beside the model and is no part of it, hidden files apart
    private = frozenset({"checkpoints", "wandb", "tensorboard", "mlruns", "trackio"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / CURVES
        self.samples = path / "samples.jsonl"
        self.summary = path / "run_summary.json"
        self.hub = path / ".hub.json"  # what is to be on the Hub and what is: `hub/publication.py`
        self.board = path / ".progress.json"  # hidden, so that it goes to no Hub with the model
        self.checkpoints = path / "checkpoints"
        self._held: int | None = None  # the folder, open and locked

    def claim(self, config: RunConfig) -> bool:
        """Make the folder this run's; False if it holds this very run and that is complete.

        Then nothing is changed, but for what a kill has left half-written.
        Raises UserError, before anything is changed, if it holds something else.
        """
        wanted = config.output.resume_from_checkpoint
        if wanted not in (None, *_FROM_THE_NEWEST) and not Path(wanted).is_dir():
            raise UserError(f"resume_from_checkpoint {wanted}: is no folder")
        try:
            if self.path.exists():
                self._refuse_other_run(config)
                if config.output.resume_from_checkpoint in _FROM_THE_NEWEST and self.is_complete():
                    if not is_locked(self.path):  # it may still be at work: it uploads
                        self._remove_leftovers()
                    return False
            self.path.mkdir(parents=True, exist_ok=True)
            self._held = lock_folder(self.path, f"output_dir {self.path}: another run")
            self._remove_leftovers()
            write_atomically(self.config, lambda path: path.write_text(config.to_yaml()))
            return True
        except OSError as error:
            raise UserError(f"output_dir {self.path}: cannot be written ({error.strerror})") from error

    def note(self, config: RunConfig) -> None:
        """Write the run's configuration, with what has been settled since."""
        with disk_faults(str(self.config), "nothing is trained yet"):
            write_atomically(self.config, lambda path: path.write_text(config.to_yaml()))

    def refuse_unless_shared(self, config: str) -> None:
        """Raises UserError on a rank that does not see the `config` that rank 0 sees here."""
        if not self.config.is_file() or self.config.read_text() != config:
            raise UserError(
                f"output_dir {self.path}: is not the same folder on {platform.node()}, where checkpoints are read and "
                "parts of them written; choose one on a file system that all nodes share"
            )

    def _refuse_other_run(self, config: RunConfig) -> None:
        if self._is_vacant():
            return
        if not self.config.is_file():
            raise UserError(f"output_dir {self.path}: is not empty and holds no run; choose another folder")
        if config.output.resume_from_checkpoint is None:
            raise UserError(
                f"output_dir {self.path}: holds another run; choose another folder, or continue that run with "
                "--resume_from_checkpoint auto"
            )
        wanted = config.output.resume_from_checkpoint
        if wanted not in _FROM_THE_NEWEST and self.checkpoints.resolve() not in Path(wanted).resolve().parents:
            raise UserError(
                f"output_dir {self.path}: holds another run than resume_from_checkpoint {wanted}; choose another folder"
            )
        if changed := changed_fields(self._read_config(), config):
            raise UserError(
                f"output_dir {self.path}: holds a run of another configuration ({changed}); choose another folder"
            )

    def earlier_config(self) -> dict[str, Any] | None:
        """The configuration of the run that is there; None if there is none, or it failed before it made anything.

        Raises UserError if it is damaged, OSError.
        """
        return None if not self.config.is_file() or self._is_vacant() else self._read_config()

    def _is_vacant(self) -> bool:
        """Whether nothing is there that stands in the way, as a run that failed before it made anything does not."""
        held = {item.name for item in self.path.iterdir() if not item.name.startswith(_HIDDEN)}
        return not held or (held <= {self.config.name, self.summary.name} and self._status() == Status.FAILED)

    def _read_config(self) -> dict[str, Any]:
        try:
            content = yaml.safe_load(self.config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            content = None
        if not isinstance(content, dict):
            raise UserError(f"output_dir {self.path}: its {self.config.name} is damaged; choose another folder")
        return content

    def release(self) -> None:
        """Unlock the folder, so that another run may claim it."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _remove_leftovers(self) -> None:
        """Remove what a killed run was in the middle of writing."""
        for leftover in [*self.path.glob(".*.partial"), *self.checkpoints.glob(".step_*"), self.path / ".staging"]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)

    def read_summary(self) -> RunSummary | None:
        """What run_summary.json says; None if there is none that can be read."""
        return RunSummary.read(self.summary)

    def write_summary(self, summary: RunSummary) -> None:
        """Replace run_summary.json."""
        summary.write(self.summary)

    def is_complete(self) -> bool:
        """Whether the run in the folder has come to its end."""
        return self._status() == Status.COMPLETED

    def published_to(self) -> str | None:
        """The repository on the Hub that has the complete run, if any has."""
        repository, _ = self.hub_branch()
        return repository if FINAL in self._hub_notes().get("published", {}) else None

    def hub_branch(self) -> tuple[str | None, str | None]:
        """The repository on the Hub and the branch that the run goes to, if it does."""
        branch = self._hub_notes().get("branch", {})
        return branch.get("repository"), branch.get("revision")

    def _hub_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads(self.hub.read_text())
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _status(self) -> Status | None:
        summary = self.read_summary()
        return None if summary is None else summary.status

    @contextmanager
    def recording_failure(self, is_main: bool) -> Iterator[None]:
        """Keep run_summary.json's `status` true while the run lasts and when it stops early."""
        try:
            if is_main:
                self.write_summary(RunSummary(status=Status.RUNNING))
            yield
        except BaseException as error:
            if is_main:
                status = Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED
                with suppress(OSError):  # a full disk must not hide the error that is on its way
                    said = user_line(error) if isinstance(error, RuntimeError) else None
                    RunSummary.update(self.summary, status=status, error=said or str(error) or type(error).__name__)
            raise

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder, to be made, for files that then move to this one, each whole.

        Raises UserError if the disk refuses; what was written is removed, checkpoints are kept.
        """
        staged = self.path / ".staging"
        try:
            with disk_faults(f"{self.path}: the model", "checkpoints are kept"):
                yield staged
                open_to_others(staged)
                for item in staged.iterdir():
                    target = self.path / item.name
                    if target.is_dir():
                        shutil.rmtree(target)
                    item.replace(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
