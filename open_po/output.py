"""The run's folder: who owns it, and the files that are not the model's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from open_po.config import RunConfig
from open_po.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file under a temporary name, fsync it and only then give it its own: it is never seen half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """`output_dir` and the paths in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "training_curves.png"
        self.summary = path / "run_summary.json"
        self.checkpoints = path / "checkpoints"

    def claim(self, config: RunConfig) -> None:
        """Make the folder this run's. Raises UserError, before anything is changed, if it holds something else."""
        try:
            if self.path.exists() and any(self.path.iterdir()):
                self._refuse_other_run(config)
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, lambda path: path.write_text(config.to_yaml()))
        except OSError as error:
            raise UserError(f"output_dir {self.path}: cannot be written ({error.strerror})") from error

    def _refuse_other_run(self, config: RunConfig) -> None:
        if not self.config.is_file():
            raise UserError(f"output_dir {self.path}: is not empty and holds no run; choose another folder")
        if config.output.resume_from_checkpoint is None:
            raise UserError(
                f"output_dir {self.path}: holds another run; choose another folder, or continue that run with "
                "--resume_from_checkpoint auto"
            )
        theirs = yaml.safe_load(self.config.read_text()) or {}
        ours = config.result_fields()
        changed = [f"{name} was {theirs.get(name)}, is {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
        if changed:
            raise UserError(
                f"output_dir {self.path}: holds a run of another configuration ({'; '.join(changed)}); "
                "choose another folder"
            )

    def is_complete(self) -> bool:
        """Whether the run that owns the folder has ended well."""
        return self.summary.is_file() and json.loads(self.summary.read_text()).get("status") == "completed"

    @contextmanager
    def recording_failure(self, is_main: bool) -> Iterator[None]:
        """Keep run_summary.json's `status` true while the run lasts and when it stops early."""
        try:
            if is_main:
                self.write_summary({"status": "running"})
            yield
        except BaseException as error:
            if is_main:
                with suppress(OSError):  # a full disk must not hide the error that is on its way
                    self.write_summary({"status": "failed", "error": str(error) or type(error).__name__})
            raise

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder to write files into that then move to this one, each whole."""
        staged = self.path / ".staging"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        yield staged
        for item in staged.iterdir():
            target = self.path / item.name
            if target.is_dir():
                shutil.rmtree(target)
            item.replace(target)
        staged.rmdir()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace run_summary.json."""
        write_atomically(self.summary, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
