"""Where a run's figures go: its own JSON lines, and the trackers that `report_to` names."""

from open_po.output.trackers.jsonl import JsonlTracker
from open_po.output.trackers.make import make_trackers

__all__ = ["JsonlTracker", "make_trackers"]
