"""Layers compiled by `torch.compile`, one at a time, with attention left as it is.

A layer's compiled code serves all layers that are alike, and packs of every size. Attention depends on a pack's
segments, which are Python's: the compiler goes around it. Only the layers' `forward` changes, so that hooks, weights
and their names stay as they were.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from open_po.errors import UserError, first_line
from open_po.model.attention import ATTENTION_NAME, packed_attention
from open_po.model.scorer import Scorer

# Dropout draws as it does without compilation.
_HOW: dict[str, Any] = {"options": {"fallback_random": True}}
# Variants of one function's code: with gradients and without, in training or not, kinds of layers, packs of one token.
_VARIANTS = 32


class _Sealed:
    """What attention is to know of a pack: of one type, whatever it is, because new types are compiled anew."""

    def __init__(self, segments: Any) -> None:
        self.segments = segments


def compile_layers(scorer: Scorer) -> None:
    """From now on run the scorer's layers compiled wherever attention is over segments.

    Raises UserError if this machine, or the model, cannot.
    """
    layers = scorer.decoder_layers()
    if not layers:
        raise UserError(f"torch_compile: the layers of {scorer.base.config.model_type} cannot be told; leave it out")
    _try_out(scorer.base.device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(_unsealed_attention))
    for layer in layers:
        _compile(layer)


def refuse_rows(scorer: Scorer) -> None:
    """Raises UserError if the scorer's layers are compiled and its packs are rows, in which they do not run compiled.

    The model's own attention would be compiled too, and whatever it does to find a mask.
    """
    if scorer.numerics.compiled and scorer.layout == "rows":
        kind = scorer.base.config.model_type
        raise UserError(f"torch_compile: {kind} is computed in rows, by its own attention; leave it out")


def _compile(layer: nn.Module) -> None:
    # Recomputing goes around what is compiled: inside, the compiler could not go around attention.
    recompute = layer._gradient_checkpointing_func if getattr(layer, "gradient_checkpointing", False) else None
    cast(Any, layer).gradient_checkpointing = False
    compiled = torch.compile(layer.forward, dynamic=True, **_HOW)
    cast(Any, layer).forward = partial(_forward, layer, layer.forward, compiled, recompute)


def _forward(layer: nn.Module, plain: Any, compiled: Any, recompute: Any, *args: Any, **kwargs: Any) -> Any:
    segments = kwargs.get("segments")
    if segments is None:  # the model's own forward: to compare with, and for answers, token by token
        return plain(*args, **kwargs)
    run = partial(compiled, **(kwargs | {"segments": _Sealed(segments)}))
    return recompute(run, *args) if recompute is not None and layer.training else run(*args)


def _unsealed_attention(*args: Any, segments: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
    return packed_attention(*args, segments=segments.segments if isinstance(segments, _Sealed) else segments, **kwargs)


def _try_out(device: torch.device) -> None:
    """Compile something small: a compiler, or headers of Python's, may be missing."""
    try:
        torch.compile(_small, dynamic=True, fullgraph=True, **_HOW)(torch.ones(3, device=device))
    except Exception as error:  # whatever is missing says so in its own way
        raise UserError(f"torch_compile: nothing can be compiled here ({first_line(error)}); leave it out") from error


def _small(x: Tensor) -> Tensor:
    return (x + 1).sin()
