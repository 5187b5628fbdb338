"""The run's configuration: YAML files merged left to right, then command-line flags, checked as a whole."""

from open_po.config.fields import (
    FIELDS,
    DataConfig,
    LossConfig,
    ModelConfig,
    OutputConfig,
    ReferenceConfig,
    RunConfig,
    Sharing,
    TrainConfig,
)
from open_po.config.mixture import mixture
from open_po.config.reading import help_text, load_config

__all__ = [
    "FIELDS",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OutputConfig",
    "ReferenceConfig",
    "RunConfig",
    "Sharing",
    "TrainConfig",
    "help_text",
    "load_config",
    "mixture",
]
