"""A causal language model that maps packs to the log-probs of their responses. No loss code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from open_po.distributed.engine import Placement
from open_po.errors import StrandedError, UserError, first_line, is_out_of_memory
from open_po.losses import Extra, PairLogps
from open_po.model.attention import ATTENTION_NAME, Segments
from open_po.model.generation import Prompts, answer_greedily, answer_ids
from open_po.model.last_layer import SegmentsAndLast, compute_scored_tokens_only
from open_po.model.logprobs import Head, fused_logprobs, log_sum_squares, pair_logps
from open_po.model.numerics import Numerics
from open_po.model.rope import forget_longer_rows, rope_limit
from open_po.packing import LastLayer, Layout, PackedBatch

# Of a model whose folder holds adapters these are merged into its weights, or apart from them.
StartingAdapters = Literal["none", "merged", "apart"]


@dataclass(frozen=True)
class Scores:
    """What a forward pass found out."""

    logps: PairLogps
    load_balancing: Tensor | None = None  # scalar, of experts that are balanced


class Scorer(nn.Module):
    """A causal language model that maps packs to the log-probs of their responses, never to logits.

    It is the one handle of the model: training, evaluation and the reference pass call `score` or `token_logprobs`,
    also where an engine has wrapped it to train on several ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        numerics: Numerics,
        saved_dropout: dict[str, float],
        *,
        started_with: StartingAdapters = "none",
    ) -> None:
        super().__init__()
        self.model = model  # a PreTrainedModel, or a PeftModel around one
        self.numerics = numerics
        self.saved_dropout = saved_dropout  # rates that were switched off, to be saved with the model
        self.started_with = started_with  # of adapters: those that were loaded with the weights
        self.layout: Layout = "rows"  # of the packs it takes; see use_layout
        # Whether rows must be computed alone and unpadded, because the longest row of a batch changes the others.
        self.row_by_row = rope_limit(self.base.config) is not None
        self._last_layer_hook: RemovableHandle | None = None
        self._own_attention: str = self.base.config._attn_implementation
        self.balances_experts = False
        self.placement = Placement(self, self.base.device)  # see place
        # The context of a pass through the layers, which decides how its saved tensors are kept.
        self.saving: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, inside its adapters if it has any."""
        inner = self.model.get_base_model() if self.has_adapters else self.model  # type: ignore[operator]
        return cast(PreTrainedModel, inner)

    @property
    def saves_adapters(self) -> bool:
        """Whether its adapters are saved by themselves too; those on top of merged ones belong to no model's files."""
        return self.has_adapters and self.started_with != "merged"

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    @property
    def device(self) -> torch.device:
        """The device that the model computes on; weights may wait elsewhere."""
        return self.placement.device

    @property
    def lockstep(self) -> bool:
        """Whether ranks must run the same number of forward passes: those of `placement.team`."""
        return self.placement.team is not None

    def decoder_layers(self) -> list[nn.Module]:
        """The layers that the model is a stack of; none if they cannot be told."""
        count = int(self.base.config.get_text_config(decoder=True).num_hidden_layers)
        lists = (module for module in self.base.modules() if isinstance(module, nn.ModuleList))
        return next((list(layers) for layers in lists if len(layers) == count), [])

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
        """From now on compute the load balancing loss in training. Raises UserError if the model has no experts."""
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

    def place(self, placement: Placement) -> None:
        """From now on the weights lie as `placement` says, and forward passes go through its module."""
        self.placement = placement

    def score(self, batch: PackedBatch, *, extras: Collection[Extra] = (), ld_alpha: float = 1.0) -> Scores:
        """Log-probs of the pack's pairs, with the optional fields `extras`; the batch moves to the model's device.

        `ld_alpha` as in `pair_logps`.
        """
        batch = batch.to(self.device)
        found = self._run(batch, log_sum_sq="log_sum_sq" in extras)
        logps = pair_logps(found["logprobs"], batch, ld_alpha=ld_alpha, log_sum_sq=found.get("log_sum_sq"))
        return Scores(logps, found.get("load_balancing"))

    def token_logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-prob of every scored token of the pack: [N]."""
        return self._run(batch.to(self.device))["logprobs"]

    def own_logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-prob of every scored token of a pack of one row, by the model's own forward and its logits: [N]."""
        return self._run(batch.to(self.device), own=True)["logprobs"]

    def answer(self, prompts: Prompts) -> list[list[int]]:
        """Greedy answers, their token ids, by the model's own forward and attention.

        Where ranks go in lock step all of them call this with the same prompts.
        """
        layout, training = self.layout, self.training
        self.use_layout("rows")
        self.eval()
        try:
            with torch.no_grad():
                tokens = self._run(prompts.to(self.device))["answers"]
        finally:
            self.use_layout(layout)
            self.train(training)
        return answer_ids(tokens, prompts.ends)

    def _run(self, batch: PackedBatch | Prompts, **asked: bool) -> dict[str, Tensor]:
        try:
            found: dict[str, Tensor] = self.placement.module(batch, **asked)
        except RuntimeError as error:
            if self.lockstep and is_out_of_memory(error):
                tokens = batch.input_ids.numel()
                raise StrandedError(
                    f"out of memory, with {tokens:,} tokens in a pass of a model that ranks divide "
                    f"({first_line(error)}); lower max_tokens_per_batch, or reference_max_tokens_per_batch in the "
                    "reference pass"
                ) from error
            raise
        return found

    def forward(
        self, batch: PackedBatch | Prompts, *, log_sum_sq: bool = False, own: bool = False
    ) -> dict[str, Tensor]:
        """What the model says of a pack on its device, by name; engines look for tensors in a dictionary.

        `logprobs` [N] of the scored tokens, if asked for `log_sum_sq` [N], and `load_balancing` (scalar), the loss of
        the experts' load, if the scorer balances experts and gradients are wanted. `own`: see `own_logprobs`. Of
        prompts `answers`, see `answer_greedily`: all of it in one call, in which an engine keeps gathered what is not a
        layer's.
        """
        if isinstance(batch, Prompts):
            if self.row_by_row:
                forget_longer_rows(self.base)
            with self.autocast():
                return {"answers": answer_greedily(self.base, batch, lockstep=self.lockstep)}
        if own:
            with self.autocast():
                logits = self.base(input_ids=batch.input_ids[None], use_cache=False).logits[0, batch.score_index]
            logprobs = logits.float().log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
            return {"logprobs": batch.spread(logprobs)}
        states, load_balancing = self._scored_states(batch)
        head = self.head()
        liger, shards = self.numerics.use_liger, self.placement.vocabulary
        logprobs = fused_logprobs(states, head, batch.target_ids, use_liger=liger, shards=shards)
        found = {"logprobs": batch.spread(logprobs)}
        if log_sum_sq:
            found["log_sum_sq"] = batch.spread(log_sum_squares(states, head))
        if load_balancing is not None:
            found["load_balancing"] = load_balancing
        return found

    def _scored_states(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """The hidden states that predict scored tokens, in the compute dtype: [U, H]; and the load balancing loss."""
        if batch.layout != self.layout:
            raise ValueError(f"a pack in layout {batch.layout} for a scorer that takes {self.layout}")
        balances = self.balances_experts and torch.is_grad_enabled()
        # Experts are balanced over all tokens of all layers. In training this holds without gradients too: a pass that
        # is repeated with them must see the same dropout.
        whole = not self.last_layer_is_short or (self.balances_experts and self.training)
        last = None if whole else batch.last_layer
        index = batch.score_index if last is None else last.score_index
        states, load_balancing = self._hidden_states(batch, last, balances)
        return states.index_select(0, index).to(self.numerics.compute_dtype), load_balancing

    def _hidden_states(
        self, batch: PackedBatch, last: LastLayer | None, balances: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states of a pack: [T, H], or [S, H] of the tokens that `last` says are scored.

        With them, if `balances`, the load balancing loss.
        """
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
            # No view, as what the last layer gets is none: views would be compiled anew.
            tokens, positions = batch.input_ids[None], batch.position_ids[None].clone()
            inputs = [{"input_ids": tokens, "position_ids": positions, "segments": segments}]
        if balances:
            inputs = [call | {"output_router_logits": True} for call in inputs]
        outputs = []
        for call in inputs:
            if self.row_by_row:
                forget_longer_rows(self.base)
            with self.autocast(), self.saving():
                outputs.append(self.base.base_model(**call, use_cache=False))
        load_balancing = None
        if balances:
            load_balancing = self._load_balancing([output.router_logits for output in outputs], batch)
        states = [output.last_hidden_state for output in outputs]
        if len(states) > 1:
            width = len(batch.input_ids) // len(states)
            states = [F.pad(state, (0, 0, 0, width - state.shape[1])) for state in states]
        return (states[0] if len(states) == 1 else torch.cat(states)).flatten(0, 1), load_balancing

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
        """The context that the model computes in. Casts are not kept: they would be a whole model of copies."""
        dtype = self.numerics.compute_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Score as the weights the run started from, before its first step: without gradients, new adapters off."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                if self.has_adapters and self.started_with != "apart":
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

    @property
    def positions(self) -> int | None:
        """The longest row that the model's table of learned positions allows; None if it has none."""
        config = self.base.config
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        return None if rotary else getattr(config, "max_position_embeddings", None)

    def check_length(self, longest: int) -> None:
        """Raises UserError if a row is longer than the model's table of learned positions."""
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"max_seq_length: the longest row has {longest} tokens, the model {self.positions} positions; lower it"
            )
