"""The run's configuration: YAML files merged left to right, then command-line flags, checked as a whole."""

from open_po.config.checks import branch_problem, repository_problem
from open_po.config.data import DataConfig
from open_po.config.distributed import DistributedConfig
from open_po.config.loss import LossConfig
from open_po.config.mixture import MixturePart, parse_mixture
from open_po.config.model import FOUR_BIT, ModelConfig, Sharing
from open_po.config.output import OutputConfig
from open_po.config.reading import help_text, load_config
from open_po.config.reference import ReferenceConfig
from open_po.config.run_config import FIELDS, HELD_OUT_FIELDS, RunConfig
from open_po.config.train import TrainConfig

__all__ = [
    "FIELDS",
    "FOUR_BIT",
    "HELD_OUT_FIELDS",
    "DataConfig",
    "DistributedConfig",
    "LossConfig",
    "MixturePart",
    "ModelConfig",
    "OutputConfig",
    "ReferenceConfig",
    "RunConfig",
    "Sharing",
    "TrainConfig",
    "branch_problem",
    "help_text",
    "load_config",
    "parse_mixture",
    "repository_problem",
]
