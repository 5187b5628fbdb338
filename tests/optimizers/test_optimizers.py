"""Every optimizer against PyTorch's own, plain code, or itself after a stop; and the memory that it says it takes."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map

from open_po.distributed.update import clip_and_step
from open_po.optimizers import COMPENSATION, OPTIMIZERS, Settings, compact
from open_po.optimizers.compact import CompactAdamW

HERE = [name for name, spec in OPTIMIZERS.items() if not spec.needs_cuda]
KEEPING = ["adamw_kahan", "adamw_sr", "adamw_8bit"]
# Rows of 256, 64 and 10 numbers, a tensor of three dimensions, a vector; more numbers than a piece holds below.
SHAPES = [(12, 256), (30, 64), (7, 10), (2, 5, 128), (50,)]


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterList:
    torch.manual_seed(seed)
    return nn.ParameterList([nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in SHAPES])


def make(name: str, weights: nn.ParameterList, **settings: Any) -> Optimizer:
    layer = nn.ParameterList(list(weights)[:3])  # the last ones are in no layer
    given = {"learning_rate": 1e-3, "weight_decay": 0.1 * OPTIMIZERS[name].decays, "seed": 7, "layers": [layer]}
    return OPTIMIZERS[name].make(list(weights), Settings(**{**given, **settings}))


def give_gradients(weights: nn.ParameterList, step: int, dtype: torch.dtype | None = None) -> None:
    random = torch.Generator().manual_seed(step)
    for weight in weights:
        gradient = torch.randn(weight.shape, generator=random) * 10.0 ** (-2 - step % 3)
        weight.grad = gradient.to(dtype or weight.dtype)


def train(optimizer: Optimizer, weights: nn.ParameterList, steps: range = range(12)) -> None:
    for step in steps:
        give_gradients(weights, step)
        optimizer.step()
        optimizer.zero_grad()


def values(weights: nn.ParameterList, optimizer: Optimizer | None = None) -> torch.Tensor:
    """All weights, with what the optimizer keeps besides, in float32."""
    found = []
    for weight in weights:
        bits = weight.detach().float().view(torch.int32).clone()
        if optimizer is not None and COMPENSATION in optimizer.state[weight]:
            bits += optimizer.state[weight][COMPENSATION].to(torch.int32)
        found.append(bits.view(torch.float32).flatten())
    return torch.cat(found)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that weights are cut, and put together."""
    monkeypatch.setitem(compact._AT_A_TIME, "cpu", 1024)


def groups(weights: nn.ParameterList) -> list[dict[str, Any]]:
    return [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": 0.1},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]


REFERENCES: dict[str, Callable[[nn.ParameterList], list[Optimizer]]] = {
    "adamw": lambda w: [torch.optim.AdamW(groups(w), lr=1e-3)],
    "adamw_kahan": lambda w: [torch.optim.AdamW(groups(w), lr=1e-3)],
    "adamw_sr": lambda w: [torch.optim.AdamW(groups(w), lr=1e-3)],
    "rmsprop": lambda w: [torch.optim.RMSprop(w, lr=1e-3)],
    "adafactor": lambda w: [torch.optim.Adafactor(groups(w), lr=1e-3)],
    "sgd": lambda w: [torch.optim.SGD(w, lr=1e-3)],
    "muon": lambda w: [
        torch.optim.Muon(list(w)[:3], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups(nn.ParameterList(list(w)[3:])), lr=1e-3),
    ],
}


@pytest.mark.parametrize("name", REFERENCES)
def test_float32_weights_go_where_pytorchs_own_takes_them(name: str) -> None:
    mine, theirs = model(), model()
    optimizer, references = make(name, mine), REFERENCES[name](theirs)
    for step in range(12):
        for weights, parts in ((mine, [optimizer]), (theirs, references)):
            give_gradients(weights, step)
            for part in parts:
                part.step()
    moved = (values(theirs) - values(model())).norm()
    assert moved > 1e-3
    assert (values(mine) - values(theirs)).norm() <= 1e-5 * moved


def plain_adamw(weight: torch.Tensor, gradients: list[torch.Tensor], decay: float, rate: float = 1e-3) -> torch.Tensor:
    """The formula, in float64."""
    weight, mean, square = weight.double(), torch.zeros(()), torch.zeros(())
    for step, gradient in enumerate(map(torch.Tensor.double, gradients), 1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        weight = weight * (1 - rate * decay)
        weight = weight - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize(("name", "worst"), [("adamw_kahan", 0.01), ("adamw_8bit", 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compact_states_follow_the_formula(name: str, worst: float, dtype: torch.dtype) -> None:
    """Of bfloat16 weights with their compensation, at a rate that bfloat16 alone would lose."""
    weights, rate = model(dtype), 1e-3 if dtype == torch.float32 else 1e-6
    start = values(weights)
    optimizer = make(name, weights, learning_rate=rate)
    gradients: list[list[torch.Tensor]] = [[] for _ in weights]
    for step in range(12):
        give_gradients(weights, step)
        for weight, seen in zip(weights, gradients, strict=True):
            seen.append(weight.grad.float())
        optimizer.step()
    expected = torch.cat(
        [
            plain_adamw(begin, seen, 0.1 * (begin.ndim > 1), rate).flatten()
            for begin, seen in zip(model(dtype), gradients, strict=True)
        ]
    )
    moved, wanted = values(weights, optimizer) - start, expected.detach() - start
    if name == "adamw_8bit" and dtype == torch.bfloat16:  # by chance: right on average
        assert float(moved.double() @ wanted / wanted.square().sum()) == pytest.approx(1, abs=0.5)
        return
    assert (moved - wanted).norm() <= worst * wanted.norm()


def test_the_second_moment_of_bfloat16_weights_is_right_on_average() -> None:
    """Its steps of a thousandth are lost if it is rounded to the nearest: then it never falls."""
    weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = make("adamw_sr", nn.ParameterList([weight]), layers=[])
    for size in [1.0] * 5 + [0.0] * 150:
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
    exact = (1 - 0.999**5) * 0.999**150
    kept = optimizer.state[weight]["exp_avg_sq"].double()
    assert float(kept.mean()) == pytest.approx(exact, rel=0.005)
    assert float(kept.std()) < 0.1 * exact


@pytest.mark.parametrize("name", ["adamw_sr", "adamw_8bit"])
def test_weights_rounded_by_chance_are_right_on_average(name: str) -> None:
    """A rate of 1e-6 moves a weight of 0.02 by 1/122 of the distance to the next number that bfloat16 has."""
    weight = nn.Parameter(torch.full((512, 256), 0.02, dtype=torch.bfloat16))
    optimizer = make(name, nn.ParameterList([weight]), learning_rate=1e-6, weight_decay=0.0, layers=[])
    start = float(weight.detach()[0, 0])
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = weight.detach().double() - start
    assert set((moved / 2.0**-13).flatten().tolist()) <= {0.0, -1.0, -2.0, -3.0, -4.0}
    assert float(moved.mean()) == pytest.approx(-1e-5, rel=0.05)


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KEEPING)
def test_gradients_may_be_float32_and_missing(name: str, gradients: torch.dtype) -> None:
    weights = model(torch.bfloat16)
    optimizer = make(name, weights)
    before = [weight.detach().clone() for weight in weights]
    give_gradients(weights, 0)
    for number, weight in enumerate(weights):
        given = weight.grad
        weight.grad = None
        if number != 1:
            weight.grad_dtype = gradients
            weight.grad = given.to(gradients)
    optimizer.step()
    assert [torch.equal(old, new.detach()) for old, new in zip(before, weights, strict=True)] == [
        number == 1 for number in range(len(SHAPES))
    ]


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def everything(optimizer: Optimizer, weights: nn.ParameterList) -> list[torch.Tensor]:
    states = [value for weight in weights for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    return [*(weight.detach() for weight in weights), *states]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_state_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Under a schedule; the one that goes on has taken steps of its own before, and drawn from all generators."""

    def schedule(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1 - step / 20)

    def run(optimizer: Optimizer, weights: nn.ParameterList, rates: LambdaLR, steps: range) -> None:
        for step in steps:
            give_gradients(weights, step)
            gradients = {weight: weight.grad for weight in weights if weight.grad is not None}
            clip_and_step(optimizer, 1.0, gradients)
            rates.step()

    whole = model(dtype)
    first = make(name, whole)
    rates = schedule(first)
    run(first, whole, rates, range(4))
    kept = saved_and_loaded((first.state_dict(), rates.state_dict(), [weight.detach() for weight in whole]))
    run(first, whole, rates, range(4, 9))

    again = model(dtype, seed=3)
    second = make(name, again)
    rates = schedule(second)
    run(second, again, rates, range(20, 23))
    torch.randn(5)
    second.load_state_dict(deepcopy(kept[0]))
    rates.load_state_dict(kept[1])
    with torch.no_grad():
        for weight, value in zip(again, kept[2], strict=True):
            weight.copy_(value)
    run(second, again, rates, range(4, 9))
    expected = everything(first, whole)
    got = everything(second, again)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_state_is_as_it_was_when_it_was_taken() -> None:
    """While steps go on: what is written in the background is a copy."""
    weights = model(torch.bfloat16)
    optimizer = make("adamw_kahan", weights)
    train(optimizer, weights, range(2))
    copied = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, optimizer.state_dict())
    before = deepcopy(copied)
    train(optimizer, weights, range(2, 4))
    for number, state in before["state"].items():
        assert all(torch.equal(state[name], copied["state"][number][name]) for name in state)
        assert any(not torch.equal(state[name], optimizer.state[weights[number]][name]) for name in state)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_take_the_bytes_that_the_catalogue_says(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix, rest = nn.Parameter(torch.randn(512, 512).to(dtype)), nn.Parameter(torch.randn(256, 512).to(dtype))
    weights = nn.ParameterList([matrix, rest])
    optimizer = make(name, weights, layers=[nn.ParameterList([matrix])])
    give_gradients(weights, 0)
    optimizer.step()
    spec = OPTIMIZERS[name]
    for weight, says in ((matrix, spec.matrix_bytes or spec.state_bytes), (rest, spec.state_bytes)):
        tensors = [value for key, value in optimizer.state[weight].items() if torch.is_tensor(value) and key != "step"]
        taken = sum(tensor.nbytes for tensor in tensors) / weight.numel()
        assert taken == pytest.approx(says(dtype.itemsize), abs=0.02)


@pytest.mark.parametrize("name", HERE)
def test_which_ones_keep_small_updates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 1e-7, of weights of one size in one direction, the mean movement is that of float32."""
    spec = OPTIMIZERS[name]
    if name in ("adafactor", "sgd", "muon"):  # their steps have other sizes
        assert not spec.keeps_small_updates
        return
    monkeypatch.setitem(compact._AT_A_TIME, "cpu", 2**16)
    weight = nn.Parameter(torch.full((256, 256), 0.02, dtype=torch.bfloat16))
    optimizer = make(name, nn.ParameterList([weight]), learning_rate=1e-7, weight_decay=0.0, layers=[])
    start = values(nn.ParameterList([weight]))
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = values(nn.ParameterList([weight]), optimizer) - start
    kept = abs(float(moved.double().mean()) / -4e-6 - 1) < 0.1
    assert kept == spec.keeps_small_updates


def test_equal_weights_on_two_ranks_are_rounded_alike_and_seeds_differ() -> None:
    def ends(seed: int, *, noise: int = 0) -> torch.Tensor:
        weights = model(torch.bfloat16)
        optimizer = make("adamw_sr", weights, seed=seed)
        torch.randn(noise)  # ranks may have drawn differently from the global generator
        train(optimizer, weights)
        return values(weights)

    assert torch.equal(ends(1), ends(1, noise=9))
    assert not torch.equal(ends(1), ends(2))


def test_a_step_of_no_gradient_and_no_rate_changes_no_weight() -> None:
    """With which PyTorch's distributed checkpoints make states before they load them."""
    for name in KEEPING:
        weights = model(torch.bfloat16)
        optimizer = make(name, weights, learning_rate=0.0)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        before = values(weights)
        optimizer.step()
        assert torch.equal(values(weights), before)
        assert all(torch.isfinite(value.float()).all() for value in everything(optimizer, weights))


def test_pieces_hold_every_number_once() -> None:
    weights = model(torch.bfloat16)
    optimizer = CompactAdamW(list(weights), Settings(learning_rate=1e-3), rounding="by_chance", eight_bits=True)
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, number)
    for group in optimizer.param_groups:
        pieces = list(optimizer._pieces(group["params"]))
        assert sum(piece.count for piece in pieces) == sum(weight.numel() for weight in group["params"])
        assert all(0 < piece.count <= 1024 for piece in pieces)
        for piece in pieces:
            for part in piece.parts:
                block = piece.block or 1
                assert all(
                    len(value) == (len(part["weight"]) // block if name.endswith("_scale") else len(part["weight"]))
                    for name, value in part.items()
                )
        with torch.no_grad():  # each piece is the weights' own memory
            for piece in pieces:
                piece.write("weight", torch.ones(piece.count))
        assert all(bool((weight == 1).all()) for weight in group["params"])
