"""A plan: what each part takes on a rank's device at the moment of most, and the budget that fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from open_po.memory_plan.shape import ModelBytes, PassBytes, TrainingShape
from open_po.memory_plan.states import RankBytes, rank_bytes, reference_bytes

# What is taken before the first tensor: CUDA's context and the libraries' kernels; on a CPU the program and its
# libraries. Not seen by torch.cuda.max_memory_allocated.
CONTEXT_BYTES = {"cuda": 0.8e9, "cpu": 0.6e9}
_USABLE = 0.97  # of a card's memory; the rest is the driver's
FRAGMENTED = 0.06  # of what comes and goes, which the allocator cannot hand out again at once
_WORKSPACE = 34e6  # that cuBLAS keeps, on a Hopper card
_OFFLOADING = 2 * 2**28  # on the way to the host and back, see model/offload.py
_CHANGING = ("gathered", "activations", "head", "layers")
_STEP, _FIRST, _MOST = 256, 8192, 2**18  # tokens: a budget is a multiple of the first, the search begins at the second
_CLOSE, _TRIES = 0.005, 12
_KNOTS = 2048, 4  # tokens at which passes are computed for the search: the first, and by what each is larger


def usable(card: float) -> float:
    """Bytes that a run may take of a card that has so many; whether it fits, and which budget fills it, go by them."""
    return _USABLE * card


class Passes(Protocol):
    """What a forward and backward pass of so many tokens holds, and a forward pass that only scores."""

    def training(self, tokens: int) -> PassBytes: ...

    def scoring(self, tokens: int) -> float: ...


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of the rank that holds most. What it says is predicted, nothing is measured."""

    shape: TrainingShape
    model: ModelBytes
    passes: Passes
    card: float | None = None  # bytes of the device, if known: fsdp's choice depends on it

    @cached_property
    def rank(self) -> RankBytes:
        """What stays from pack to pack."""
        return rank_bytes(self.model, self.shape, card=self.card)

    @cached_property
    def parts(self) -> dict[str, float]:
        """Bytes by name, in training, at the moment of most; they add up to `total`."""
        return self._parts(self.shape.max_tokens)

    @property
    def total(self) -> float:
        """Bytes of the device that training takes."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        """What of it torch allocates: what torch.cuda.max_memory_allocated will say."""
        return self.total - self.parts["context"] - self.parts["fragmentation"]

    @cached_property
    def reference_parts(self) -> dict[str, float]:
        """Bytes by name of the pass that computes the reference's log-probs, 0 without one."""
        return self._reference_parts(self.shape.reference_tokens)

    @property
    def reference_total(self) -> float:
        return sum(self.reference_parts.values())

    @property
    def peak(self) -> float:
        """Bytes of the device that the whole run takes."""
        return max(self.total, self.reference_total)

    def fits(self, room: float) -> bool:
        """Whether training and the reference pass go into `room` bytes of the device."""
        return self.peak <= room

    def tokens_that_fill(self, room: float) -> int:
        """The largest `max_tokens_per_batch` whose training fits into `room` bytes; 0 if not even small packs do."""
        lines = replace(self, passes=_Lines(self.passes))
        return _largest(lambda tokens: sum(lines._parts(tokens).values()), room)

    def reference_tokens_that_fill(self, room: float) -> int:
        """The largest `reference_max_tokens_per_batch` that fits into `room` bytes."""
        lines = replace(self, passes=_Lines(self.passes))
        return _largest(lambda tokens: sum(lines._reference_parts(tokens).values()), room)

    def rehearse(self) -> None:
        """Compute what there is to know. Raises what the model's own code raises."""
        self._parts(self.shape.max_tokens)
        self._reference_parts(self.shape.reference_tokens)

    def _parts(self, tokens: int) -> dict[str, float]:
        """The parts at whichever moment has most: while a pack is computed, or when its gradients are all there."""
        shape = replace(self.shape, max_tokens=tokens)
        rank = rank_bytes(self.model, shape, card=self.card)
        found = self.passes.training(max(tokens, shape.pair_tokens))  # a pair that needs more goes alone
        activations = rank.layer_share * found.activations
        head = max(0.0, found.head_peak - found.activations)
        layers = max(0.0, found.layers_peak - found.activations - head)
        kept = {"weights": rank.weights, "gradients": rank.gradients, "optimizer": rank.optimizer}
        # Of a step of one pack the gradients come as the activations go, unless they have their place.
        there = shape.several_packs or shape.has_buckets or not shape.gradients_whole
        before = kept if there else kept | {"gradients": 0.0}
        begins = before | {"gathered": rank.gathered, "activations": activations, "head": head, "layers": layers}
        ends = kept | {"gathered": rank.gathered_at_end, "activations": 0.0, "head": 0.0, "layers": 0.0}
        return self._with_overheads(max(begins, ends, key=lambda parts: sum(parts.values())))

    def _with_overheads(self, parts: dict[str, float]) -> dict[str, float]:
        changing = sum(size for name, size in parts.items() if name in _CHANGING)
        workspace = _WORKSPACE + _OFFLOADING * self.shape.offload_activations
        return parts | {
            "workspace": workspace if self.shape.device == "cuda" else 0.0,
            "fragmentation": FRAGMENTED * changing,
            "context": CONTEXT_BYTES[self.shape.device],
        }

    def _reference_parts(self, tokens: int) -> dict[str, float]:
        shape = self.shape
        if shape.no_reference:
            return {}
        held = reference_bytes(self.model, shape, card=self.card)
        kept = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
        scoring = self.passes.scoring(max(tokens, shape.prompt_tokens + shape.response_tokens))
        return self._with_overheads(kept | {"gathered": held.gathered, "activations": scoring})


@dataclass(frozen=True)
class _Lines:
    """Passes that are computed at a few numbers of tokens; between them bytes grow as a line."""

    passes: Passes

    def training(self, tokens: int) -> PassBytes:
        low, high, share = _between(tokens)
        return self.passes.training(low).towards(self.passes.training(high), share)

    def scoring(self, tokens: int) -> float:
        low, high, share = _between(tokens)
        at_low, at_high = self.passes.scoring(low), self.passes.scoring(high)
        return at_low + share * (at_high - at_low)


def _between(tokens: int) -> tuple[int, int, float]:
    """The numbers below and above at which passes are computed, and how far from the first one `tokens` is."""
    high = _KNOTS[0]
    while high < tokens:
        high *= _KNOTS[1]
    low = high // _KNOTS[1]
    return low, high, (tokens - low) / (high - low)


def _largest(size: Callable[[int], float], room: float) -> int:
    """The largest number of tokens whose `size` is within `room`, to `_CLOSE` of it; 0 if there is none."""
    low, at_low, high, at_high = 0, 0.0, 0, 0.0  # fits; does not, 0: not known yet
    tokens = _FIRST
    for _ in range(_TRIES):
        taken = size(tokens)
        if taken <= room:
            low, at_low = tokens, taken
        else:
            high, at_high = tokens, taken
        if not low:
            tokens //= 4
        elif not high:
            tokens *= 4
        else:
            share = (room - at_low) / (at_high - at_low)  # it grows about as a line
            tokens = int(low + share * (high - low)) // _STEP * _STEP
        if tokens <= low or tokens > _MOST or (low and room - at_low <= _CLOSE * room) or tokens < _STEP:
            break
    return low
