"""Every loss against values computed by other trainers' own code, in float64.

`OPEN_PO_GOLDENS` may name other files of the same shape, separated by `os.pathsep`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_po.losses import LOSSES, PairLogps, preference_loss

_DEFAULT = Path(__file__).parent.parent / "goldens" / "preference_losses.json"
_FILES = os.environ.get("OPEN_PO_GOLDENS", str(_DEFAULT)).split(os.pathsep)


def _cases() -> list[Any]:
    cases = [(file, case) for file in _FILES for case in json.loads(Path(file).read_text())["cases"]]
    return [pytest.param(case, id=f"{Path(file).stem}-{case['id']}") for file, case in cases]


def _tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in case["inputs"].items()}


@pytest.mark.parametrize("case", _cases())
def test_golden(case: dict[str, Any]) -> None:
    inputs = _tensors(case)
    lengths = {"chosen_tokens": inputs["chosen_lengths"], "rejected_tokens": inputs["rejected_lengths"]}
    chosen = inputs["policy_chosen_logps"].requires_grad_()
    rejected = inputs["policy_rejected_logps"].requires_grad_()
    policy = PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_log_sum_sq=inputs.get("policy_chosen_log_sum_sq"),
        rejected_log_sum_sq=inputs.get("policy_rejected_log_sum_sq"),
        # The files' NLL, where it is not the response's, has the prompt in it.
        prompt=-inputs["chosen_nll_sums"] - chosen.detach(),
        prompt_tokens=inputs["chosen_nll_tokens"] - inputs["chosen_lengths"],
        **lengths,
    )
    reference = PairLogps(
        chosen=inputs["reference_chosen_logps"], rejected=inputs["reference_rejected_logps"], **lengths
    )
    output = preference_loss(case["loss"], policy, reference, **case["params"])
    grads = torch.autograd.grad(output.loss, [chosen, rejected], allow_unused=True, materialize_grads=True)
    got = {
        "losses": output.losses,
        "loss": output.loss,
        "chosen_rewards": output.chosen_rewards,
        "rejected_rewards": output.rejected_rewards,
        "nll_loss": output.nll_loss,
        "grad_policy_chosen": grads[0],
        "grad_policy_rejected": grads[1],
        **output.details,
    }
    for name, value in case["expected"].items():
        expected = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(got[name].detach(), expected, rtol=case["rtol"], atol=case["atol"], msg=name)


def test_every_loss_has_golden_cases() -> None:
    assert {case["loss"] for case in json.loads(_DEFAULT.read_text())["cases"]} == set(LOSSES)
