"""What of a run is to be on the Hub, and what is there: kept in `.hub.json`, so that any process can go on with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from open_po.errors import UserError
from open_po.hub.repository import Branch, Sent
from open_po.output.files import write_atomically
from open_po.output.run_folder import FINAL, RunFolder

STATE_FOLDER = "last-checkpoint"  # in the repository, of the training state; the name that transformers gives it
MODEL_FOLDER = "model"  # in a checkpoint, of what is published as the model of its step
_ADAPTER = "adapter"
# Of the folder of a merged model, what belongs to that and not to its adapter
_MERGED = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json")
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


@dataclass(kw_only=True)
class Publication:
    """A run's branch on the Hub, what goes there, and what has arrived."""

    folder: RunFolder
    branch: Branch
    with_state: bool  # whether a checkpoint's training state goes with its model
    keeps_all: bool  # whether every checkpoint stays, in a branch of its own
    merged: bool  # whether adapters are published merged
    published: dict[str, str] = field(default_factory=dict)  # commits, by the name of a checkpoint, or FINAL
    is_noted: bool = True  # as that of its run, in its folder

    @staticmethod
    def read(folder: RunFolder) -> Publication | None:
        """What a run has noted; None if it was not to be published. Raises UserError if that cannot be read."""
        path = folder.hub
        try:
            content = json.loads(path.read_text())
            return Publication(folder=folder, branch=Branch(**content.pop("branch")), **content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it, and name the repository") from error

    def write(self) -> None:
        """Note it in the run's folder. Raises OSError."""
        if not self.is_noted:
            return
        content: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "folder"}
        content["branch"] = asdict(self.branch)
        write_atomically(self.folder.hub, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def due(self) -> list[str]:
        """What is on disk and not published, the oldest first: of checkpoints only the newest unless all are kept."""
        if FINAL in self.published:
            return []
        found = [path.parent.name for path in self.folder.checkpoints.glob(f"step_*/{MODEL_FOLDER}")]
        steps = sorted(found, key=lambda name: int(name.removeprefix("step_")))
        complete = self.folder.is_complete()
        if not self.keeps_all:
            steps = [] if complete else steps[-1:]
        return [name for name in [*steps, *([FINAL] if complete else [])] if name not in self.published]

    def files(self, name: str) -> dict[str, Path]:
        """The files of a checkpoint, or of the complete run, by their names in the repository.

        Raises FileNotFoundError if they are no model, or no state, any more: a commit would remove what is there.
        """
        files = self._files(name)
        if not any(_WEIGHTS.fullmatch(there) for there in files):
            raise FileNotFoundError(f"{self.folder.path}: {name} has no model any more")
        if name != FINAL and self.with_state and not any(there.startswith(f"{STATE_FOLDER}/") for there in files):
            raise FileNotFoundError(f"{self.folder.path}: {name} has no state any more")
        return files

    def _files(self, name: str) -> dict[str, Path]:
        if name == FINAL:
            return dict(self._model(self.folder.path))
        checkpoint = self.folder.checkpoints / name
        files = dict(self._model(checkpoint / MODEL_FOLDER))
        if self.with_state:
            for path in _all_files(checkpoint):
                inside = path.relative_to(checkpoint)
                if inside.parts[0] != MODEL_FOLDER:
                    files[f"{STATE_FOLDER}/{inside.as_posix()}"] = path
        return files

    def size(self, name: str) -> int:
        """The bytes of its files."""
        return sum(path.stat().st_size for path in self.files(name).values())

    def publish(self, name: str, sent: Sent) -> None:
        """Publish it, and note that; to do so again is no harm. Raises whatever the client does, or OSError."""
        files = self.files(name)

        def stale(there: str) -> bool:
            """Whether an earlier commit of the run left it; what else is in a repository is its owner's."""
            return _WEIGHTS.fullmatch(there) is not None or there.startswith(f"{STATE_FOLDER}/")

        what = "The trained model" if name == FINAL else f"The model after step {int(name.removeprefix('step_'))}"
        commit = self.branch.publish(files, what, stale=stale, sent=sent)
        if self.keeps_all and name != FINAL:
            kept = self.branch.starting_at(f"{self.branch.revision}-{name}", commit)
            kept.publish(files, what, stale=stale)  # nothing to send, unless an earlier run has left such a branch
        self.published[name] = commit
        self.write()

    def _model(self, folder: Path) -> Iterator[tuple[str, Path]]:
        """A folder's model and what is told of it; of a LoRA run the adapter, unless the merged model is wanted."""
        adapter_only = (folder / _ADAPTER).is_dir() and not self.merged
        for path in _all_files(folder):
            inside = path.relative_to(folder)
            first = inside.parts[0]
            if first in self.folder.private or first.startswith("."):
                continue
            if adapter_only and first == _ADAPTER:  # after the merged model's: its card takes the place of that
                yield inside.relative_to(_ADAPTER).as_posix(), path
            elif not (adapter_only and _MERGED.fullmatch(inside.as_posix())):
                yield inside.as_posix(), path


def _all_files(folder: Path) -> list[Path]:
    """Every file, those of folders last."""
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (len(path.parts), path))
