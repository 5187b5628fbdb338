"""From tokenised pairs to forward passes: which pairs make a step, how they are cut into packs, a pack's tensors."""

from open_po.packing.batch import Group, LastLayer, Layout, PackedBatch, Segment, group_pairs, pack, pack_responses
from open_po.packing.epoch import EpochPlan, plan_epoch
from open_po.packing.planner import Planner, Response, ResponsePlanner
from open_po.packing.response_packs import ResponsePack, pack_all
from open_po.packing.sampler import Sampler
from open_po.packing.units import PackingStats, PromptUnit

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
    "ResponsePack",
    "ResponsePlanner",
    "Sampler",
    "Segment",
    "group_pairs",
    "pack",
    "pack_all",
    "pack_responses",
    "plan_epoch",
]
