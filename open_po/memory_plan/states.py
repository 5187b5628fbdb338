"""What a rank holds from one pack to the next: weights, gradients and optimizer states, under each engine.

`docs/scaling.md` says where the terms come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from open_po.memory_plan.shape import ModelBytes, TrainingShape, WeightBytes

ZERO_BUCKET = 2e9  # bytes that DeepSpeed reduces at a time: 5e8 numbers of four bytes, its default
ZERO_HOST = 20  # bytes a trained parameter in the host's memory, where DeepSpeed's optimizer is offloaded
# Share of a card that bfloat16 weights, float32 sums of their gradients and states may take; else sums are bfloat16.
_FLOAT32_SUMS = 0.75
_WHOLE_GRADIENT = 0.2  # share of the card up to which fsdp adds gradients up before it reduces them
_WHOLE_REFERENCE = 0.6  # share of a card that a whole copy of the reference may take, where ranks could divide it


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


def float32_sums_fit(trained: float, states: float, room: float) -> bool:
    """Whether bfloat16 weights, float32 sums of gradients and `states` bytes a weight leave enough of `room` bytes."""
    return (2 + 4 + states) * trained <= _FLOAT32_SUMS * room


def gradient_bytes(shape: TrainingShape, trained: float, card: float | None) -> float:
    """Of a trained weight's gradient, at the end of a step's passes."""
    if not shape.gradients_whole:
        return 0.0
    if not shape.several_packs and shape.engine != "ddp":  # under which bfloat16 weights' always add up apart
        return shape.gradient_alone
    cards = shape.ranks if shape.engine in ("fsdp", "layers") else 1
    small = shape.gradient_shrinks and card is not None
    return 2.0 if small and not float32_sums_fit(trained, shape.optimizer, cards * (card or 0.0)) else shape.gradient


def _states(shape: TrainingShape, layers: int, around: int) -> float:
    """Of the optimizer, for so many trained weights in the layers and around them."""
    each = shape.optimizer if shape.optimizer_of_layers is None else shape.optimizer_of_layers
    return each * layers + shape.optimizer * around


def rank_bytes(model: ModelBytes, shape: TrainingShape, *, card: float | None = None) -> RankBytes:
    """The bytes of the rank that holds most; `card` is the memory of its device, if that is known."""
    if shape.engine == "layers":
        return max(_dealt_out(model, shape, card), key=lambda found: found.kept)
    whole, n = model.whole, shape.ranks
    gradient = gradient_bytes(shape, whole.trained, card)
    gradients = gradient * whole.trained
    optimizer = _states(shape, sum(layer.trained for layer in model.layers), model.around.trained)
    host = shape.optimizer_host * whole.trained
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
    reduced_once = shape.engine == "fsdp" and shape.several_packs and gradient == 4
    reduced_once = reduced_once and (card is None or whole_gradients_fit(4.0 * whole.trained, card))
    layer, around = model.largest_layer, model.around
    flight = gradient * around.trained
    return RankBytes(
        weights=0.0 if shape.offload_weights else whole.size / n,
        gradients=gradients if reduced_once else gradients / n,
        optimizer=optimizer / n,
        # What is around the layers is whole through the pass, two layers at a time, one with its gradient on the way.
        gathered=(whole.size if shape.gathered_stay else around.size + 2 * layer.size) + gradient * layer.trained,
        gathered_at_end=around.size + 2 * flight,
        host=(host + (whole.size if shape.offload_weights else 0.0)) / n,
    )


def reference_bytes(model: ModelBytes, shape: TrainingShape, *, card: float | None = None) -> RankBytes:
    """What the rank that holds most has in the reference pass, before there are gradients and states."""
    whole, layer = model.whole, model.largest_layer
    size = whole.size + (shape.reference_weight - shape.weight) * whole.parameters
    scale = size / whole.size
    if shape.engine == "layers":
        largest = max(found.weights for found in _dealt_out(model, shape, card))
        return RankBytes(weights=scale * largest, gradients=0.0, optimizer=0.0)
    ranks = _reference_ranks(size, shape, card)
    at_once = whole.size if shape.gathered_stay else model.around.size + 2 * layer.size
    gathered = scale * at_once if ranks > 1 else 0.0
    if shape.separate_reference or (shape.divides_weights and ranks == 1):
        return RankBytes(weights=size / ranks, gradients=0.0, optimizer=0.0, gathered=gathered)
    # The policy, with what its engine has made by then: DDP's buckets, DeepSpeed's states.
    kept = rank_bytes(model, shape, card=card)
    return RankBytes(
        weights=kept.weights,
        gradients=kept.gradients if shape.has_buckets else 0.0,
        optimizer=kept.optimizer if shape.engine.startswith("zero") else 0.0,
        gathered=gathered,
    )


def _reference_ranks(size: float, shape: TrainingShape, card: float | None) -> int:
    """How many ranks divide a reference of `size` bytes, as `is_divided` in `open_po/model/prepare.py` decides it."""
    if shape.reference_ranks:
        return shape.reference_ranks
    whole = card is None or shape.four_bit or whole_reference_fits(size, card)
    divided = shape.reference_sharding == "on" or (shape.reference_sharding == "auto" and not whole)
    possible = shape.separate_reference or shape.divides_weights
    return shape.ranks if divided and possible else 1


def whole_reference_fits(size: float, card: float) -> bool:
    """Whether each rank has a copy of a reference of `size` bytes, so that none waits for another."""
    return size <= _WHOLE_REFERENCE * card


def whole_gradients_fit(size: float, card: float) -> bool:
    """Whether fsdp adds gradients of `size` bytes up over packs, whole, before it reduces them."""
    return size <= _WHOLE_GRADIENT * card


def _dealt_out(model: ModelBytes, shape: TrainingShape, card: float | None) -> list[RankBytes]:
    """The layers over several devices, what is around them on the first."""
    numbers = share_out([layer.size for layer in model.layers], model.around.size, shape.ranks)
    gradient = gradient_bytes(shape, model.whole.trained, card)
    found = []
    for device in range(shape.ranks):
        own = [layer for layer, number in zip(model.layers, numbers, strict=True) if number == device]
        part = sum(own, model.around if device == 0 else _NOTHING)
        inside = sum(layer.trained for layer in own)
        found.append(
            RankBytes(
                weights=part.size,
                gradients=gradient * part.trained,
                optimizer=_states(shape, inside, part.trained - inside),
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
