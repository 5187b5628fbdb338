"""From tokenised pairs to forward passes: which pairs make a step, how they are cut into packs, a pack's tensors."""

from open_po.packing.batch import Group, LastLayer, Layout, PackedBatch, Segment, group_pairs, pack, pack_responses
from open_po.packing.epoch import EpochPlan, plan_epoch
from open_po.packing.planner import PackingStats, Planner, PromptUnit, Response, ResponsePlanner
from open_po.packing.sampler import Sampler

__all__ = [
    "EpochPlan",
    "Group",
    "LastLayer",
    "Layout",
    "PackedBatch",
    "PackingStats",
    "Planner",
    "PromptUnit",
    "Response",
    "ResponsePlanner",
    "Sampler",
    "Segment",
    "group_pairs",
    "pack",
    "pack_responses",
    "plan_epoch",
]
