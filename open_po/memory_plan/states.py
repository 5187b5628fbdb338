"""What a rank holds from one pack to the next: weights, gradients and optimizer states, under each engine.

`docs/scaling.md` says where the terms come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from open_po.memory_plan.shape import ModelBytes, TrainingShape, WeightBytes

ZERO_BUCKET = 2e9  # bytes that DeepSpeed reduces at a time: 5e8 numbers of four bytes, its default
ZERO_HOST = 20  # bytes a trained parameter in the host's memory, where DeepSpeed's optimizer is offloaded
_WHOLE_GRADIENT = 0.2  # share of the card up to which fsdp adds gradients up before it reduces them


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes of one rank's device, and of its part of the host's memory."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float = 0.0  # whole weights while they are needed, and buffers that gradients are reduced in
    gathered_at_end: float = 0.0  # when the backward pass reaches what is around the layers, and activations are gone
    host: float = 0.0
    layer_share: float = 1.0  # of the activations of all layers

    @property
    def kept(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer


def rank_bytes(model: ModelBytes, shape: TrainingShape, *, card: float | None = None) -> RankBytes:
    """The bytes of the rank that holds most; `card` is the memory of its device, if that is known."""
    if shape.engine == "layers":
        return max(_dealt_out(model, shape), key=lambda found: found.kept)
    whole, n = model.whole, shape.ranks
    gradients = shape.gradient * whole.trained if shape.gradients_whole else 0.0
    optimizer, host = shape.optimizer * whole.trained, shape.optimizer_host * whole.trained
    if shape.engine in ("single", "ddp"):
        return RankBytes(weights=whole.size, gradients=gradients, optimizer=optimizer, host=host)
    if shape.engine in ("zero1", "zero2"):
        # DeepSpeed keeps a second copy of the weights that a rank updates. Stage 2 reduces gradients once a step too.
        return RankBytes(
            weights=whole.size + 4 * whole.trained / n,
            gradients=gradients,
            optimizer=optimizer / n,
            gathered=ZERO_BUCKET,
            host=host / n,
        )
    reduced_once = shape.engine == "fsdp" and shape.several_packs and _fits_whole(whole.trained_size, card)
    layer, around = model.largest_layer, model.around
    flight = shape.gradient * around.trained
    return RankBytes(
        weights=0.0 if shape.offload_weights else whole.size / n,
        gradients=gradients if reduced_once else gradients / n,
        optimizer=optimizer / n,
        # What is around the layers is whole through the pass, two layers at a time, one with its gradient on the way.
        gathered=around.size + 2 * layer.size + shape.gradient * layer.trained,
        gathered_at_end=around.size + 2 * flight,
        host=(host + (whole.size if shape.offload_weights else 0.0)) / n,
    )


def _fits_whole(size: float, card: float | None) -> bool:
    return card is None or size <= _WHOLE_GRADIENT * card


def _dealt_out(model: ModelBytes, shape: TrainingShape) -> list[RankBytes]:
    """The layers over several devices, what is around them on the first."""
    numbers = share_out([layer.size for layer in model.layers], model.around.size, shape.ranks)
    found = []
    for device in range(shape.ranks):
        own = [layer for layer, number in zip(model.layers, numbers, strict=True) if number == device]
        part = sum(own, model.around if device == 0 else _NOTHING)
        gradient = shape.gradient * part.trained if shape.gradients_whole else 0.0
        found.append(
            RankBytes(
                weights=part.size,
                gradients=gradient,
                optimizer=shape.optimizer * part.trained,
                host=shape.optimizer_host * part.trained,
                layer_share=len(own) / max(1, len(model.layers)),
            )
        )
    return found


_NOTHING = WeightBytes(parameters=0, trained=0, size=0.0, trained_size=0.0)


def share_out(sizes: Sequence[float], around: float, devices: int) -> list[int]:
    """Which device each layer goes to, in order; `around` bytes are on the first already, so that it gets fewer."""
    each = (sum(sizes) + around) / devices
    numbers, filled = [], around
    for size in sizes:
        numbers.append(min(int((filled + size / 2) // each), devices - 1))
        filled += size
    return numbers
