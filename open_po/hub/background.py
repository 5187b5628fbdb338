"""Uploads while training goes on: processes of their own, one at a time, that the run looks after between steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from open_po.config import OutputConfig
from open_po.errors import NotUploadedError, Preempted, UserError
from open_po.hub.publication import MODEL_FOLDER, Publication
from open_po.hub.repository import Branch
from open_po.hub.retrying import AT_START, AT_THE_END, IN_TRAINING, persistently
from open_po.output.metrics import Metrics
from open_po.output.observers import RunObserver
from open_po.output.phase import BYTES
from open_po.output.progress import Progress
from open_po.output.run_folder import FINAL, RunFolder
from open_po.output.summary import RunSummary

_EVENTS = ".hub.events"
_POLL_SECONDS = 0.1
# A file that takes longer is not on its way any more: the client's upload in Rust has no limit of its own.
_SLOWEST_BYTES_A_SECOND, _SLACK_SECONDS = 50_000, 600.0
_PACKAGES = Path(__file__).parents[2]  # where this package was imported from


class HubUploader(RunObserver):
    """Publishes a run's checkpoints as `hub_strategy` says, and its model at the end.

    Of checkpoints that come faster than they can be uploaded the newest goes next, unless all are kept.
    """

    def __init__(self, folder: RunFolder, output: OutputConfig, console: Console) -> None:
        """Makes the repository and commits the configuration, so that what is not allowed is found before training.

        Raises UserError.
        """
        self._folder, self._console = folder, console
        self.branch = branch = Branch.of(output, patience=AT_START, say=console.print)
        before = Publication.read(folder)
        arrived = {} if before is None or before.branch != branch else before.published
        known = {path.name for path in folder.checkpoints.glob("step_*")} | ({FINAL} if folder.is_complete() else set())
        self._publication = Publication(
            folder=folder,
            branch=branch,
            with_state=output.hub_strategy in ("checkpoint", "all_checkpoints"),
            keeps_all=output.hub_strategy == "all_checkpoints",
            merged=output.hf_merged,
            published={name: commit for name, commit in arrived.items() if name in known},
        )
        self._publication.write()
        persistently(
            f"push_to_hub: the first upload to {branch}",
            lambda: branch.publish({folder.config.name: folder.config}, "Training begins", stale=lambda there: False),
            patience=AT_START,
            say=console.print,
        )
        self._waiting = [name for name in self._publication.due() if name != FINAL]  # of a run that was killed
        self._upload: _Upload | None = None
        self._told = False  # that a process could not be started

    def metrics_written(self, metrics: Metrics) -> None:
        self._look()

    def checkpoint_written(self, checkpoint: Path) -> None:
        if (checkpoint / MODEL_FOLDER).is_dir():
            self._waiting = [*(self._waiting if self._publication.keeps_all else []), checkpoint.name]
        self._look()

    def needs(self, checkpoint: Path) -> bool:
        if self._publication.keeps_all:
            return (checkpoint / MODEL_FOLDER).is_dir() and not self._has_arrived(checkpoint.name)
        under_way = [] if self._upload is None else [self._upload.name]
        return checkpoint.name in [*self._waiting, *under_way]

    def stopped(self, error: BaseException) -> None:
        """Asked to stop, finish what is waiting: the machine may be gone soon. A second signal ends this.

        What is not on the Hub in the end is told, with the command that sends it.
        """
        under_way = [] if self._upload is None else [self._upload.name]
        if isinstance(error, Preempted) and (names := [*under_way, *self._waiting]):
            self._say(f"Asked to stop: {', '.join(names)} still goes to the Hub; a second signal ends that")
            while self._upload is not None or self._waiting:
                self._look()
                if self._upload is None and self._told:
                    break
                self._wait()
        try:
            noted = self._noted()
        except UserError as unread:  # what ended the run is what it ends with
            self._say(f"What is on the Hub cannot be told: {unread}")
            return
        if due := noted.due():
            command = f"python -m open_po upload {self._folder.path}"
            self._say(f"Not on the Hub yet: {', '.join(due)}; the run sends it when it goes on, or {command}")
        elif noted.published:
            self._say(f"On the Hub: {list(noted.published)[-1]} in {self.branch}")

    def completed(self, summary: RunSummary) -> None:
        self._waiting = []
        self._wait()
        for name in self._noted().due():
            self._upload = _Upload(self._folder, name, AT_THE_END)
            self._wait()
        if self._noted().due():
            raise NotUploadedError(
                f"the upload to {self.branch} is not complete; what is there is kept, and this finishes "
                f"it: python -m open_po upload {self._folder.path}"
            )
        self._say(f"Uploaded to the Hub: {self.branch}, {self.branch.address}")

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def _noted(self) -> Publication:
        """What uploads have noted. Raises UserError if that cannot be read any more."""
        noted = Publication.read(self._folder)
        if noted is None:
            raise UserError(f"{self._folder.hub}: is gone")
        return noted

    def _has_arrived(self, name: str) -> bool:
        """Whether it is known that a checkpoint is on the Hub."""
        try:
            return name in self._noted().published
        except UserError:
            return False

    def _look(self) -> None:
        """Tell how an upload ended, and begin the next."""
        if self._upload is not None and self._upload.poll():
            self._end()
        if self._upload is None and self._waiting:
            try:
                self._upload = _Upload(self._folder, self._waiting[0], IN_TRAINING)
            except OSError as error:  # no memory for a process, no room for its log: later, or in the end
                if not self._told:
                    self._told = True
                    self._say(f"upload of {self._waiting[0]} cannot begin yet ({error.strerror})")
            else:
                del self._waiting[0]

    def _wait(self) -> None:
        """Wait for the upload that is under way, if any, and tell of it."""
        upload = self._upload
        if upload is None:
            return
        upload.poll()
        with UploadBar(self._console, upload.name, upload.total) as bar:
            while not upload.poll():
                bar.show(upload.sent, upload.total)
                for line in upload.news():
                    self._say(line)
                time.sleep(_POLL_SECONDS)
            bar.show(upload.sent, upload.total)
        self._end()

    def _end(self) -> None:
        assert self._upload is not None
        if self._upload.failed:
            for line in self._upload.news()[-1:]:
                self._say(line.removeprefix("error: "))
        self._upload = None


class UploadBar:
    """The bar of an upload."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        label = "Upload" if name == FINAL else f"Upload of {name}"
        self._progress = Progress(console, label, total=total, unit=BYTES, last_line=False)

    def __enter__(self) -> UploadBar:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def show(self, sent: int, total: int) -> None:
        """`sent` of `total` bytes have arrived."""
        self._progress.total = total
        if sent != self._progress.done:
            self._progress.advance(sent - self._progress.done)


class EventLog:
    """What an upload in a process of its own says of itself: JSON, a line each."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def total(self, count: int) -> None:
        """So many bytes are to be there in the end."""
        self._write(total=count, sent=0)

    def sent(self, count: int) -> None:
        """So many bytes are there, in all."""
        self._write(sent=count)

    def say(self, line: str) -> None:
        """A line for the user."""
        self._write(say=line)

    def _write(self, **event: Any) -> None:
        print(json.dumps(event), file=self._file, flush=True)


class _Upload:
    """An upload in a process of its own, which `python -m open_po upload` does."""

    def __init__(self, folder: RunFolder, name: str, patience: float) -> None:
        self.name = name
        self.total = self.sent = 0
        self._lines: list[str] = []
        self._told = 0
        self._log = folder.path / _EVENTS
        self._moved = time.monotonic()
        words = [sys.executable, "-m", "open_po", "upload", str(folder.path), "--only", name, "--run", str(os.getpid())]
        path = os.pathsep.join([str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [*words, "--patience", str(patience)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is the run's
            )

    @property
    def failed(self) -> bool:
        return self._process.returncode != 0

    def poll(self) -> bool:
        """Take in what it has said; whether it has ended."""
        ended = self._process.poll() is not None
        sent, self._lines = self.sent, []
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                event = json.loads(line)
                self.total, self.sent = event.get("total", self.total), event.get("sent", self.sent)
                self._lines += [event["say"]] if "say" in event else []
            except (ValueError, AttributeError):  # not an event: the error line, or what the client has to say
                self._lines.append(line)
        now = time.monotonic()
        if self.sent != sent:
            self._moved = now
        elif not ended and now - self._moved > _SLACK_SECONDS + self.total / _SLOWEST_BYTES_A_SECOND:
            self._process.kill()
        return ended

    def news(self) -> list[str]:
        """The lines for the user since it was last asked."""
        news, self._told = self._lines[self._told :], len(self._lines)
        return news
