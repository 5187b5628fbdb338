"""The files that the words of a pipeline stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from open_po.errors import ConfigError

_FOLDERS = {"model": Path("configs/models"), "task": Path("configs/tasks"), "loss": Path("configs/losses")}
_SFT = "_sft"  # ends the name of a task's SFT stage


@dataclass(frozen=True, kw_only=True)
class Overlays:
    """The overlay of a model, of a task and of each loss, and what lies beside the task's.

    Of a task `T.yaml`, the data of its preference stage, these may be there: `T_sft.yaml`, data and settings of its SFT
    stage; `T/prepare.sh`, which makes what the task needs and does nothing if that is there; `T/LOSS.yaml`, what a loss
    needs on this task; `T/evaluate.yaml`, flags of `python -m open_po evaluate`.
    """

    model: Path
    task: Path
    losses: dict[str, Path]  # by name, in the order in which they were named

    @staticmethod
    def find(words: Sequence[str]) -> Overlays:
        """The overlays of `MODEL TASK LOSS [LOSS ...]`, names or YAML files. Raises ConfigError."""
        if len(words) < 3:
            given = f"got {' '.join(words)}" if words else "got nothing"
            raise ConfigError([f"MODEL TASK LOSS [LOSS ...]: must come first, {given}; {_known('model')}"])
        problems: list[str] = []
        model, task = _found("model", words[0], problems), _found("task", words[1], problems)
        losses: dict[str, Path] = {}
        for word in words[2:]:
            path = _found("loss", word, problems)
            if path.stem in losses:
                problems.append(f"loss {path.stem}: is named twice; leave one out")
            losses[path.stem] = path
        problems += [f"loss {name}: is the name of another stage; name its file otherwise" for name in _taken(losses)]
        if problems:
            raise ConfigError(problems)
        return Overlays(model=model, task=task, losses=losses)

    @property
    def name(self) -> str:
        """What the pipeline is called by default."""
        return f"{self.model.stem}_{self.task.stem}"

    @property
    def sft_file(self) -> Path:
        """Where an SFT stage would be."""
        return self.task.with_name(f"{self.task.stem}{_SFT}.yaml")

    @property
    def prepare(self) -> Path | None:
        """The script that makes what the task needs."""
        return self._beside("prepare.sh")

    def preference(self, loss: str) -> list[Path]:
        """The configuration files of a preference stage, which merge left to right."""
        own = self._beside(f"{loss}.yaml")
        return [self.model, self.task, self.losses[loss], *([own] if own is not None else [])]

    def evaluation(self) -> dict[str, list[str]] | None:
        """The flags of `evaluate` by name; None if the task says nothing of it. Raises ConfigError."""
        path = self._beside("evaluate.yaml")
        if path is None:
            return None
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # all of it stays text
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError([f"{path}: cannot be read ({' '.join(str(error).split())})"]) from error
        flags = _flags(content)
        if not flags:
            raise ConfigError([f"{path}: must be a mapping of flags of `evaluate` to text or lists of text"])
        return flags

    def _beside(self, name: str) -> Path | None:
        path = self.task.with_suffix("") / name
        return path if path.is_file() else None


def _flags(content: object) -> dict[str, list[str]]:
    """A mapping of names to text or lists of text; empty if it is none."""
    flags: dict[str, list[str]] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        flags[str(name)] = value if isinstance(value, list) else [value]
        if not all(word and isinstance(word, str) for word in flags[str(name)]):
            return {}
    return flags


def _taken(losses: dict[str, Path]) -> list[str]:
    """Losses with the name of a folder that the pipeline has for something else."""
    return [name for name in losses if name in ("sft", "evaluate", "evaluation", "logs")]


def _found(kind: str, word: str, problems: list[str]) -> Path:
    """The file that a word of the command line means; one that is not there is a problem."""
    is_path = "/" in word or word.endswith((".yaml", ".yml"))
    path = Path(word) if is_path else _FOLDERS[kind] / f"{word}.yaml"
    if not path.is_file():
        close = [] if is_path else get_close_matches(word, _names(kind), n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        problems.append(f"{kind} {word}: there is no {path}; {meant}{_known(kind)}")
    return path


def _known(kind: str) -> str:
    names = _names(kind)
    if not names:
        return f"there are none in {_FOLDERS[kind]}, which lies in the repository; or name a YAML file"
    return f"{_FOLDERS[kind]} has {', '.join(names)}; or name a YAML file"


def _names(kind: str) -> list[str]:
    stems = {path.stem for path in _FOLDERS[kind].glob("*.yaml")}
    return sorted(stem for stem in stems if stem.removesuffix(_SFT) == stem or stem.removesuffix(_SFT) not in stems)
