"""A model's training step without weights, data or a GPU: the same code on tensors that have shapes and no memory.

It says what one pack holds, for any architecture and any option, in a second or two. A few layers are computed, and
the others counted like those that they repeat.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel

from open_po.config import ModelConfig
from open_po.data import PreferencePair
from open_po.distributed.skeleton import without_weights
from open_po.errors import UserError, first_line
from open_po.memory_plan import PassBytes, TrainingShape
from open_po.model.activations import checkpoint_gradients
from open_po.model.attention import MissingSegments, count_calls
from open_po.model.ledger import Ledger
from open_po.model.load import apply_liger, model_settings
from open_po.model.lora import attach_like, attach_lora
from open_po.model.mlp_tiles import tile_mlps
from open_po.model.model_bytes import model_bytes
from open_po.model.numerics import Numerics
from open_po.model.rehearsed_four_bit import keep_in_four_bits
from open_po.model.repeated_layers import RepeatedLayers, with_layers
from open_po.model.saved_tensors import SavedTensors
from open_po.model.scorer import Scorer
from open_po.model.stand_in import GPU, as_on_cuda
from open_po.packing import Group, PackedBatch, group_pairs, pack, pack_responses

_warm: list[bool] = []
_PAIRS = 32  # most that are laid out
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Rehearsal:
    """What the passes of one model hold, trained in one way."""

    def __init__(self, folder: Path, config: ModelConfig, shape: TrainingShape, adapters: Path | None = None) -> None:
        """`folder` has the model's config.json; of `config` the adapters are read, unless a folder has them.

        Raises UserError.
        """
        self.config, self.shape, self._adapters = config, shape, adapters
        self.numerics = Numerics(
            compute_dtype=_DTYPES[shape.compute], weights_dtype=_DTYPES[shape.weight], use_liger=shape.liger
        )
        self._reference = dataclasses.replace(self.numerics, weights_dtype=_DTYPES[shape.reference_weight])
        self._mode = FakeTensorMode()
        try:
            self._settings, _ = model_settings(folder, config.trust_remote_code, self.numerics)
            with self._scorer(self._settings["config"], self.numerics) as whole:
                self.model = model_bytes(whole)
                layers = whole.decoder_layers()
        except UserError:
            raise
        except Exception as error:  # transformers raises whatever a bad folder makes it
            name = config.model_name_or_path
            raise UserError(f"{name}: no causal language model can be made ({first_line(error)})") from error
        self._layers = RepeatedLayers.of(layers, self._settings["config"], shape.checkpoint_every)
        self._half = _PAIRS // 2 * shape.pair_tokens
        self._training: dict[int, PassBytes] = {}
        self._scoring: dict[int, float] = {}
        if shape.liger and not _warm:  # its first calls import what is kept with what they were called with
            _warm.append(True)
            with suppress(Exception):  # which is told when it matters
                self._train(self._layers.few, 64)

    def training(self, tokens: int) -> PassBytes:
        """What a pack of `tokens` holds in training."""
        if tokens > 2 * self._half:  # many short pairs take long to lay out, and are like fewer of them
            return self.training(self._half).towards(self.training(2 * self._half), tokens / self._half - 1)
        if tokens not in self._training:
            activations, head, layers = self._layers.extend(lambda depth: self._train(depth, tokens))
            self._training[tokens] = PassBytes(
                tokens=tokens, activations=activations, head_peak=head, layers_peak=layers
            )
        return self._training[tokens]

    def scoring(self, tokens: int) -> float:
        """Most that a pack of `tokens` holds in the reference pass."""
        if tokens > 2 * self._half:
            low, high = self.scoring(self._half), self.scoring(2 * self._half)
            return low + (tokens / self._half - 1) * (high - low)
        if tokens not in self._scoring:
            self._scoring[tokens] = self._score(
                self._layers.more, tokens
            )  # one layer after another: as many as need be
        return self._scoring[tokens]

    def _train(self, depth: int, tokens: int) -> tuple[float, float, float]:
        """Bytes of a model of `depth` layers when its body is computed, most until it goes back there, and after."""
        moments: list[float] = []
        batch = self._batch(tokens)
        with self._scorer(with_layers(self._settings["config"], depth), self.numerics) as scorer:
            known = [*scorer.parameters(), *scorer.buffers(), *self._gradients(scorer), *_tensors(batch)]
            ledger = Ledger(known)

            def note(module: nn.Module, args: Any, output: Any) -> None:
                moments.append(ledger.live)
                output.last_hidden_state.register_hook(lambda _: moments.append(ledger.peak_from_now()))

            scorer.base.base_model.register_forward_hook(note)
            with self._running(scorer, ledger):
                with _offloaded(known) if self.shape.offload_activations else nullcontext():
                    logps = scorer.score(batch).logps
                (logps.chosen - logps.rejected).sum().backward()
        activations, head = moments
        return activations, head, float(ledger.peak)

    def _gradients(self, scorer: Scorer) -> list[Tensor]:
        """Those of earlier packs, which those of this one are added to; none where each is used up and gone."""
        trained = [weight for weight in scorer.parameters() if weight.requires_grad]
        if not self.shape.gradients_whole:
            for weight in trained:
                weight.register_post_accumulate_grad_hook(_forget_gradient)
            return []
        with self._mode:
            for weight in trained:
                weight.grad = torch.empty_like(weight)
        return [weight.grad for weight in trained if weight.grad is not None]

    def _score(self, depth: int, tokens: int) -> float:
        batch = self._batch(tokens, responses_alone=True)
        with self._scorer(with_layers(self._settings["config"], depth), self._reference) as scorer:
            ledger = Ledger([*scorer.parameters(), *scorer.buffers(), *_tensors(batch)])
            with self._running(scorer, ledger), scorer.as_reference():
                scorer.token_logprobs(batch)
        return float(ledger.peak)

    @contextmanager
    def _running(self, scorer: Scorer, ledger: Ledger) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(self._mode)
            stack.enter_context(ledger)
            if self.shape.device == "cuda":
                stack.enter_context(as_on_cuda(self.numerics.compute_dtype))
                scorer.placement.device = GPU
            calls = stack.enter_context(count_calls())
            yield
        if self.shape.layout != "rows" and not calls:
            raise MissingSegments("the model calls an attention of its own")

    @contextmanager
    def _scorer(self, config: Any, numerics: Numerics) -> Iterator[Scorer]:
        """The model as it is trained, of the layers that `config` says, in fake tensors."""
        settings = {name: value for name, value in self._settings.items() if name != "config"}
        settings["dtype"] = numerics.weights_dtype
        with _quiet(), without_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **settings)
        model.tie_weights()
        # Liger changes functions of the model's module too, which other models of this process have as well.
        module = vars(sys.modules[type(model).__module__])
        functions = dict(module)
        try:
            if numerics.use_liger:
                apply_liger(model)
            with _quiet(), without_weights():
                scorer = self._dressed(Scorer(cast(nn.Module, model), numerics, {}))
            with self._mode:
                _without_memory(scorer)
            scorer.placement.device = torch.device("cpu")
            yield scorer
        finally:
            module.update(functions)

    def _dressed(self, scorer: Scorer) -> Scorer:
        """With what training adds to a model."""
        shape, layers = self.shape, scorer.decoder_layers()
        if shape.checkpoint_every:
            checkpoint_gradients(scorer, shape.checkpoint_every)
        if shape.four_bit:
            keep_in_four_bits(layers, self.numerics.compute_dtype)
        if self._adapters is not None:
            attach_like(scorer, self._adapters)
        elif self.config.use_lora:
            attach_lora(scorer, self.config)
        if self.config.mlp_tile_tokens is not None:
            tile_mlps(scorer, self.config.mlp_tile_tokens)
        if shape.compute != shape.weight and shape.checkpoint_every != 1 and not shape.offload_activations:
            scorer.saving = SavedTensors(drop_casts=True, offload=None)
        scorer.use_layout(shape.layout)
        if layers and shape.layout != "rows" and shape.short_last_layer:
            scorer.shorten_last_layer(layers[-1])
        scorer.train()
        return scorer

    def _batch(self, tokens: int, *, responses_alone: bool = False) -> PackedBatch:
        """A pack of so many tokens: typical pairs, and a smaller one for what is left."""
        shape, pairs = self.shape, list[PreferencePair]()
        while tokens > 8:
            part = min(1.0, tokens / shape.pair_tokens)
            prompt, response = (max(1, int(part * n)) for n in (shape.prompt_tokens, shape.response_tokens))
            pairs.append(PreferencePair([len(pairs)] * prompt, [1] * response, [2] * response))
            tokens -= shape.pair_tokens
        if responses_alone:
            groups: list[Group] = group_pairs(pairs)[0]
            return cast(PackedBatch, self._fake(pack_responses(groups, layout=shape.layout, pad_token_id=0)))
        return cast(PackedBatch, self._fake(pack(pairs, layout=shape.layout, pad_token_id=0)))

    def _fake(self, value: Any) -> Any:
        """A dataclass with its tensors, also those further in, without memory."""
        found = {}
        for name, item in vars(value).items():
            if isinstance(item, Tensor):
                found[name] = self._mode.from_tensor(item)
            elif dataclasses.is_dataclass(item):
                found[name] = self._fake(item)
        return dataclasses.replace(value, **found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is said of what a model cannot do: it is found out by trying."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _without_memory(model: nn.Module) -> None:
    """Fake tensors in the place of weights and buffers."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                if id(weight) not in made:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    made[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                module._parameters[name] = made[id(weight)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of a dataclass, also further in."""
    for item in vars(value).values():
        if isinstance(item, Tensor):
            yield item
        elif dataclasses.is_dataclass(item):
            yield from _tensors(item)


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None


def _offloaded(known: list[Tensor]) -> AbstractContextManager[object]:
    """Inside, what is saved for the backward pass leaves the device, and comes back when it is needed."""
    weights = {tensor.untyped_storage()._cdata for tensor in known}

    def leave(tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata in weights:
            return tensor
        return tensor.shape, tensor.stride(), tensor.dtype

    def come_back(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        shape, stride, dtype = saved
        return torch.empty_strided(shape, stride, dtype=dtype)

    return saved_tensors_hooks(leave, come_back)
