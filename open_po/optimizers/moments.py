"""How the moments of AdamW are kept: as they are, in bfloat16, or in 8 bits."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from open_po.optimizers.rounding import round_by_chance

Read = Callable[[str], Tensor]  # what is kept under a name, of the weights that are updated


class SixteenBits:
    """Moments in the weights' own dtype: bfloat16, or float32 of weights in float32."""

    def __init__(self, read: Read) -> None:
        self._read = read

    @staticmethod
    def zeros(weight: Tensor) -> dict[str, Tensor]:
        """What is kept of a weight before the first step."""
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def mean(self) -> Tensor:
        """Float32 means of gradients."""
        return self._read("exp_avg").float()

    def square(self) -> Tensor:
        """Float32 means of squared gradients."""
        return self._read("exp_avg_sq").float()

    def kept(self, mean: Tensor, square: Tensor, noise: Callable[[], Tensor]) -> dict[str, Tensor]:
        """What to keep of new moments."""
        is_exact = self._read("exp_avg_sq").dtype == torch.float32
        return {"exp_avg": mean, "exp_avg_sq": square if is_exact else round_by_chance(square, noise())}


class EightBits:
    """Moments as 8-bit codes of numbers between the ends of a scale that a block of them shares (arXiv 2110.02861).

    Blocks do not cross rows, so that ranks can divide rows. Codes and their tables are bitsandbytes'.
    """

    def __init__(self, read: Read, block: int) -> None:
        self._read, self._block = read, block

    @staticmethod
    def zeros(weight: Tensor) -> dict[str, Tensor]:
        """What is kept of a weight before the first step."""
        block = block_of(weight)
        assert block is not None
        kept = {}
        for name in ("exp_avg", "exp_avg_sq"):
            kept[name] = torch.zeros_like(weight, dtype=torch.uint8)
            scales = weight[..., : weight.shape[-1] // block]  # a scale for each block of a row
            kept[f"{name}_scale"] = torch.zeros_like(scales, dtype=torch.float32, memory_format=torch.contiguous_format)
        return kept

    def mean(self) -> Tensor:
        """Float32 means of gradients."""
        return self._decoded("exp_avg", signed=True)

    def square(self) -> Tensor:
        """Float32 means of squared gradients."""
        return self._decoded("exp_avg_sq", signed=False)

    def kept(self, mean: Tensor, square: Tensor, noise: Callable[[], Tensor]) -> dict[str, Tensor]:
        """What to keep of new moments."""
        return self._encoded("exp_avg", mean, signed=True) | self._encoded("exp_avg_sq", square, signed=False)

    def _decoded(self, name: str, *, signed: bool) -> Tensor:
        codes, scales = self._read(name), self._read(f"{name}_scale")
        values: Tensor = _bitsandbytes().dequantize_blockwise(
            codes, absmax=scales, code=_table(signed, codes.device), blocksize=self._block
        )
        return values

    def _encoded(self, name: str, values: Tensor, *, signed: bool) -> dict[str, Tensor]:
        codes, how = _bitsandbytes().quantize_blockwise(
            values, code=_table(signed, values.device), blocksize=self._block
        )
        return {name: codes, f"{name}_scale": how.absmax}


def block_of(weight: Tensor | nn.Parameter) -> int | None:
    """How many moments share a scale: as many as divide a row; None if none does, or there are no rows.

    None too of a weight whose rows are divided among ranks.
    """
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if weight.ndim < 2 or local.shape[-1] != weight.shape[-1]:
        return None
    return next((block for block in (256, 128, 64) if weight.shape[-1] % block == 0), None)


@functools.cache
def _bitsandbytes() -> Any:
    """Its functions. On a CPU it complains of a kernel of 4 bits that it lacks, and that is not used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return import_module("bitsandbytes.functional")


@functools.cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """The numbers that codes stand for."""
    table: Tensor = _bitsandbytes().create_dynamic_map(signed=signed).to(device)
    return table
