"""A trained model as a folder that `transformers` loads, written weight by weight."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from open_po.distributed.engine import Placement
from open_po.model import four_bit
from open_po.model.scorer import Scorer

_SHARD_BYTES = 5 * 10**9  # of a file of weights, which rank 0 holds while it collects them


def export_model(scorer: Scorer, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """Write a model in `dtype` that `AutoModelForCausalLM.from_pretrained(folder)` loads, and its tokenizer.

    All ranks call this, one of them with the folder, which is made; the others hand it their parts of the weights, one
    after another. The model in memory stays as it is and can go on training. Weights in 4 bits are written as what they
    stand for, and adapters merged into that: it is the model that was trained. Adapters are written to `folder/adapter`
    too, but for those on top of merged ones: what they belong to is no model that their file could name. Raises OSError
    on the rank that writes, when all have come to the end.
    """
    adapter = _adapter_weights(scorer) if scorer.saves_adapters else None
    weights = exported_weights(scorer, dtype)
    try:
        if folder is not None:
            folder.mkdir(exist_ok=True)
            if adapter is not None:
                _write_adapter(scorer, adapter, folder / "adapter")
            _write_all_but_weights(scorer, dtype, folder)
            tokenizer.save_pretrained(folder)
            _write_weights(weights, folder)
    finally:
        for _ in weights:  # the others go through all of them, whatever became of the disk
            pass


def export_adapter(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """As `export_model`, of the adapters, in `folder` itself, and the tokenizer alone."""
    adapter = _adapter_weights(scorer)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        _write_adapter(scorer, adapter, folder)
        tokenizer.save_pretrained(folder)


def _write_adapter(scorer: Scorer, weights: dict[str, Tensor], folder: Path) -> None:
    cast(Any, scorer.model).save_pretrained(folder, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in


def _adapter_weights(scorer: Scorer) -> dict[str, Tensor]:
    """The adapters' weights on the host, by their names in `peft`."""
    named = [(name, parameter) for name, parameter in scorer.model.named_parameters() if parameter.requires_grad]
    return {name: scorer.placement.whole(parameter).to("cpu") for name, parameter in named}


def _write_all_but_weights(scorer: Scorer, dtype: torch.dtype, folder: Path) -> None:
    """The model's configuration, that of its generation, and its own code if it has any."""
    model = scorer.base
    own = model.config
    exported = copy.deepcopy(own)
    for name, rate in scorer.saved_dropout.items():
        setattr(exported, name, rate)
    # The weights are whole already, and this rank is alone here; none of them is in 4 bits in the files.
    for name in ("distributed_config", "quantization_config"):
        vars(exported).pop(name, None)
    quantizer = vars(model).pop("hf_quantizer", None)  # it would write the weights, in 4 bits, after all
    try:
        model.config = exported
        model.save_pretrained(folder, state_dict={})
    finally:
        model.config = own
        if quantizer is not None:
            model.hf_quantizer = quantizer
    # In place of the dtype in memory, which `save_pretrained` writes
    exported.dtype = str(dtype).removeprefix("torch.")
    exported.save_pretrained(folder)


def _write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Files of at most `_SHARD_BYTES`, or of one weight, each written when it is full; with an index if several."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = parameters = total = 0

    def write() -> None:
        shards.append(list(held))
        save_file(held, folder / _shard_name(len(shards), 0), metadata={"format": "pt"})
        held.clear()

    for name, weight in weights:
        if held and size + weight.nbytes > _SHARD_BYTES:
            write()
            size = 0
        held[name] = weight.contiguous()
        size, total, parameters = size + weight.nbytes, total + weight.nbytes, parameters + weight.numel()
    write()
    if len(shards) == 1:
        (folder / _shard_name(1, 0)).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = _shard_name(number, len(shards))
        (folder / _shard_name(number, 0)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shard_name(number: int, of: int) -> str:
    return f"model-{number:05}-of-{of:05}.safetensors"


def exported_weights(scorer: Scorer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in a file of `transformers`, in `dtype` on the host, adapters merged into it.

    All ranks go through this together; each holds one whole weight at a time, or one whole layer where files divide or
    join a layer's weights (all of them if they join those of several layers).
    """
    model = scorer.base
    stored = list(_stored(scorer))
    hollow = {weight.name: weight.hollow() for weight in stored}
    as_saved = _shapes(revert_weight_conversion(model, dict(hollow)))
    of_layers = [revert_weight_conversion(model, dict(group)) for _, group in groupby(hollow.items(), key=_layer)]
    if as_saved == _shapes(hollow):
        groups = [[weight] for weight in stored]
    elif as_saved == {name: shape for layer in of_layers for name, shape in _shapes(layer).items()}:
        groups = [list(group) for _, group in groupby(stored, key=lambda weight: _layer((weight.name, weight.tensor)))]
    else:
        groups = [stored]
    for group in groups:
        whole = {weight.name: weight.whole(dtype, scorer.placement) for weight in group}
        yield from revert_weight_conversion(model, whole).items()


@dataclass(frozen=True)
class _Stored:
    """A weight as the model has it."""

    name: str  # in the model, without adapters
    tensor: Tensor  # of which this rank may hold a part
    adapted: tuple[Any, str] | None  # the layer whose adapter is to be merged into it, and the weight's name in that
    in_four: Any = None  # the layer that has it in 4 bits

    def hollow(self) -> Tensor:
        """One of its shape, without memory."""
        shape = getattr(self.tensor, "ds_shape", self.tensor.shape)  # ZeRO-3's parts have another one
        if self.in_four is not None:
            shape = four_bit.full_shape(self.in_four)
        return torch.empty(shape, dtype=self.tensor.dtype, device="meta")

    def whole(self, dtype: torch.dtype, placement: Placement) -> Tensor:
        """The weight on the host; all ranks call this."""
        if self.in_four is not None:
            layer = self.in_four
            full = (
                four_bit.full_weight(layer) if self.adapted is None else four_bit.merged_weight(self.adapted[0], dtype)
            )
            whole = four_bit.as_in_files(full, layer)
        elif self.adapted is not None:
            whole = _merged(*self.adapted, dtype, placement)
        else:
            whole = placement.whole(self.tensor)
        return whole.to("cpu", dtype if whole.is_floating_point() else whole.dtype)


def _stored(scorer: Scorer) -> Iterator[_Stored]:
    """Every weight that is saved; one that two names share comes once, under the first: loading ties them again."""
    adapted = _adapted_layers(scorer)
    in_four = {f"{name}.weight": layer for name, layer in four_bit.four_bit_layers(scorer.base)}
    of_adapters = _adapter_tensors(adapted.values())
    unsaved = scorer.base._keys_to_ignore_on_save or ()
    seen: set[int] = set()
    for name, tensor in scorer.base.state_dict(keep_vars=True).items():
        owner = next((layer for layer in adapted if name.startswith(f"{layer}.")), None)
        scales_of, is_scale, _ = name.partition(".weight.")
        if id(tensor) in seen or name in unsaved or (is_scale and f"{scales_of}.weight" in in_four):
            continue
        if owner is None:
            seen.add(id(tensor))
            yield _Stored(name, tensor, None, in_four.get(name))
        elif id(tensor) not in of_adapters:  # these are in what they are merged into
            seen.add(id(tensor))
            inside = name.removeprefix(f"{owner}.").replace("base_layer.", "")  # of experts an adapter wraps another
            layer = in_four.get(name)
            # Beside a weight in 4 bits stands a bias, which has no adapter.
            merges = layer is not None or f"{owner}.base_layer.weight" not in in_four
            yield _Stored(f"{owner}.{inside}", tensor, (adapted[owner], inside) if merges else None, layer)


def _adapter_tensors(layers: Iterable[Any]) -> set[int]:
    """The identities of all that layers with adapters hold besides their base layers' own."""
    every = {id(tensor) for layer in layers for tensor in layer.state_dict(keep_vars=True).values()}
    return every - {
        id(tensor) for layer in layers for tensor in layer.get_base_layer().state_dict(keep_vars=True).values()
    }


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _layer(named: tuple[str, Tensor]) -> str:
    """The layer that a weight is of, `model.layers.3` for example; its own name if it is of none."""
    found = re.match(r".*?\.\d+(?=\.)", named[0])
    return found[0] if found else named[0]


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
    adapter = merged
    while hasattr(adapter, "base_layer"):  # of a mixture's experts each weight's adapter wraps that of another
        adapter.merge()
        adapter = adapter.base_layer
    return cast(Tensor, merged.get_base_layer().state_dict()[name])
