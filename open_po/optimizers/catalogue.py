"""All optimizers, an entry each."""

from __future__ import annotations

from open_po.optimizers.spec import SHAPED, WHOLE, OptimizerSpec

_PLAIN = "open_po.optimizers.plain"
_COMPACT = "open_po.optimizers.compact"

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
            name="adamw_kahan",
            summary="AdamW that keeps what rounding cuts off a bfloat16 weight, as exact as float32 weights",
            maker=f"{_COMPACT}:adamw_kahan",
            state_bytes=lambda weight: 3 * weight if weight == 2 else 2 * weight,
            decays=True,
            keeps_small_updates=True,
            parallel=(*SHAPED, "tp"),  # DeepSpeed updates float32 copies of its own
        ),
        OptimizerSpec(
            name="adamw_sr",
            summary="AdamW that rounds bfloat16 weights up or down by chance, right on average",
            maker=f"{_COMPACT}:adamw_sr",
            state_bytes=lambda weight: 2 * weight,
            decays=True,
            keeps_small_updates=True,
            parallel=(*SHAPED, "tp"),  # DeepSpeed updates float32 copies of its own
        ),
        OptimizerSpec(
            name="adamw_8bit",
            summary="AdamW with moments of 8 bits (arXiv 2110.02861); rounds bfloat16 weights as adamw_sr",
            maker=f"{_COMPACT}:adamw_8bit",
            state_bytes=lambda weight: 2 + 2 * 4 / 256,  # a number of 4 bytes for 256 moments
            decays=True,
            keeps_small_updates=True,
            parallel=SHAPED,
            package="bitsandbytes",
        ),
        OptimizerSpec(
            name="adamw_paged",
            summary="AdamW, float32 moments that move to host memory where the GPU's is short (bitsandbytes)",
            maker="open_po.optimizers.paged:adamw_paged",
            state_bytes=lambda weight: 8,
            decays=True,
            parallel=WHOLE,
            needs_cuda=True,
            package="bitsandbytes",
        ),
        OptimizerSpec(
            name="rmsprop",
            summary="RMSprop, as in the DPO paper's own code",
            maker=f"{_PLAIN}:rmsprop",
            state_bytes=lambda weight: weight,
            on_host=True,
        ),
        OptimizerSpec(
            name="adafactor",
            summary="Adafactor (arXiv 1804.04235); learning_rate is relative to a weight's size (RMS of its tensor)",
            maker=f"{_PLAIN}:adafactor",
            relative=True,
            state_bytes=lambda weight: 0.01,  # a row and a column of a matrix; vectors have as many as weights
            decays=True,
            parallel=WHOLE,  # PyTorch's takes no distributed tensors
        ),
        OptimizerSpec(
            name="muon",
            summary="Muon (orthogonal updates, as large as AdamW's) for the matrices of layers, AdamW for the rest",
            maker="open_po.optimizers.muon:muon",
            state_bytes=lambda weight: 2 * weight,
            matrix_bytes=lambda weight: weight,
            decays=True,
            parallel=SHAPED,
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
