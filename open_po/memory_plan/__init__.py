"""How much memory a run takes: bytes by part, what fits, what to change. Nothing here needs torch."""

from open_po.memory_plan.plan import CONTEXT_BYTES, FRAGMENTED, MemoryPlan, Passes, usable
from open_po.memory_plan.shape import EngineName, ModelBytes, PassBytes, TrainingShape, WeightBytes
from open_po.memory_plan.states import (
    RankBytes,
    float32_sums_fit,
    rank_bytes,
    share_out,
    whole_gradients_fit,
    whole_reference_fits,
)

__all__ = [
    "CONTEXT_BYTES",
    "FRAGMENTED",
    "EngineName",
    "MemoryPlan",
    "ModelBytes",
    "PassBytes",
    "Passes",
    "RankBytes",
    "TrainingShape",
    "WeightBytes",
    "float32_sums_fit",
    "rank_bytes",
    "share_out",
    "usable",
    "whole_gradients_fit",
    "whole_reference_fits",
]
