"""Policies and reference models: loading, precision, kernels, LoRA, scoring, saving. No loss code."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from open_po.attention import ATTENTION_NAME, ATTENTION_VERSION, Segments
from open_po.config import ModelConfig
from open_po.errors import UserError, first_line
from open_po.last_layer import SegmentsAndLast, compute_scored_tokens_only
from open_po.logprobs import LOGPROB_VERSION, Head, fused_logprobs, log_sum_squares, pair_logps
from open_po.losses import Extra, PairLogps
from open_po.model_files import ModelSource, adapter_base
from open_po.packing import LastLayer, Layout, PackedBatch


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How a model computes, as far as it changes its log-probs."""

    compute_dtype: torch.dtype
    weights_dtype: torch.dtype
    use_liger: bool

    @staticmethod
    def choose(config: ModelConfig, device: torch.device, *, trainable_weights: bool) -> Numerics:
        """Precision and kernels for `device`.

        Weights that train are float32, whatever they compute in: an update at a learning rate of 1e-7 is lost in
        bfloat16. Raises UserError if Liger's kernels are asked for where they cannot run.
        """
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        compute = auto if config.dtype == "auto" else cast(torch.dtype, getattr(torch, config.dtype))
        use_liger = device.type == "cuda" if config.use_liger_kernel is None else config.use_liger_kernel
        if use_liger and device.type != "cuda" and not _triton_interprets():
            raise UserError(f"use_liger_kernel: Liger's kernels need CUDA, this device is {device.type}; leave it out")
        return Numerics(
            compute_dtype=compute, weights_dtype=torch.float32 if trainable_weights else compute, use_liger=use_liger
        )

    def key(self) -> dict[str, str | int]:
        """What, besides weights and tokens, decides a log-prob: part of the reference cache's key."""
        return {
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "weights_dtype": str(self.weights_dtype).removeprefix("torch."),
            "kernels": "liger" if self.use_liger else "torch",  # of the head too
            "attention_version": ATTENTION_VERSION,
            "logprob_version": LOGPROB_VERSION,
        }


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# ----------------------------------------------------------------------------------------------------------- loading


def load_scorer(source: ModelSource, numerics: Numerics, device: torch.device) -> Scorer:
    """A causal language model on `device`, dropout off, its weights in `numerics.weights_dtype`.

    A folder of adapters gives their base model with the adapters merged into it. Dropout would make the policy differ
    from the reference it starts from. Raises UserError if the model cannot be loaded.
    """
    folder = source.folder()
    base = adapter_base(folder, source.trust_remote_code)
    try:
        model, dropout = _load_whole(folder if base is None else base.folder(), source.trust_remote_code, numerics)
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        # Adapters that are trained on it name it as their base: not by the folder of this machine's Hub cache.
        model.name_or_path = model.config._name_or_path = source.name
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever a bad folder makes it
        raise UserError(f"{source.name}: no causal language model can be loaded ({first_line(error)})") from error
    if numerics.use_liger:
        apply_liger(model)
    return Scorer(cast(nn.Module, model).to(device), numerics, dropout, holds_adapters=base is not None)


def _load_whole(folder: Path, trust_remote_code: bool, numerics: Numerics) -> tuple[PreTrainedModel, dict[str, float]]:
    """The model of a folder without adapters, and the dropout rates that were switched off."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    dropout = _switch_off_dropout(config)
    # PyTorch's attention, the default, cannot cap scores; transformers 5.17 uses it for Gemma 2 all the same.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        attn_implementation="eager" if capped else None,
        dtype=numerics.weights_dtype,
        trust_remote_code=trust_remote_code,
    )
    return model, dropout


def _switch_off_dropout(config: Any) -> dict[str, float]:
    """Set every dropout rate of a model's configuration to 0; returns the old rates, which are saved with the model."""
    rates = {
        name: value
        for name, value in config.to_dict().items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0
    }
    for name in rates:
        setattr(config, name, 0.0)
    return rates


def apply_liger(model: PreTrainedModel) -> None:
    """Liger's RMSNorm, RoPE and gated MLPs, for the model types it knows; the head is fused by `logprobs`."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    kernels = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True, "layer_norm": True}
    _apply_liger_kernel_to_instance(model, **kernels, cross_entropy=False, fused_linear_cross_entropy=False)


def attach_lora(scorer: Scorer, config: ModelConfig) -> None:
    """Freeze the scorer's weights and give it new float32 adapters.

    Raises UserError for target modules that do not exist, and for an adapter on the head or on an embedding tied to
    it: the fused log-probs read the head's own weight.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets: list[str] | str | None = config.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    lora = LoraConfig(
        r=cast(int, config.lora_rank),
        lora_alpha=cast(int, config.lora_alpha),
        lora_dropout=cast(float, config.lora_dropout),
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model = scorer.base
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    try:
        scorer.model = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {first_line(error)}") from error
    found = [name for name, module in scorer.model.named_modules() if isinstance(module, BaseTunerLayer)]
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise UserError(f"lora_target_modules: the model has no module {target} that can get an adapter")
    embeddings = {"head": model.get_output_embeddings()}
    if tied:
        embeddings["embedding tied to the head"] = model.get_input_embeddings()
    for what, module in embeddings.items():
        if isinstance(module, BaseTunerLayer):
            raise UserError(f"lora_target_modules: an adapter on the {what} is not supported; leave it out of the list")


def checkpoint_gradients(scorer: Scorer) -> None:
    """Recompute each layer's activations in the backward pass. Raises UserError if the model cannot."""
    try:
        scorer.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {first_line(error)}") from error


def release_memory() -> None:
    """Give the memory of models that are gone back to the GPU or the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ----------------------------------------------------------------------------------------------------------- scoring


class Scorer(nn.Module):
    """A causal language model that maps packs to the log-probs of their responses, never to logits."""

    def __init__(
        self, model: nn.Module, numerics: Numerics, saved_dropout: dict[str, float], *, holds_adapters: bool = False
    ) -> None:
        super().__init__()
        self.model = model  # a PreTrainedModel, or a PeftModel around one
        self.numerics = numerics
        self.saved_dropout = saved_dropout  # rates that were switched off, to be saved with the model
        self.holds_adapters = holds_adapters  # merged into the weights when they were loaded
        self.layout: Layout = "rows"  # of the packs it takes; see use_layout
        # Whether rows must be computed alone and unpadded, because the longest row of a batch changes the others.
        self.row_by_row = rope_limit(self.base.config) is not None
        self._last_layer_hook: RemovableHandle | None = None
        self._own_attention: str = self.base.config._attn_implementation
        self.balances_experts = False
        self.load_balancing: Tensor | None = None  # scalar, of the last forward pass, if the scorer balances experts

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, inside its adapters if it has any."""
        inner = self.model.get_base_model() if self.has_adapters else self.model  # type: ignore[operator]
        return cast(PreTrainedModel, inner)

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    @property
    def device(self) -> torch.device:
        return self.base.device

    def use_layout(self, layout: Layout) -> None:
        """Take packs in `layout` from now on: with attention over segments, or in rows with the model's own."""
        self.base.set_attn_implementation(self._own_attention if layout == "rows" else ATTENTION_NAME)
        self.layout = layout

    def shorten_last_layer(self, layer: nn.Module | None) -> None:
        """Compute `layer`, the model's last, only for tokens that predict a scored one; None: for all of them."""
        if self._last_layer_hook is not None:
            self._last_layer_hook.remove()
        self._last_layer_hook = None if layer is None else compute_scored_tokens_only(layer)

    @property
    def last_layer_is_short(self) -> bool:
        """Whether `shorten_last_layer` is in force."""
        return self._last_layer_hook is not None

    def balance_experts(self) -> None:
        """From now on compute `load_balancing`. Raises UserError if the model has no experts."""
        if not getattr(self.base.config, "num_experts_per_tok", None):
            raise UserError(f"load_balancing_loss: {self.base.config.model_type} is no mixture-of-experts model")
        self.balances_experts = True

    def head(self) -> Head:
        """The output layer, with what the model's configuration says is done to its logits."""
        layer, config = self.base.get_output_embeddings(), self.base.config
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return Head(layer.weight, getattr(layer, "bias", None), softcap, scale)

    def forward(self, batch: PackedBatch, *, extras: Collection[Extra] = (), ld_alpha: float = 1.0) -> PairLogps:
        """Log-probs of the pack's pairs, with the optional fields `extras`; the batch moves to the model's device.

        `ld_alpha` as in `pair_logps`.
        """
        batch = batch.to(self.device)
        hidden, head = self._scored_states(batch), self.head()
        logprobs = fused_logprobs(hidden, head, batch.target_ids, use_liger=self.numerics.use_liger)
        squares = log_sum_squares(hidden, head) if "log_sum_sq" in extras else None
        return pair_logps(logprobs, batch, ld_alpha=ld_alpha, log_sum_sq=squares)

    def token_logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-prob of every scored token of the pack: [N]."""
        batch = batch.to(self.device)
        hidden = self._scored_states(batch)
        return fused_logprobs(hidden, self.head(), batch.target_ids, use_liger=self.numerics.use_liger)

    def _scored_states(self, batch: PackedBatch) -> Tensor:
        """The hidden states that predict scored tokens, in the compute dtype: [N, H]."""
        if batch.layout != self.layout:
            raise ValueError(f"a pack in layout {batch.layout} for a scorer that takes {self.layout}")
        balances = self.balances_experts and torch.is_grad_enabled()
        # Experts are balanced over all tokens of all layers. In training this holds without gradients too: a pass that
        # is repeated with them must see the same dropout.
        whole = not self.last_layer_is_short or (self.balances_experts and self.training)
        last = None if whole else batch.last_layer
        index = batch.score_index if last is None else last.score_index
        return self._hidden_states(batch, last, balances).index_select(0, index).to(self.numerics.compute_dtype)

    def _hidden_states(self, batch: PackedBatch, last: LastLayer | None, balances: bool) -> Tensor:
        """Last hidden states of a pack: [T, H], or [S, H] of the tokens that `last` says are scored."""
        inputs: list[dict[str, Any]]
        if batch.layout == "rows":
            # Causal models need no mask for padding on the right.
            rows = batch.input_ids.view(len(batch.row_lengths), -1)
            inputs = [{"input_ids": rows}]
            if self.row_by_row:
                inputs = [{"input_ids": rows[i : i + 1, :length]} for i, length in enumerate(batch.row_lengths)]
        else:
            segments = Segments(batch.segments, self.device)
            if last is not None:
                segments = SegmentsAndLast(batch.segments, last, self.device)
            tokens, positions = batch.input_ids[None], batch.position_ids[None]
            inputs = [{"input_ids": tokens, "position_ids": positions, "segments": segments}]
        if balances:
            inputs = [call | {"output_router_logits": True} for call in inputs]
        outputs = []
        for call in inputs:
            if self.row_by_row:
                _forget_longer_rows(self.base)
            with self.autocast():
                outputs.append(self.base.base_model(**call, use_cache=False))
        if balances:
            self.load_balancing = self._load_balancing([output.router_logits for output in outputs], batch)
        states = [output.last_hidden_state for output in outputs]
        if len(states) > 1:
            width = len(batch.input_ids) // len(states)
            states = [F.pad(state, (0, 0, 0, width - state.shape[1])) for state in states]
        return (states[0] if len(states) == 1 else torch.cat(states)).flatten(0, 1)

    def _load_balancing(self, router_logits: list[tuple[Tensor, ...]], batch: PackedBatch) -> Tensor:
        """transformers' own load balancing loss (arXiv 2101.03961) of the pairs' rows, as if every prompt was computed
        with each response.

        `router_logits` has the layers' [tokens, experts] of each forward pass.
        """
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        layers: Any = tuple(torch.cat(parts) for parts in zip(*router_logits, strict=True))
        weights = batch.token_weights.view(max(1, len(batch.row_lengths)), -1)
        if len(router_logits) > 1:  # rows that went one by one have no padding
            lengths = torch.tensor(batch.row_lengths, device=self.device)
            weights = weights[torch.arange(weights.shape[1], device=self.device) < lengths[:, None]][None]
        config = self.base.config
        experts = layers[0].shape[-1]
        loss = load_balancing_loss_func(layers, experts, config.num_experts_per_tok, weights)
        return cast(Tensor, loss)

    def autocast(self) -> torch.autocast:
        """The context that the model computes in."""
        dtype = self.numerics.compute_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Score as the weights the run started from: without gradients, adapters off."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                if self.has_adapters:
                    with self.model.disable_adapter():  # type: ignore[operator]
                        yield
                else:
                    yield
        finally:
            self.train(training)

    def check_ids(self, highest_id: int) -> None:
        """Raises UserError if the data hold token ids that the model has no embedding for."""
        layers = (self.base.get_input_embeddings(), self.base.get_output_embeddings())
        embeddings = min(cast(Tensor, layer.weight).shape[0] for layer in layers)
        if highest_id >= embeddings:
            raise UserError(
                f"the tokenizer makes token id {highest_id}, but the model's vocabulary has {embeddings} entries; "
                "tokenizer and model do not belong together"
            )

    def check_length(self, longest: int) -> None:
        """Raises UserError if a row is longer than the model's table of learned positions."""
        config = self.base.config
        positions = getattr(config, "max_position_embeddings", None)
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        if positions is not None and longest > positions and not rotary:
            raise UserError(
                f"max_seq_length: the longest row has {longest} tokens, the model {positions} positions; lower it"
            )


def rope_limit(config: Any) -> int | None:
    """The longest row whose rotations do not depend on its length; None if no row's do (dynamic and long RoPE do)."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sections = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # by layer type
    limits = [
        section.get("original_max_position_embeddings") or config.max_position_embeddings
        for section in sections
        if section.get("rope_type", section.get("type")) in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def _forget_longer_rows(model: PreTrainedModel) -> None:
    """Reset dynamic RoPE, which goes on using the frequencies of the longest row that it has seen."""
    for module in model.modules():
        if not hasattr(module, "max_seq_len_cached"):
            continue
        for name in [name for name in dir(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name in [name for name in dir(module) if name.endswith("original_inv_freq")]:
            # A copy: what is there may be the buffer of the long frequencies itself.
            setattr(module, name.replace("original_inv_freq", "inv_freq"), getattr(module, name).clone())


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer updates."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ------------------------------------------------------------------------------------------------------------ saving


def save_model(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write a model that `AutoModelForCausalLM.from_pretrained(folder)` loads, and its tokenizer.

    Adapters are written to `folder/adapter` and merged into the model, which cannot train any further afterwards. Those
    on top of merged ones are only merged: what they belong to is no model that their file could name.
    """
    if scorer.has_adapters:
        adapted = cast(Any, scorer.model)
        if not scorer.holds_adapters:
            adapted.save_pretrained(folder / "adapter")
            (folder / "adapter" / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
        if dtype == torch.float32:  # a bfloat16 base would round the sum that float32 is asked for
            adapted.to(dtype=dtype)
        scorer.model = adapted.merge_and_unload()
    model = scorer.base
    for name, rate in scorer.saved_dropout.items():
        setattr(model.config, name, rate)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
