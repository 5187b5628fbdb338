"""The weights of a model by layer, as a memory plan counts them."""

from __future__ import annotations

from torch import Tensor, nn

from open_po.memory_plan import ModelBytes, WeightBytes
from open_po.model.rehearsed_four_bit import FourBitLinear
from open_po.model.scorer import Scorer


def model_bytes(scorer: Scorer) -> ModelBytes:
    """Those of a whole model, however ranks may divide it."""
    layers = scorer.decoder_layers()
    numbers = {id(m.weight): m.numbers for m in scorer.modules() if isinstance(m, FourBitLinear)}
    seen: set[int] = set()

    def of(module: nn.Module) -> WeightBytes:
        weights = [weight for weight in module.parameters() if id(weight) not in seen]
        seen.update(map(id, weights))
        trained = [weight for weight in weights if weight.requires_grad]
        return WeightBytes(
            parameters=sum(numbers.get(id(weight), _count(weight)) for weight in weights),
            trained=sum(map(_count, trained)),
            size=float(sum(_count(weight) * weight.itemsize for weight in weights)),
            trained_size=float(sum(_count(weight) * weight.itemsize for weight in trained)),
        )

    return ModelBytes(layers=tuple(map(of, layers)), around=of(scorer))


def _count(weight: Tensor) -> int:
    """Numbers of the whole weight; DeepSpeed leaves empty tensors where it divides."""
    return int(getattr(weight, "ds_numel", weight.numel()))
