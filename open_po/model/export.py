"""A trained model as a folder that `transformers` loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from open_po.model.scorer import Scorer


def export_model(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write a model that `AutoModelForCausalLM.from_pretrained(folder)` loads, and its tokenizer.

    The model in memory stays as it is and can go on training. Adapters are written to `folder/adapter` and merged into
    what is written. Those on top of merged ones are only merged: what they belong to is no model that their file could
    name. Weights that are on a GPU, or have another dtype, are copied to the host's memory.
    """
    if scorer.has_adapters and not scorer.holds_adapters:
        cast(Any, scorer.model).save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    model = scorer.base
    own = model.config
    exported = copy.deepcopy(own)
    for name, rate in scorer.saved_dropout.items():
        setattr(exported, name, rate)
    try:
        model.config = exported
        model.save_pretrained(folder, state_dict=dict(exported_weights(scorer, dtype)))
    finally:
        model.config = own
    exported.dtype = str(dtype).removeprefix("torch.")  # in place of that in memory, which `save_pretrained` writes
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exported_weights(scorer: Scorer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model by its name in `transformers`, in `dtype` on the host, adapters merged into it.

    A weight that two names share comes once, under the first: loading ties them again.
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
            name, tensor = f"{owner}.{inside}", _merged(adapted[owner], inside, dtype)
        yield name, tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _adapted_layers(scorer: Scorer) -> dict[str, Any]:
    """The layers with an adapter, by name in the model."""
    if not scorer.has_adapters:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in scorer.base.named_modules() if isinstance(module, BaseTunerLayer)}


def _merged(layer: Any, name: str, dtype: torch.dtype) -> Tensor:
    """The weight `name` of an adapted layer with the adapter merged into it, as peft does it, in a copy."""
    merged = copy.deepcopy(layer)
    if dtype == torch.float32:  # a bfloat16 base would round the sum that float32 is asked for
        merged.to(dtype=dtype)
    merged.merge()
    return cast(Tensor, merged.get_base_layer().state_dict()[name])
