"""A trained model as a folder that `transformers` loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from open_po.distributed.engine import Placement
from open_po.model.scorer import Scorer


@dataclass(frozen=True)
class WholeWeights:
    """A model's weights as they are saved, on the host."""

    dtype: torch.dtype
    model: dict[str, Tensor]  # by their names in `transformers`, adapters merged into them
    adapter: dict[str, Tensor] | None  # by their names in `peft`, if the adapters are saved by themselves too


def gather_weights(scorer: Scorer, dtype: torch.dtype, *, keep: bool) -> WholeWeights:
    """The weights that a model is saved with, in `dtype`; all ranks call this, and those that `keep` them get them all.

    Adapters on top of merged ones are only merged: what they belong to is no model that their file could name. Weights
    that are on a GPU, or have another dtype, are copied to the host's memory.
    """
    model = {name: weight for name, weight in exported_weights(scorer, dtype) if keep}
    adapter = None
    if scorer.has_adapters and not scorer.holds_adapters:
        adapter = {}
        for name, parameter in scorer.model.named_parameters():
            if parameter.requires_grad:
                whole = scorer.placement.whole(parameter)
                if keep:
                    adapter[name] = whole.to("cpu")
    return WholeWeights(dtype, model, adapter)


def export_model(scorer: Scorer, weights: WholeWeights, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model that `AutoModelForCausalLM.from_pretrained(folder)` loads, and its tokenizer.

    The model in memory stays as it is and can go on training. Adapters are written to `folder/adapter` too.
    """
    if weights.adapter is not None:
        cast(Any, scorer.model).save_pretrained(folder / "adapter", state_dict=weights.adapter)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    model = scorer.base
    own = model.config
    exported = copy.deepcopy(own)
    for name, rate in scorer.saved_dropout.items():
        setattr(exported, name, rate)
    vars(exported).pop("distributed_config", None)  # the weights are whole already, and this rank is alone here
    try:
        model.config = exported
        model.save_pretrained(folder, state_dict=weights.model)
    finally:
        model.config = own
    # In place of the dtype in memory, which `save_pretrained` writes
    exported.dtype = str(weights.dtype).removeprefix("torch.")
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exported_weights(scorer: Scorer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model by its name in `transformers`, in `dtype` on the host, adapters merged into it.

    A weight that two names share comes once, under the first: loading ties them again. All ranks go through this
    together; each holds one whole weight at a time.
    """
    adapted = _adapted_layers(scorer)
    seen: set[int] = set()
    for name, tensor in scorer.base.state_dict(keep_vars=True).items():
        owner = next((layer for layer in adapted if name.startswith(f"{layer}.")), None)
        if id(tensor) in seen or (owner is not None and not name.startswith(f"{owner}.base_layer.")):
            continue  # the adapter's own weights are in what they are merged into
        seen.add(id(tensor))
        if owner is not None:
            inside = name.removeprefix(f"{owner}.base_layer.")
            name, whole = f"{owner}.{inside}", _merged(adapted[owner], inside, dtype, scorer.placement)
        else:
            whole = scorer.placement.whole(tensor)
        yield name, whole.to("cpu", dtype if whole.is_floating_point() else whole.dtype)


def _adapted_layers(scorer: Scorer) -> dict[str, Any]:
    """The layers with an adapter, by name in the model."""
    if not scorer.has_adapters:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in scorer.base.named_modules() if isinstance(module, BaseTunerLayer)}


def _merged(layer: Any, name: str, dtype: torch.dtype, placement: Placement) -> Tensor:
    """The weight `name` of an adapted layer with the adapter merged into it, as peft does it, in a copy."""
    # The copy has whole weights in place of the parts that this rank may hold.
    whole: dict[int, Any] = {
        id(parameter): nn.Parameter(placement.whole(parameter).clone(), requires_grad=False)
        for parameter in layer.parameters()
    }
    merged = copy.deepcopy(layer, whole)
    if dtype == torch.float32:  # a bfloat16 base would round the sum that float32 is asked for
        merged.to(dtype=dtype)
    merged.merge()
    return cast(Tensor, merged.get_base_layer().state_dict()[name])
