"""Float32 numbers kept in 16 bits without losing what is too small for these."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def joined(weight: Tensor, compensation: Tensor) -> Tensor:
    """The float32 numbers that `split` has split, of bfloat16 and int16 tensors."""
    bits = weight.view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(compensation).view(torch.float32)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 numbers as the nearest bfloat16 ones and int16 ones, with which they can be had again, bit for bit.

    The second is what the bits of a number have more, or less, than those of the bfloat16 one.
    """
    bits = weight.view(torch.int32)
    nearest = bits.add(0x8000).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return nearest, bits.to(torch.int16)


def round_by_chance(values: Tensor, noise: Tensor) -> Tensor:
    """Float32 `values`, changed in place to numbers that bfloat16 holds: of the two next to each, one is drawn.

    The nearer one is the likelier, so that the mean of all draws is the number itself. `noise`: int16, uniform.
    """
    values.view(torch.int32).add_(noise).add_(0x8000).bitwise_and_(-0x10000)
    return values


class Noise:
    """Random bits that follow from a seed and what they are for alone, not from what was drawn before.

    So a run that goes on from a checkpoint draws what it would have drawn, and ranks that hold the same weights draw
    alike.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def start(self, device: torch.device, *purpose: int) -> None:
        """Begin the bits of a purpose, a few numbers."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        words = " ".join(map(str, (self._seed, *purpose)))
        digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
        self._generators[device].manual_seed(int.from_bytes(digest, "little") >> 1)

    def draw(self, count: int, device: torch.device) -> Tensor:
        """`count` numbers of 16 bits each, int16."""
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)  # four at a time: the fewer the faster
        return words.random_(-(2**63), None, generator=self._generators[device]).view(torch.int16)[:count]
