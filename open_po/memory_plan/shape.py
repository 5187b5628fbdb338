"""The plain facts that a memory plan is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

EngineName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "layers"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """All that decides how much memory training takes, besides the model.

    `training_shape` (`open_po/model/planning.py`) makes it from a configuration.
    """

    device: Literal["cuda", "cpu"]
    engine: EngineName = "single"
    ranks: int = 1
    # Bytes of one number
    weight: int = 4  # of a weight that is no adapter
    compute: int = 4
    gradient: float = 4.0  # of a trained weight's gradient, which several packs of a step add up in
    gradient_alone: float = 4.0  # of one that a single pack leaves
    gradient_shrinks: bool = False  # `gradient` is 2 where float32 would take too much of the card
    optimizer: float = 8.0  # states of a trained weight on the device
    optimizer_of_layers: float | None = None  # the same in the layers, where it differs
    optimizer_host: float = 0.0  # and in the host's memory
    four_bit: bool = False  # the layers' frozen matrices are kept in NF4
    # How a step goes
    # A gradient leaves as soon as it is complete, in steps of one pack of one process: into the weights, or to the host
    gradients_leave: bool = False
    offload_weights: bool = False  # a rank's part of the weights waits in the host's memory
    gathered_stay: bool = False  # under fsdp: weights stay whole from a layer's forward pass to its backward pass
    checkpoint_every: int = 0  # each so many layers' activations are made again in the backward pass; 0: none
    offload_activations: bool = False
    liger: bool = False
    layout: Literal["shared", "unshared", "rows"] = "shared"
    short_last_layer: bool = True  # where the model can: computed for scored tokens only
    # Its data
    prompt_tokens: int = 1024  # of a typical pair
    response_tokens: int = 1024
    scored_prompt: float = 0.0  # share of a prompt's tokens that are scored too
    pairs_of_rank: int = 1  # of one step
    max_tokens: int = 8192  # of a pack
    reference_tokens: int = 8192  # of a pack of the reference pass
    # The reference
    separate_reference: bool = False  # another model, or another copy: loaded before the policy, and gone then
    no_reference: bool = False
    reference_weight: int = 4  # bytes of one of its weights, if that is no adapter
    reference_sharding: Literal["auto", "on", "off"] = "auto"  # auto: ranks divide it where a whole copy does not fit
    reference_ranks: int = 0  # that do, 1 if each has a copy; 0: not known, so as `reference_sharding` says

    @property
    def pair_tokens(self) -> int:
        """Tokens of the typical pair, as it is laid out."""
        prompts = 1 if self.layout == "shared" else 2
        return prompts * self.prompt_tokens + 2 * self.response_tokens

    @property
    def divides_weights(self) -> bool:
        """Whether no rank holds the whole policy."""
        return self.engine in ("fsdp", "zero3")

    @property
    def packs(self) -> int:
        """Packs of a rank's step, if all pairs are typical ones."""
        return math.ceil(self.pairs_of_rank / max(1, self.max_tokens // self.pair_tokens))

    @property
    def several_packs(self) -> bool:
        """Whether gradients of one pack are there while another is computed."""
        return self.packs > 1

    @property
    def has_buckets(self) -> bool:
        """Whether gradients have their place from the start: DDP's buckets, in which packs add up too."""
        return self.engine == "ddp" and self.gradient_alone == 4

    @property
    def gradients_whole(self) -> bool:
        """Whether all gradients are there at the end of a step's passes."""
        return self.several_packs or not (self.gradients_leave and self.engine in ("single", "layers"))


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """The weights of a part of a model."""

    parameters: int  # as many as the architecture has, whatever they are packed into
    trained: int
    size: float  # bytes as they are kept, those that train included
    trained_size: float

    def __add__(self, other: WeightBytes) -> WeightBytes:
        return WeightBytes(
            parameters=self.parameters + other.parameters,
            trained=self.trained + other.trained,
            size=self.size + other.size,
            trained_size=self.trained_size + other.trained_size,
        )


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """A model's weights: those of each decoder layer, and what is around the layers."""

    layers: tuple[WeightBytes, ...]
    around: WeightBytes

    @property
    def whole(self) -> WeightBytes:
        return sum(self.layers, self.around)

    @property
    def largest_layer(self) -> WeightBytes:
        return max(self.layers, key=lambda layer: layer.size, default=self.around)


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """What one pack holds on the device besides weights, whole gradients and optimizer states, by moments."""

    tokens: int
    activations: float  # when the last layer has been computed: what the backward pass needs, the head not yet
    head_peak: float  # most, until the backward pass reaches the layers
    layers_peak: float  # most, from there on

    @property
    def peak(self) -> float:
        return max(self.head_peak, self.layers_peak)

    def towards(self, other: PassBytes, share: float) -> PassBytes:
        """Those of a number of tokens that lies by `share` between this one and `other`'s, or behind it."""

        def mixed(low: float, high: float) -> float:
            return low + share * (high - low)

        return PassBytes(
            tokens=round(mixed(self.tokens, other.tokens)),
            activations=mixed(self.activations, other.activations),
            head_peak=mixed(self.head_peak, other.head_peak),
            layers_peak=mixed(self.layers_peak, other.layers_peak),
        )
