"""AdamW with states of few bytes, for weights in bfloat16 that must not lose small updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw as adamw_step

from open_po.optimizers.moments import EightBits, SixteenBits, block_of
from open_po.optimizers.plain import adamw, decay_groups
from open_po.optimizers.rounding import Noise, joined, round_by_chance, split
from open_po.optimizers.spec import COMPENSATION, Settings

Rounding = Literal["compensated", "by_chance"]


def adamw_kahan(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """AdamW of compensated bfloat16 weights; of float32 weights, which need no compensation, PyTorch's."""
    return _of_bfloat16(parameters, settings, rounding="compensated")


def adamw_sr(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """AdamW of bfloat16 weights that are rounded by chance; of float32 weights PyTorch's."""
    return _of_bfloat16(parameters, settings, rounding="by_chance")


def adamw_8bit(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """AdamW with moments of 8 bits; bfloat16 weights are rounded by chance."""
    return CompactAdamW(parameters, settings, rounding="by_chance", eight_bits=True)


def _of_bfloat16(parameters: list[nn.Parameter], settings: Settings, *, rounding: Rounding) -> Optimizer:
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        return adamw(parameters, settings)
    return CompactAdamW(parameters, settings, rounding=rounding)


@dataclass
class _Piece:
    """Flat parts of some parameters, as many numbers as are updated at a time, with what is kept of each."""

    purpose: tuple[int, ...]  # which numbers they are
    step: float
    block: int | None  # of their moments, if these have 8 bits
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    count: int = 0

    def read(self, name: str) -> Tensor:
        """One of what is kept, of all parts: its own memory where there is one part."""
        return self.parts[0][name] if len(self.parts) == 1 else torch.cat([part[name] for part in self.parts])

    def write(self, name: str, value: Tensor) -> None:
        targets = [part[name] for part in self.parts]
        torch._foreach_copy_(targets, list(value.split([target.numel() for target in targets])))


class CompactAdamW(Optimizer):
    """AdamW whose arithmetic is PyTorch's fused one in float32, on pieces of the weights, and whose states are small.

    Moments are bfloat16 for bfloat16 weights, or 8 bits; float32 for float32 weights. What the second moment gains in
    a step, a thousandth of itself, is less than bfloat16 tells apart, so it is rounded by chance.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        settings: Settings,
        *,
        rounding: Rounding,
        eight_bits: bool = False,
    ) -> None:
        groups = decay_groups(parameters, settings.weight_decay)
        super().__init__(groups, {"lr": settings.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8})
        self._compensated, self._eight_bits = rounding == "compensated", eight_bits
        self._noise = Noise(settings.seed)
        # Of all, in an order that stays: a step may be taken of some of them alone.
        self._numbers = {parameter: number for number, parameter in enumerate(self._all())}

    def _all(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for piece in self._pieces(group["params"]):
                self._update(piece, group)

    def _pieces(self, parameters: list[nn.Parameter]) -> Iterator[_Piece]:
        """The parameters' numbers in pieces: large ones are cut, small ones are put together.

        Those of a piece are on one device, in one dtype and kind.
        """
        open_pieces: dict[tuple[object, ...], _Piece] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            number = self._numbers[parameter]
            state = self._state(parameter)
            block = block_of(parameter) if "exp_avg_scale" in state else None
            kept = {"weight": parameter, "grad": parameter.grad, **state}
            step = float(kept.pop("step"))
            flat = {name: _local(value).view(-1) for name, value in kept.items() if name != "grad"}
            flat["grad"] = _local(kept["grad"]).reshape(-1)
            weight, shard, start = flat["weight"], _shard(parameter), 0
            limit = _AT_A_TIME.get(weight.device.type, _AT_A_TIME["cuda"])
            kind = (weight.device, weight.dtype, flat["grad"].dtype, block, shard, step)
            while start < weight.numel():
                piece = open_pieces.setdefault(kind, _Piece((int(step), number, start, shard), step, block))
                end = min(weight.numel(), start + limit - piece.count)
                piece.parts.append({name: _cut(value, name, start, end, block) for name, value in flat.items()})
                piece.count += end - start
                start = end
                if piece.count == limit:
                    yield open_pieces.pop(kind)
        yield from open_pieces.values()

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            weight = parameter.detach()
            state["step"] = torch.tensor(0.0)
            in_blocks = self._eight_bits and block_of(parameter) is not None
            state |= EightBits.zeros(weight) if in_blocks else SixteenBits.zeros(weight)
            if self._compensated and weight.dtype == torch.bfloat16:
                state[COMPENSATION] = torch.zeros_like(weight, dtype=torch.int16)
        state["step"] += 1
        return state

    def _update(self, piece: _Piece, group: dict[str, Any]) -> None:
        weight = piece.read("weight")
        device, dtype = weight.device, weight.dtype
        compensated = COMPENSATION in piece.parts[0]
        weight = joined(weight, piece.read(COMPENSATION)) if compensated else weight.float()
        moments = SixteenBits(piece.read) if piece.block is None else EightBits(piece.read, piece.block)
        mean, square = moments.mean(), moments.square()
        beta1, beta2 = group["betas"]
        adamw_step(
            [weight],
            [piece.read("grad").float()],
            [mean],
            [square],
            [],
            [torch.full((), piece.step - 1, device=device)],  # which it counts up
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self._noise.start(device, *piece.purpose)

        def noise() -> Tensor:
            return self._noise.draw(piece.count, device)

        for name, value in moments.kept(mean, square, noise).items():
            piece.write(name, value)
        if compensated:
            weight, compensation = split(weight)
            piece.write(COMPENSATION, compensation)
        elif dtype == torch.bfloat16:
            weight = round_by_chance(weight, noise())
        piece.write("weight", weight)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of any optimizer, but that states keep their dtypes, which are not the weights'."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        mine = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, mine, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[parameter][name] = value if name == "step" else value.to(parameter.device)


# Numbers that are updated at a time: on a CPU as many as stay in its caches; else so many that launching kernels takes
# no time beside them, in less than 0.5 GB.
_AT_A_TIME = {"cpu": 2**16, "cuda": 2**24}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of it, where ranks divide it."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _shard(parameter: nn.Parameter) -> int:
    """Which part of the parameter this rank has: 0 where it has the whole."""
    if _local(parameter).numel() == parameter.numel():
        return 0
    return 1 + int(cast(Any, parameter).device_mesh.get_rank())


def _cut(value: Tensor, name: str, start: int, end: int, block: int | None) -> Tensor:
    per = block if block is not None and name.endswith("_scale") else 1
    return value[start // per : end // per]
