"""What updates the weights: each optimizer is an entry of the catalogue, with the memory it takes."""

from open_po.optimizers.catalogue import OPTIMIZERS
from open_po.optimizers.spec import COMPENSATION, OptimizerSpec, Settings

__all__ = ["COMPENSATION", "OPTIMIZERS", "OptimizerSpec", "Settings"]
