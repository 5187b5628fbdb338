"""The whole configuration, `RunConfig`.

A field's name is unique over all sections, so YAML and flags are flat. What `resolve` writes parses again to the same
run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from open_po.config.data import DataConfig
from open_po.config.distributed import DistributedConfig
from open_po.config.field import Field, fields_of
from open_po.config.loss import LossConfig
from open_po.config.model import ModelConfig
from open_po.config.output import OutputConfig
from open_po.config.reference import ReferenceConfig
from open_po.config.train import TrainConfig

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reference": ReferenceConfig,
    "loss": LossConfig,
    "train": TrainConfig,
    "distributed": DistributedConfig,
    "output": OutputConfig,
}
FIELDS: dict[str, Field] = {field.name: field for name, cls in SECTIONS.items() for field in fields_of(name, cls)}

HELD_OUT_FIELDS = tuple(name for name in FIELDS if name.startswith("eval_mix"))  # held-out data, in whichever form


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A checked and resolved configuration."""

    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig
    loss: LossConfig
    train: TrainConfig
    distributed: DistributedConfig
    output: OutputConfig
    # What is told at the start of a run: names of other trainers that have no effect here, a line each.
    notes: tuple[str, ...] = field(default=(), compare=False)

    def flat(self) -> dict[str, Any]:
        """Every field's value by name."""
        return {name: getattr(getattr(self, field.section), name) for name, field in FIELDS.items()}

    @property
    def title(self) -> str:
        """The run's name and its loss, for plots."""
        return f"{self.output.exp_name}: {' + '.join(self.loss.names)}"

    def to_yaml(self) -> str:
        """The fields that have a value, as YAML that parses to this configuration."""
        return yaml.safe_dump({k: v for k, v in self.flat().items() if v is not None}, sort_keys=False)

    def result_fields(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run it continues."""
        return {name: value for name, value in self.flat().items() if FIELDS[name].about.shapes_result}
