"""The settings of a sweep, the run of each, and what it has come to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_po.config import RunConfig
from open_po.errors import ConfigError
from open_po.output.metrics import LOSS, REWARD_ACCURACY, REWARD_MARGIN
from open_po.output.run_folder import RunFolder

NOT_STARTED = "not started"  # beside the words of a run's own status
FIGURES = (REWARD_ACCURACY, REWARD_MARGIN, LOSS)

Setting = dict[str, str]  # a value for each field of the grid


@dataclass(frozen=True, kw_only=True)
class Run:
    """A setting, and where and with which words it runs."""

    setting: Setting
    folder: RunFolder
    log: Path
    words: list[str]
    config: RunConfig

    @property
    def name(self) -> str:
        """The setting as text, see `setting_name`."""
        return setting_name(self.setting)

    def done(self) -> bool:
        """Whether the run is complete."""
        return self.folder.is_complete()

    def result(self) -> dict[str, Any]:
        """The run's row of sweep.csv: its setting, status, last held-out figures, seconds and folder."""
        summary = self.folder.read_summary()
        found = None if summary is None else summary.result
        held_out = (found.eval if found is not None else None) or {}
        return {
            **self.setting,
            "status": NOT_STARTED if summary is None else str(summary.status),
            **{name: held_out.get(name) for name in FIGURES},
            "seconds": None if found is None else found.train.seconds,
            "folder": str(self.folder.path),
        }


def read_grid(items: Sequence[str]) -> list[Setting]:
    """Every combination of `["name=a,b", ...]`. Raises ConfigError."""
    problems = []
    axes: dict[str, list[str]] = {}
    for item in items:
        name, equals, after = item.partition("=")
        values = [value.strip() for value in after.split(",")]
        if not name or not equals:
            problems.append(f"--grid {item}: must be NAME=VALUE,VALUE; configuration files come first")
        elif not all(values):
            problems.append(f"--grid {item}: has an empty value; must be NAME=VALUE,VALUE without blanks")
        elif name in axes:
            problems.append(f"--grid {name}: is given twice")
        elif name in ("output_dir", "exp_name", "resume_from_checkpoint"):
            problems.append(f"--grid {name}: is set by the sweep itself")
        axes[name] = list(dict.fromkeys(values))
    if problems:
        raise ConfigError(problems)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def setting_name(setting: Setting) -> str:
    """`name=value,name=value`, by name: the name of the run's folder too."""
    return ",".join(f"{name}={value}" for name, value in sorted(setting.items()))


def flags(values: Mapping[str, str]) -> list[str]:
    """The words of a command line that set `values`."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]
