from __future__ import annotations

import math
import re

import pytest
import torch

from open_po.losses import LOSSES, Loss, PairLogps, loss_spec, preference_loss


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


@pytest.mark.parametrize("name", LOSSES)
def test_numerators_of_parts_add_up_to_the_whole(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [-50 * torch.rand(6, generator=generator) for _ in range(4)]
    tokens = [torch.randint(1, 20, (6,), generator=generator).float() for _ in range(2)]

    def part(rows: slice) -> tuple[PairLogps, PairLogps]:
        lengths = {"chosen_tokens": tokens[0][rows], "rejected_tokens": tokens[1][rows]}
        return (
            PairLogps(chosen=values[0][rows], rejected=values[1][rows], **lengths),
            PairLogps(chosen=values[2][rows], rejected=values[3][rows], **lengths),
        )

    spec = loss_spec(name)
    loss = Loss(spec, spec.resolve({}))
    divisor = loss.divisor(6, int(tokens[0].sum()))
    parts = [loss(*part(rows)).numerators.sum() / divisor for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), preference_loss(name, *part(slice(0, 6))).loss)


def test_rewards_carry_no_gradient() -> None:
    policy = PairLogps(
        chosen=torch.tensor([-1.0], requires_grad=True),
        rejected=torch.tensor([-2.0], requires_grad=True),
        chosen_tokens=torch.ones(1),
        rejected_tokens=torch.ones(1),
    )
    for name in LOSSES:
        output = preference_loss(name, policy, logps([-1.0], [-1.0]))
        assert output.loss.requires_grad
        assert not output.chosen_rewards.requires_grad


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dop", {}, "loss_type 'dop' is unknown; did you mean dpo"),
        ("dpo", {"gamma": 1.0}, "loss_type dpo takes no gamma; it takes beta, label_smoothing"),
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
