"""A layer's MLP over tiles of tokens, computed again in the backward pass (arXiv 2506.13996).

Between an MLP's products lie tensors several times as wide as the hidden states. In tiles they are never held for more
than a tile's tokens, in either pass. DeepSpeed's and Liger's TiledMLP add each tile's gradients to the weights' own: in
the weights' precision, and once a tile for every hook on a gradient. Here they are summed in float32 first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from open_po.errors import UserError
from open_po.model.scorer import Scorer

Compute = Callable[[Tensor], Tensor]


def tile_mlps(scorer: Scorer, tokens: int) -> None:
    """From now on compute the MLP of every layer over `tokens` tokens at a time.

    Raises UserError if the layers have none, or one that is not made of each token's hidden state alone.
    """
    config = scorer.base.config
    if getattr(config.get_text_config(decoder=True), "num_experts_per_tok", None):
        raise UserError(f"mlp_tile_tokens: {config.model_type} sends tokens to experts; leave it out")
    mlps = [getattr(layer, "mlp", None) for layer in scorer.decoder_layers()]
    found = [mlp for mlp in mlps if isinstance(mlp, nn.Module) and _takes_hidden_states_alone(mlp)]
    if not found or len(found) < len(mlps):
        raise UserError(
            f"mlp_tile_tokens: the layers of {config.model_type} have no module mlp that takes hidden states alone; "
            "leave it out"
        )
    for mlp in found:
        cast(Any, mlp).forward = partial(_in_tiles, mlp, mlp.forward, tokens)


def _takes_hidden_states_alone(mlp: nn.Module) -> bool:
    parameters = inspect.signature(mlp.forward).parameters.values()
    needed = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    return len([parameter for parameter in needed if parameter.kind is not inspect.Parameter.VAR_KEYWORD]) == 1


def _in_tiles(mlp: nn.Module, compute: Compute, tokens: int, hidden: Tensor) -> Tensor:
    weights = [weight for weight in mlp.parameters() if weight.requires_grad]
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in mlp.modules())
    return cast(Tensor, _Tiles.apply(compute, tokens, draws, hidden, *weights))  # type: ignore[no-untyped-call]


class _Tiles(torch.autograd.Function):
    """`compute` of a tile of tokens at a time; `weights` are what it reads and what wants a gradient."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, tokens: int, draws: bool, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.compute, ctx.tokens, ctx.weights = compute, tokens, weights
        ctx.surroundings = _Surroundings(hidden.device, draws)
        out: Tensor | None = None
        done = 0
        for tile in _tiles(hidden, tokens):
            part = compute(tile)
            if out is None:
                out = part.new_empty(1, hidden.shape[:-1].numel(), part.shape[-1])
            out[:, done : done + part.shape[1]] = part
            done += part.shape[1]
        assert out is not None
        return out.view(*hidden.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        wants_hidden: bool = ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        into = [None] * len(_tiles(hidden, ctx.tokens)) if grad_hidden is None else _tiles(grad_hidden, ctx.tokens)
        totals: list[Tensor | None] = [None] * len(ctx.weights)
        tiles = zip(_tiles(hidden, ctx.tokens), _tiles(grad, ctx.tokens), into, strict=True)
        with ctx.surroundings.restored():
            for number, (tile, grad_tile, target) in enumerate(tiles):
                with torch.enable_grad():
                    tile = tile.detach().requires_grad_(wants_hidden)
                    part = ctx.compute(tile)
                asked = [*([tile] if wants_hidden else []), *ctx.weights]
                found = list(torch.autograd.grad(part, asked, grad_tile, allow_unused=True))
                del part
                if target is not None:
                    target.copy_(found.pop(0))
                totals = [_added(total, one, number) for total, one in zip(totals, found, strict=True)]
        grads = [None if total is None else total.to(w.dtype) for total, w in zip(totals, ctx.weights, strict=True)]
        return None, None, None, grad_hidden, *grads


def _tiles(hidden: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """[1, at most `tokens`, H] each, of hidden states [..., H]."""
    return cast(tuple[Tensor, ...], hidden.reshape(1, -1, hidden.shape[-1]).split(tokens, 1))


def _added(total: Tensor | None, one: Tensor | None, number: int) -> Tensor | None:
    """The sum with the gradient of tile `number`, in at least float32, in a tensor that is nobody else's."""
    if total is None or one is None:
        return one if total is None else total
    if number == 1:
        return total.to(torch.promote_types(total.dtype, torch.float32)) + one
    return total.add_(one)


class _Surroundings:
    """Autocast and, if something `draws`, the random state, as they are now."""

    def __init__(self, device: torch.device, draws: bool) -> None:
        kind = device.type
        self._device = device
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self._random = torch.get_rng_state() if draws else None
        self._device_random = torch.cuda.get_rng_state(device) if draws and kind == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        devices = [self._device] if self._device_random is not None else []
        kind, dtype, enabled = self._autocast
        with (
            torch.random.fork_rng(devices, enabled=self._random is not None),
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False),
        ):
            if self._random is not None:
                torch.set_rng_state(self._random)
            if self._device_random is not None:
                torch.cuda.set_rng_state(self._device_random, self._device)
            yield
