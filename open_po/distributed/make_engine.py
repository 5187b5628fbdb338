"""The engine that a run asks for. It owns the order: the model is spread, then its optimizer is made, then hooks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from open_po.distributed.ddp import DdpEngine
from open_po.distributed.engine import Engine, Fill, OptimizerMaker, Placement
from open_po.distributed.layers import LayersEngine, LayersPlacement, visible_gpus
from open_po.distributed.runtime import Runtime
from open_po.distributed.single import SingleEngine
from open_po.distributed.update import UpdateRules


def deal_out(model: nn.Module, units: Sequence[nn.Module]) -> Placement:
    """`model`, which is not trained, over the GPUs of this process."""
    return LayersPlacement(model, units, visible_gpus())


def divide(model: nn.Module, units: Sequence[nn.Module], fill: Fill, runtime: Runtime) -> Placement:
    """`model`, which is not trained, its weights divided among `runtime`'s ranks; `units` and `fill` as below."""
    from open_po.distributed.fsdp import FsdpPlacement

    return FsdpPlacement(model, units, fill, runtime)


def make_engine(
    model: nn.Module,
    units: Sequence[nn.Module],
    fill: Fill,
    make_optimizer: OptimizerMaker,
    runtime: Runtime,
    *,
    rules: UpdateRules,
    head_weight: Tensor,
) -> Engine:
    """`model` spread over the ranks as `runtime.parallelism` says, with an optimizer of its trained parameters.

    `units` are the layers whose weights are gathered together, where weights are divided; `fill` gives a unit's their
    values before. `rules` are those of gradients and updates. `head_weight` is the output layer's, whose vocabulary
    may be divided.
    """
    kind = runtime.parallelism.kind
    if kind == "single":
        return SingleEngine(model, make_optimizer, runtime, rules=rules)
    if kind == "ddp":
        return DdpEngine(model, make_optimizer, runtime, rules=rules)
    if kind == "tp":
        from open_po.distributed.tensor_parallel import TensorParallelEngine

        return TensorParallelEngine(model, head_weight, make_optimizer, runtime, rules=rules)
    if kind == "layers":
        return LayersEngine(model, units, make_optimizer, runtime, rules=rules)
    if kind == "fsdp":
        from open_po.distributed.fsdp import FsdpEngine

        return FsdpEngine(model, units, fill, make_optimizer, runtime, rules=rules)
    from open_po.distributed.zero import ZeroEngine

    return ZeroEngine(model, units, fill, make_optimizer, runtime, max_grad_norm=rules.max_grad_norm)
