"""Which layers of a model are like one another, so that a few of them stand for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_LONGEST_PERIOD, _LONGEST_START = 8, 4


@dataclass(frozen=True)
class RepeatedLayers:
    """Two depths of a model, and how often what one has more than the other is to be added for the whole."""

    few: int
    more: int
    repeats: int

    @staticmethod
    def of(layers: Sequence[nn.Module], config: Any, checkpoint_every: int) -> RepeatedLayers:
        """After a start of its own a model repeats a period of layers; both depths end as the whole does."""
        kinds = _kinds(layers, config, checkpoint_every)
        count = len(kinds)
        for start in range(min(_LONGEST_START, count)):
            for period in range(1, _LONGEST_PERIOD + 1):
                few = start + (count - start) % period + (3 if period == 1 else 2 * period)
                if few + period >= count:
                    continue
                if all(kinds[i] == kinds[i + period] for i in range(start, count - period)):
                    return RepeatedLayers(few, few + period, (count - few) // period)
        return RepeatedLayers(count, count, 0)

    def extend(self, measure: Callable[[int], Sequence[float]]) -> list[float]:
        """What `measure` would give for the whole model."""
        few = measure(self.few)
        if not self.repeats:
            return list(few)
        return [low + (high - low) * self.repeats for low, high in zip(few, measure(self.more), strict=True)]


def _kinds(layers: Sequence[nn.Module], config: Any, checkpoint_every: int) -> list[Any]:
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or [None] * len(layers)
    return [
        (
            type(layer),
            tuple((name, weight.shape, weight.requires_grad) for name, weight in layer.named_parameters()),
            kind,
            checkpoint_every and number % checkpoint_every,
        )
        for number, (layer, kind) in enumerate(zip(layers, types, strict=True))
    ]


def with_layers(config: Any, count: int) -> Any:
    """The configuration of the same model with its first `count` layers alone."""
    text = config.get_text_config(decoder=True)
    if count == text.num_hidden_layers:
        return config
    content = config.to_dict()
    inner = content if text is config else next(v for v in content.values() if _is_of(v, text))
    for name, value in inner.items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            inner[name] = value[:count]
    inner[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = count
    return type(config).from_dict(content)


def _is_of(value: Any, text: Any) -> bool:
    return isinstance(value, dict) and value.get("model_type") == text.model_type
