"""Numbers kept in 16 bits, against PyTorch's own conversion and against probability."""

from __future__ import annotations

import torch

from open_po.optimizers.rounding import Noise, joined, round_by_chance, split

CPU = torch.device("cpu")


def numbers() -> torch.Tensor:
    """Of every size that float32 has, and those where bits carry over."""
    torch.manual_seed(0)
    random = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + 2**15).view(torch.float32)
    values = torch.cat([random, ties, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    return values[values.isfinite() & (values.abs() < 3e38)]


def test_split_numbers_come_back_bit_for_bit() -> None:
    values = numbers()
    nearest, rest = split(values)
    assert (nearest.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(nearest, rest).view(torch.int32), values.view(torch.int32))
    ties = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(nearest[~ties], values.bfloat16()[~ties])  # a tie goes away from zero, PyTorch's to an even one


def test_rounding_by_chance_takes_a_neighbour_and_is_right_on_average() -> None:
    noise = Noise(0)
    noise.start(CPU, 1)
    for value in (0.02, -0.02, 1e-30, 3.14159, 1.0):
        given = torch.full((100_000,), value)
        exact = float(given[0])
        drawn = round_by_chance(given, noise.draw(len(given), CPU))
        assert torch.equal(drawn, drawn.bfloat16().float())
        below = torch.tensor(exact).view(torch.int32).bitwise_and(-0x10000).view(torch.float32)
        above = (below.view(torch.int32) + 0x10000).view(torch.float32)
        assert ((drawn == below) | (drawn == above)).all()
        spacing = float((above - below).abs())
        share = abs(exact - float(below)) / spacing
        error = 4 * (share * (1 - share) / len(given)) ** 0.5  # four standard deviations
        assert abs(float(drawn.double().mean()) - exact) <= error * spacing + 1e-12 * abs(exact)


def test_noise_follows_from_its_purpose() -> None:
    def draw(seed: int, *purpose: int, before: int = 0) -> torch.Tensor:
        noise = Noise(seed)
        for number in range(before):
            noise.start(CPU, number)
            noise.draw(99, CPU)
        noise.start(CPU, *purpose)
        return noise.draw(40_001, CPU)

    one = draw(1, 2, 3)
    assert torch.equal(one, draw(1, 2, 3, before=5))
    for other in (draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 23)):
        assert (one == other).float().mean() < 0.001
    for lane in range(4):  # of each word that is drawn
        lows = one[lane::4].to(torch.int32)
        assert abs(float(lows.double().mean())) < 4 * 2**16 / 12**0.5 / len(lows) ** 0.5 + 1
        assert lows.min() < -32_700
        assert lows.max() > 32_700
