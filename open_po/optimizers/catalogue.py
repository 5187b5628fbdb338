"""All optimizers, an entry each."""

from __future__ import annotations

from open_po.optimizers.spec import OptimizerSpec

_PLAIN = "open_po.optimizers.plain"

OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec(
            name="adamw",
            summary="AdamW (arXiv 1711.05101), its moments in the precision of the weights",
            maker=f"{_PLAIN}:adamw",
            state_bytes=lambda weight: 2 * weight,
            decays=True,
            on_host=True,
        ),
        OptimizerSpec(
            name="rmsprop",
            summary="RMSprop, as in the DPO paper's own code",
            maker=f"{_PLAIN}:rmsprop",
            state_bytes=lambda weight: weight,
            on_host=True,
        ),
        OptimizerSpec(
            name="sgd",
            summary="plain gradient descent, without momentum",
            maker=f"{_PLAIN}:sgd",
            state_bytes=lambda weight: 0,
            on_host=True,
        ),
    )
}
