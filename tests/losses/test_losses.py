from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from open_po.losses import LOSSES, Counts, Loss, LossMix, PairLogps, loss_spec, preference_loss
from open_po.losses.spec import Choice


def logps(chosen: list[float], rejected: list[float], tokens: tuple[int, int] = (4, 2)) -> PairLogps:
    ones = torch.ones(len(chosen))
    return PairLogps(
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        chosen_tokens=tokens[0] * ones,
        rejected_tokens=tokens[1] * ones,
    )


POLICY, REFERENCE = logps([-10.0, -8.0], [-12.0, -5.0]), logps([-11.0, -8.0], [-11.0, -8.0])


def logistic_loss(z: float) -> float:
    return math.log(1 + math.exp(-z))


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        # log-ratios: chosen +1 and 0, rejected -1 and +3
        ("dpo", {"beta": 0.5}, [logistic_loss(1.0), logistic_loss(-1.5)]),
        (
            "dpo",
            {"beta": 0.5, "label_smoothing": 0.2},
            [
                0.8 * logistic_loss(1.0) + 0.2 * logistic_loss(-1.0),
                0.8 * logistic_loss(-1.5) + 0.2 * logistic_loss(1.5),
            ],
        ),
        ("dpo_norm", {"beta": 2.0}, [logistic_loss(2 * (1 / 4 + 1 / 2)), logistic_loss(2 * (0 - 3 / 2))]),
        ("dpo_gamma", {"beta": 0.5, "gamma": 0.3}, [logistic_loss(0.7), logistic_loss(-1.8)]),
        ("slic_dpo", {"beta": 0.5, "delta": 1.25}, [0.25, 2.75]),
        ("slic_dpo", {"beta": 0.5, "delta": 0.5}, [0.0, 2.0]),
        ("sft", {}, [18 / 8, 18 / 8]),
    ],
)
def test_values_by_hand(name: str, parameters: dict[str, float], expected: list[float]) -> None:
    output = preference_loss(name, POLICY, REFERENCE, **parameters)
    torch.testing.assert_close(output.losses, torch.tensor(expected))
    torch.testing.assert_close(output.loss, torch.tensor(sum(expected) / 2))


def random_logps(rows: slice, *, seed: int) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    sums = [-50 * torch.rand(6, generator=generator, dtype=torch.float64)[rows] for _ in range(5)]
    tokens = [torch.randint(1, 20, (6,), generator=torch.Generator().manual_seed(i)).double()[rows] for i in range(3)]
    return PairLogps(
        chosen=sums[0].requires_grad_(),
        rejected=sums[1].requires_grad_(),
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        chosen_log_sum_sq=sums[2],
        rejected_log_sum_sq=sums[3],
        prompt=sums[4],
        prompt_tokens=tokens[2],
    )


VARIANTS = [
    pytest.param(name, {parameter: option}, id=f"{name}-{option}")
    for name, spec in LOSSES.items()
    for parameter, options in [
        ("beta", (None,)),
        *((p, c.options) for p, c in spec.parameters.items() if isinstance(c, Choice)),
    ]
    for option in options
    if not (parameter == "beta" and any(isinstance(c, Choice) for c in spec.parameters.values()))
]


def loss_of(name: str, variant: dict[str, Any]) -> Loss:
    spec = loss_spec(name)
    return Loss(spec, spec.resolve({k: v for k, v in variant.items() if v is not None}))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_parts_of_a_step_add_up_to_it_unless_the_loss_says_it_couples(name: str, variant: dict[str, Any]) -> None:
    loss = loss_of(name, variant)
    counts = Counts.of(random_logps(slice(0, 6), seed=1))

    def value(rows: slice) -> torch.Tensor:
        return loss(random_logps(rows, seed=1), random_logps(rows, seed=2)).value(counts)

    parts = sum(value(rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 6)))
    assert torch.allclose(parts, value(slice(0, 6))) != loss.batch_coupled


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_rewards_carry_no_gradient_and_references_no_weight_where_none_is_needed(
    name: str, variant: dict[str, Any]
) -> None:
    loss = loss_of(name, variant)
    policy = random_logps(slice(0, 6), seed=1)
    losses = loss(policy, random_logps(slice(0, 6), seed=2))
    assert losses.value(Counts.of(policy)).requires_grad
    assert not losses.chosen_rewards.requires_grad
    assert not losses.rejected_rewards.requires_grad
    if not loss.needs_reference:
        without = loss(policy, None)
        torch.testing.assert_close(without.value(Counts.of(policy)), losses.value(Counts.of(policy)))
        torch.testing.assert_close(without.chosen_rewards, losses.chosen_rewards)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_gradients_equal_finite_differences(name: str, variant: dict[str, Any]) -> None:
    """Also where autograd is told to leave something out: KTO's KL, BCO's shift, WPO's weights."""
    loss = loss_of(name, variant)
    policy, reference = random_logps(slice(0, 6), seed=1), random_logps(slice(0, 6), seed=2)
    counts = Counts.of(policy)
    detached = name in ("kto_pair", "bco_pair", "wpo")

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss(replace(policy, chosen=chosen, rejected=rejected), reference).value(counts)

    if not detached:
        assert torch.autograd.gradcheck(value, (policy.chosen, policy.rejected), eps=1e-6, atol=1e-5)


def test_a_mix_is_the_weighted_sum_of_its_parts() -> None:
    policy, reference = random_logps(slice(0, 6), seed=1), random_logps(slice(0, 6), seed=2)
    counts = Counts.of(policy)
    parts = [
        replace(loss_of(name, {}), weight=weight) for name, weight in (("dpo_norm", 1.0), ("sft", 0.1), ("ipo", 2.0))
    ]
    mixed = LossMix(tuple(parts))(policy, reference)
    expected = sum(part.weight * part(policy, reference).value(counts) for part in parts)
    torch.testing.assert_close(mixed.value(counts), expected)
    torch.testing.assert_close(mixed.chosen_rewards, parts[0](policy, reference).chosen_rewards)
    assert LossMix((*parts, parts[0])).names == ["dpo_norm_1", "sft", "ipo", "dpo_norm_4"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_pair_that_is_not_finite_is_named(bad: float) -> None:
    policy = random_logps(slice(0, 6), seed=1)
    chosen = policy.chosen.detach().clone()
    chosen[4] = bad
    policy = replace(policy, chosen=chosen)
    for names in (["dpo"], ["kto_pair"], ["sft"], ["cpo", "sft"]):
        mix = LossMix(tuple(loss_of(name, {}) for name in names))
        flags = mix(policy, random_logps(slice(0, 6), seed=2)).not_finite()
        assert flags.shape == (6,)
        assert flags[4]
        assert names == ["kto_pair"] or flags.sum() == 1  # the others of its step have its KL


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dop", {}, "loss_type 'dop' is unknown; did you mean dpo"),
        ("dpo", {"gamma": 1.0}, "loss_type dpo takes no gamma; it takes beta, label_smoothing, reference_free"),
        ("dpo", {"beta": -0.1}, "beta is -0.1 but must lie in (0, inf)"),
        ("dpo", {"beta": float("nan")}, "beta is nan"),
        ("dpo_gamma", {"gamma": float("inf")}, "gamma is inf but must lie in [0, inf)"),
        ("dpo", {"label_smoothing": 0.6}, "label_smoothing is 0.6 but must lie in [0, 0.5]"),
        ("slic_dpo", {"delta": 0.0}, "delta is 0 but must lie in (0, inf)"),
    ],
)
def test_refusals(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        preference_loss(name, POLICY, REFERENCE, **parameters)


def test_a_missing_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="dpo needs reference log-probs"):
        preference_loss("dpo", POLICY)
