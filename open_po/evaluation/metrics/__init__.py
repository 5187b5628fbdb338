"""What answers are measured by: a function and an entry of the catalogue each."""

from open_po.evaluation.metrics.catalogue import METRICS, TASKS, Task, metric
from open_po.evaluation.metrics.spec import Answered, MetricSpec, Tools

__all__ = ["METRICS", "TASKS", "Answered", "MetricSpec", "Task", "Tools", "metric"]
