"""Gradients of bfloat16 weights over several packs, against sums in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from open_po.distributed import fsdp
from open_po.distributed.ddp import DdpEngine
from open_po.distributed.fsdp import FsdpEngine
from open_po.distributed.gradient_sums import GradientSums, step_gradients
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from tests import scoring
from tests.distributed import steps
from tests.distributed.test_runtime import on_two_ranks


def summed(addends: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of the packs' gradients `addends` of one weight."""
    weight = nn.Parameter(torch.zeros_like(addends[0]))
    sums = GradientSums([weight], dtype)
    with sums.step(adding=True):
        for addend in addends:
            (weight * addend).sum().backward()
            assert weight.grad is None, "it is held twice"
    return step_gradients([weight], sums)[weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [1, 8, 64, 256])
def test_what_is_small_is_not_lost(packs: int, dtype: torch.dtype) -> None:
    """Gradients that packs agree on: the case in which plain bfloat16 errs to one side, in the end by whole digits."""
    torch.manual_seed(0)
    shared = torch.randn(20_000)
    addends = [(shared * (1 + 0.02 * torch.randn(20_000))).bfloat16() for _ in range(packs)]
    exact = sum(addend.double() for addend in addends)
    assert isinstance(exact, Tensor)
    plain = addends[0].clone()
    for addend in addends[1:]:
        plain += addend

    def error(got: Tensor) -> float:
        return float((got.double() - exact).norm() / exact.norm())

    def bias(got: Tensor) -> float:
        return float(((got.double() - exact) * exact.sign()).sum() / exact.abs().sum())

    got = summed(addends, dtype)
    assert got.dtype == dtype
    print(packs, dtype, f"{error(got):.1e} {bias(got):+.1e}, plain {error(plain):.1e} {bias(plain):+.1e}")
    if dtype == torch.float32:
        assert error(got) <= 1e-6
    else:
        assert error(got) <= 2e-3 * math.sqrt(packs)
        assert abs(bias(got)) <= 1e-3
    if packs == 256:
        assert error(plain) > 0.05
        assert error(got) < error(plain) / 3


def test_a_sum_is_rounded_to_a_neighbour_by_its_distance() -> None:
    """1 + 1/1024 lies an eighth of the way from 1 to the next bfloat16, 1 + 1/128."""
    for sign in (1, -1):
        one, small = torch.full((40_000,), 1.0 * sign), torch.full((40_000,), sign / 1024)
        got = summed([one.bfloat16(), small.bfloat16()], torch.bfloat16).float() * sign
        assert set(got.tolist()) == {1.0, 1 + 1 / 128}
        assert float((got > 1).float().mean()) == pytest.approx(1 / 8, abs=0.01)
    exact = summed([torch.tensor([3.0, 0.0]).bfloat16(), torch.tensor([5.0, 0.0]).bfloat16()], torch.bfloat16)
    assert exact.tolist() == [8.0, 0.0]


def test_what_is_not_finite_stays_so() -> None:
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1.0]).bfloat16()
    for first, second in ((odd, torch.ones_like(odd)), (torch.ones_like(odd), odd)):
        got = summed([first, second], torch.bfloat16)
        assert got.tolist()[:2] == [math.inf, -math.inf]
        assert math.isnan(got[2])
        assert got[3] == 2
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # of GPUs; noise must not carry over
    sums = GradientSums([], torch.bfloat16)
    assert all(math.isnan(sums._rounded(payload.clone())) for _ in range(20))


def test_rounding_follows_the_random_state_that_checkpoints_keep() -> None:
    addends = [torch.randn(1000).bfloat16() for _ in range(4)]
    torch.manual_seed(3)
    first, second = summed(addends, torch.bfloat16), summed(addends, torch.bfloat16)
    torch.manual_seed(3)
    assert torch.equal(summed(addends, torch.bfloat16), first)
    assert not torch.equal(first, second), "steps share their noise"


def test_a_model_s_packs(llama: Path) -> None:
    """With as many packs, float32 sums are those of float64, and the optimizer gets them rounded once."""
    expected = steps.pack_gradients(llama, steps.THREE)
    scorer = scoring.load(llama, steps.BFLOAT16)
    engine = steps.engine_of(scorer, steps.rules())
    steps.backward(engine, scorer, steps.THREE)
    got = step_gradients(engine._parameters, engine._sums)
    for name, parameter in scorer.named_parameters():
        exact = sum(gradient.double() for gradient in expected[name])
        assert got[parameter].dtype == torch.float32
        torch.testing.assert_close(got[parameter].double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))
        assert parameter.grad is None
    steps.backward(engine, scorer, steps.ONE)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in scorer.parameters()), "2 bytes"


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "sgd"])
def test_optimizers_take_them(optimizer: str, llama: Path) -> None:
    """The update is that of the same optimizer with the sums of float64, rounded to the weights' precision."""
    fields = {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.0}
    scorer, plain = scoring.load(llama, steps.BFLOAT16), scoring.load(llama, steps.BFLOAT16)
    engine = steps.engine_of(scorer, steps.rules(max_grad_norm=0.5), train=fields)
    steps.backward(engine, scorer, steps.THREE)
    norm = engine.update()
    sums = {name: torch.stack(each).float().sum(0) for name, each in steps.pack_gradients(llama, steps.THREE).items()}
    expected = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in sums.values()))
    assert norm == pytest.approx(expected, rel=1e-5)
    assert norm > 0.5, "nothing was clipped"
    for name, parameter in plain.named_parameters():
        parameter.grad = (sums[name] * (0.5 / expected)).bfloat16()
    steps.maker(**fields)(plain.parameters()).step()
    for mine, theirs in zip(scorer.parameters(), plain.parameters(), strict=True):
        # The norm's last digit may round a gradient to the other side.
        assert float((mine != theirs).float().mean()) < 0.01
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=1e-3)


def test_float32_weights_need_none(llama: Path) -> None:
    scorer = scoring.load(llama)
    assert steps.engine_of(scorer, steps.rules(grad_dtype="float32"))._sums is None
    with pytest.raises(UserError, match=r"^grad_dtype: bfloat16 is for bfloat16 weights, those that train are float32"):
        steps.engine_of(scorer, steps.rules(grad_dtype="bfloat16"))


def test_what_a_failed_step_has_left_is_gone(llama: Path) -> None:
    scorer = scoring.load(llama, steps.BFLOAT16)
    engine = steps.engine_of(scorer, steps.rules())
    with pytest.raises(AttributeError):
        steps.backward(engine, scorer, [steps.ONE[0], None])  # type: ignore[list-item]
    steps.backward(engine, scorer, steps.THREE)
    got = step_gradients(engine._parameters, engine._sums)
    expected = steps.pack_gradients(llama, steps.THREE)
    for name, parameter in scorer.named_parameters():
        torch.testing.assert_close(got[parameter], torch.stack(expected[name]).float().sum(0))


def test_under_ddp_float32_packs_add_up_in_the_buckets(llama: Path, tmp_path: Path) -> None:
    """One copy of all gradients where there were two, and the same weights bit for bit."""
    shares = [steps.THREE[:2], [steps.THREE[2], steps.THREE[0]]]

    def trained(runtime: Runtime, rank: int, *, beside: bool) -> tuple[list[Tensor], int]:
        """Weights after three steps, and bytes of the memory that gradients were in during the last one."""
        scorer = scoring.load(llama)
        engine = DdpEngine(scorer, steps.maker(), runtime, rules=steps.rules(max_grad_norm=0.5))
        scorer.place(engine)
        if beside:  # as PyTorch has it: what no sum over ranks follows gets memory of its own
            engine._buckets = {}
        for _ in range(3):
            seen: dict[int, torch.UntypedStorage] = {}  # kept, so that no memory is used twice
            with engine.step(packs=2):
                for last in (False, True):
                    with engine.pack(last=last):
                        engine.backward(steps.value(scorer, shares[rank][last]))
                    found = [p.grad.untyped_storage() for p in scorer.parameters() if p.grad is not None]
                    seen |= {storage.data_ptr(): storage for storage in found}
            engine.update()
        return list(scorer.parameters()), sum(storage.nbytes() for storage in seen.values())

    def body(runtime: Runtime, rank: int) -> Any:
        (mine, once), (plain, twice) = (trained(runtime, rank, beside=beside) for beside in (False, True))
        moved = not torch.equal(mine[0], scoring.load(llama).get_parameter("model.model.embed_tokens.weight"))
        whole = sum(parameter.nbytes for parameter in mine)
        return [moved, all(map(torch.equal, mine, plain)), once / whole, twice / whole]

    for moved, equal, once, twice in on_two_ranks(tmp_path, body):
        assert moved
        assert equal
        assert 1 <= once < 1.01
        assert 2 <= twice < 2.02


@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp", "fsdp_every_pack"))]
)
def test_two_ranks(kind: str, llama: Path, tmp_path: Path) -> None:
    """Each has two packs, and one: the gradients are those of all packs of both, summed in float64."""
    shares = [steps.THREE[:2], [steps.THREE[2], steps.THREE[0]]]

    def worst(runtime: Runtime, rank: int, dtype: str) -> float:
        scorer = scoring.load(llama, steps.BFLOAT16)
        layers, update = scorer.decoder_layers(), steps.rules(grad_dtype=dtype)
        engine: DdpEngine | FsdpEngine
        if kind == "ddp":
            engine = DdpEngine(scorer, steps.maker(), runtime, rules=update)
        else:
            if kind == "fsdp_every_pack":  # as for models whose whole gradient a GPU has no room for
                fsdp._reduces_once = lambda parameters, dtype, device: False
            engine = FsdpEngine(scorer, layers, lambda unit: None, steps.maker(), runtime, rules=update)
        scorer.place(engine)
        errors = []
        for packs in (2, 1):
            steps.backward(engine, scorer, shares[rank][:packs])
            gradients = engine._gradients() if kind == "ddp" else step_gradients(engine._parameters, engine._sums)
            both = steps.pack_gradients(llama, [batch for share in shares for batch in share[:packs]])
            for name, parameter in scorer.named_parameters():
                got = engine.whole(gradients[parameter])
                exact = torch.stack(both[name]).double().sum(0)
                errors.append(float((got.double() - exact).norm() / exact.norm()))
                if kind == "ddp":
                    assert str(got.dtype) == f"torch.{dtype}"
        return max(errors)

    def body(runtime: Runtime, rank: int) -> Any:
        return [worst(runtime, rank, dtype) for dtype in ("float32", "bfloat16")]

    for exact, rounded in on_two_ranks(tmp_path, body):
        print(kind, exact, rounded)
        # FSDP rounds what it has reduced to the precision of the weights.
        assert exact <= (1e-5 if kind == "ddp" else 3e-3)
        assert rounded <= 2e-2
