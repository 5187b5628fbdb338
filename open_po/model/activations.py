"""What is kept of a forward pass for its backward pass: which layers are computed again, and where the rest waits."""

from __future__ import annotations

from typing import Any, cast

from open_po.config import ModelConfig
from open_po.errors import UserError, first_line
from open_po.model.compiled import compile_layers
from open_po.model.mlp_tiles import tile_mlps
from open_po.model.offload import HostOffload
from open_po.model.saved_tensors import SavedTensors
from open_po.model.scorer import Scorer


def checkpoint_gradients(scorer: Scorer, every: int = 1) -> None:
    """Recompute the activations of every `every`-th layer in the backward pass, the first included.

    Raises UserError if the model cannot.
    """
    try:
        scorer.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {first_line(error)}") from error
    if every > 1:
        layers = scorer.decoder_layers()
        if not all(hasattr(layer, "gradient_checkpointing") for layer in layers) or not layers:
            raise UserError(
                f"gradient_checkpointing_every: the layers of {scorer.base.config.model_type} are recomputed all or "
                "none; leave it out"
            )
        for number, layer in enumerate(layers):
            cast(Any, layer).gradient_checkpointing = number % every == 0


def keep_activations(scorer: Scorer, config: ModelConfig) -> None:
    """Prepare a scorer that trains, adapters included, to compute and keep its activations as `config` says.

    After `checkpoint_gradients`. Raises UserError if the model, or the machine, cannot.
    """
    if config.mlp_tile_tokens is not None:
        tile_mlps(scorer, config.mlp_tile_tokens)
    if scorer.numerics.compiled:
        compile_layers(scorer)
    # Of a layer that is computed again the casts are there for no longer than it takes.
    all_recomputed = config.gradient_checkpointing and config.gradient_checkpointing_every == 1
    casts = scorer.numerics.compute_dtype != scorer.numerics.weights_dtype
    offload = HostOffload() if config.offload_activations else None
    if offload is not None or (casts and not all_recomputed):
        scorer.saving = SavedTensors(drop_casts=casts, offload=offload)
