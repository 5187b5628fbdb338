"""Models that no rank ever holds as a whole: made without weights, then filled and divided layer by layer.

Rank 0 reads the files, one weight at a time, and sends it to the others; of every layer each rank then keeps its part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from open_po.config import RunConfig
from open_po.distributed.make_engine import divide
from open_po.distributed.parallelism import refuse_contradictions
from open_po.distributed.runtime import Runtime
from open_po.distributed.skeleton import broadcast, without_weights
from open_po.errors import UserError, first_line
from open_po.memory_plan import ModelBytes, WeightBytes, rank_bytes, whole_reference_fits
from open_po.model.load import apply_liger, load_scorer, model_settings, starting_adapters
from open_po.model.lora import add_adapters
from open_po.model.numerics import Numerics
from open_po.model.planning import DeviceType, training_shape
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource, adapter_base, safetensors_files

_CPU = torch.device("cpu")
_TRAINS = 0.75  # share of a device's memory that a whole model and its training may take


class Weights(Mapping[str, Tensor]):
    """A folder's weights by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in safetensors_files(folder):
            file: Any = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> list[int]:
        """The shape of a weight, which is not read for it."""
        shape: list[int] = self._files[name].get_slice(name).get_shape()
        return shape

    def __iter__(self) -> Any:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class HollowModel:
    """A scorer without weights, and what is needed to fill it."""

    def __init__(self, source: ModelSource, numerics: Numerics, runtime: Runtime) -> None:
        self.source, self.numerics, self.runtime = source, numerics, runtime
        folder = source.folder()
        base = adapter_base(folder, source.trust_remote_code)
        self._folder = folder if base is None else base.folder()
        try:
            settings, dropout = model_settings(self._folder, source.trust_remote_code, numerics)
            with without_weights():
                model: PreTrainedModel = AutoModelForCausalLM.from_config(settings.pop("config"), **settings)
            model.tie_weights()  # what was tied in there has got parameters of its own
            if (self._folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(self._folder)
        except Exception as error:  # transformers raises whatever a bad folder makes it
            raise UserError(f"{source.name}: no causal language model can be made ({first_line(error)})") from error
        model.name_or_path = model.config._name_or_path = source.name
        self._names = _make_hollow(model)
        if numerics.use_liger:
            apply_liger(model)
        started_with = starting_adapters(base, numerics)
        scored = add_adapters(model, folder) if started_with == "apart" else model
        self.scorer = Scorer(scored, numerics, dropout, started_with=started_with)
        # The model whose weights `_open` may have to read as a whole: adapters that are apart are here already.
        self._whole = base if base is not None and started_with == "apart" else source
        # Buffers of a model's state that are in its files; the others were computed when it was made.
        saved = model.state_dict()
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers() if name in saved}
        self._kept = [*model.parameters(), *model.buffers()]  # what has gone might leave its identity to another
        self._weights: Mapping[str, Tensor] = {}  # on rank 0, once they are needed
        self._opened = False

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(parameter.numel() for parameter in self.scorer.parameters())

    def fits_whole(self) -> bool:
        """Whether every rank's device has room for a whole copy that only scores; all ranks call this."""
        needed = self.parameters * self.numerics.weights_dtype.itemsize
        return whole_reference_fits(needed, min(self.runtime.gather(self._room())))

    def _room(self) -> int:
        """Bytes that a model may take on this rank."""
        device, runtime = self.runtime.device, self.runtime
        if device.type == "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory)
        return int(psutil.virtual_memory().available // runtime.local_world_size)

    def settle(self, config: RunConfig) -> Runtime:
        """The runtime with the engine for training where nobody asked for one: ddp if that fits, else fsdp.

        All ranks call this. Raises UserError for fields that fsdp does not go with.
        """
        device: DeviceType = "cuda" if self.runtime.device.type == "cuda" else "cpu"
        shape = training_shape(config, device, self.runtime.parallelism)
        # Of adapters, which are small, nothing is known yet.
        trained = 0 if config.model.use_lora else self.parameters
        whole = WeightBytes(
            parameters=self.parameters,
            trained=trained,
            size=float(self.parameters * shape.weight),
            trained_size=float(trained * shape.weight),
        )
        shape = dataclasses.replace(shape, engine="ddp", ranks=self.runtime.world_size)
        needed = rank_bytes(ModelBytes(layers=(), around=whole), shape).kept
        room = min(self.runtime.gather(self._room()))
        if needed <= _TRAINS * room:
            return self.runtime
        self.runtime.say(
            f"Parallel fsdp: weights, gradients and optimizer states take {needed / 1e9:,.1f} GB, a rank has "
            f"{room / 1e9:,.1f} GB"
        )
        parallelism = dataclasses.replace(self.runtime.parallelism, kind="fsdp", is_free=False)
        refuse_contradictions(parallelism, config)
        return dataclasses.replace(self.runtime, parallelism=parallelism)

    def divided(self) -> Scorer:
        """The scorer with its weights, divided to score only: within each node if it fits there, else among all ranks.

        All ranks call this.
        """
        team = self.runtime
        needed = self.parameters * self.numerics.weights_dtype.itemsize
        if team.nodes > 1 and whole_reference_fits(needed, min(team.gather(self._room())) * team.local_world_size):
            team = team.of_node()
        self.scorer.place(divide(self.scorer, self.scorer.decoder_layers(), self.fill, team))
        return self.scorer

    def fill(self, unit: nn.Module) -> None:
        """Give the weights in `unit` that have none their values, on the device; all ranks call this alike."""
        if not self._opened:  # before any rank waits for a weight: what is wrong with the files is told on all of them
            self._opened = True
            self.runtime.on_main(self._open)
        filled: dict[int, nn.Parameter] = {}
        for module in unit.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
                    continue  # divided already
                if id(parameter) not in filled:
                    filled[id(parameter)] = self._real(parameter)
                module._parameters[name] = filled[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = self._sent(buffer, self._buffers.get(id(buffer)))

    def _real(self, parameter: nn.Parameter) -> nn.Parameter:
        value = self._sent(parameter.detach(), self._names.get(id(parameter)))
        return nn.Parameter(value, requires_grad=parameter.requires_grad)

    def _sent(self, value: Tensor, name: str | None) -> Tensor:
        """Rank 0's `value` on every rank's device, from the files if it has a `name` in them."""
        runtime = self.runtime
        sent = torch.empty(value.shape, dtype=value.dtype, device=runtime.device)
        if runtime.is_main:
            sent.copy_(value if name is None else self._weights[name])
        broadcast(sent, runtime)
        return sent

    def _open(self) -> None:
        """Have the weights by their names in the model: in its files if they have these names, else in host memory."""
        try:
            weights = Weights(self._folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.source.name}: its weights cannot be read ({first_line(error)})") from error
        wanted = {name: list(parameter.shape) for name, parameter in self._hollow()}
        if self.scorer.started_with != "merged" and all(
            name in weights and weights.shape(name) == shape for name, shape in wanted.items()
        ):
            self._weights = weights
            return
        self.runtime.say(f"{self.source.name}: the files name weights in another way; rank 0 reads all of them first")
        self._weights = load_scorer(self._whole, self.numerics, _CPU).base.state_dict()

    def _hollow(self) -> list[tuple[str, Tensor]]:
        tensors = [*self.scorer.parameters(), *self.scorer.buffers()]
        names = self._names | self._buffers
        return [(names[id(tensor)], tensor) for tensor in tensors if id(tensor) in names]


def _make_hollow(model: PreTrainedModel) -> dict[int, str]:
    """Put in place of every weight one on the host that has its shape and no memory; the names by identity.

    On the host, where adapters that are added find the device to be made on.
    """
    hollow: dict[int, nn.Parameter] = {}
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in hollow:
                empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                hollow[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                names[id(hollow[id(parameter)])] = f"{prefix}.{name}" if prefix else name
            module._parameters[name] = hollow[id(parameter)]
    return names
