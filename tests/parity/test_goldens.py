"""The losses against values computed by other trainers' own code, in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.losses import LOSSES, PairLogps, preference_loss

_DEFAULT = Path(__file__).parent.parent / "goldens" / "preference_losses.json"
_FILES = os.environ.get("OPEN_PO_GOLDENS", str(_DEFAULT)).split(os.pathsep)
# Parameters that no loss takes yet select another formula; `convention` names the one that is implemented.
_CONVENTIONS = {"sft": "token_mean"}


def _cases() -> list[Any]:
    cases = [case for file in _FILES for case in json.loads(Path(file).read_text())["cases"]]
    return [pytest.param(case, id=case["id"]) for case in cases if _is_expressible(case)]


def _is_expressible(case: dict[str, Any]) -> bool:
    if case["loss"] not in LOSSES or case["params"].get("reference_free"):
        return False
    return case["params"].get("convention", "") == _CONVENTIONS.get(case["loss"], "")


def _tensor(case: dict[str, Any], name: str) -> torch.Tensor:
    return torch.tensor(case["inputs"][name], dtype=torch.float64)


@pytest.mark.parametrize("case", _cases())
def test_golden(case: dict[str, Any]) -> None:
    lengths = {f"{side}_tokens": _tensor(case, f"{side}_lengths") for side in ("chosen", "rejected")}
    chosen = _tensor(case, "policy_chosen_logps").requires_grad_()
    rejected = _tensor(case, "policy_rejected_logps").requires_grad_()
    policy = PairLogps(chosen=chosen, rejected=rejected, **lengths)
    reference = PairLogps(
        chosen=_tensor(case, "reference_chosen_logps"), rejected=_tensor(case, "reference_rejected_logps"), **lengths
    )
    parameters = {name: value for name, value in case["params"].items() if name != "convention"}
    output = preference_loss(case["loss"], policy, reference, **parameters)
    grad_chosen, grad_rejected = torch.autograd.grad(
        output.loss, [chosen, rejected], allow_unused=True, materialize_grads=True
    )
    got = {
        "losses": output.losses,
        "loss": output.loss,
        "chosen_rewards": output.chosen_rewards,
        "rejected_rewards": output.rejected_rewards,
        "grad_policy_chosen": grad_chosen,
        "grad_policy_rejected": grad_rejected,
    }
    if case["loss"] == "sft":  # other trainers log beta * logratio, which a loss without reference cannot
        del got["chosen_rewards"], got["rejected_rewards"]
    for name in got.keys() & case["expected"].keys():
        expected = torch.tensor(case["expected"][name], dtype=torch.float64)
        torch.testing.assert_close(got[name].detach(), expected, rtol=case["rtol"], atol=case["atol"], msg=name)


def test_every_loss_has_golden_cases() -> None:
    cases = json.loads(_DEFAULT.read_text())["cases"]
    assert {case["loss"] for case in cases if _is_expressible(case)} == set(LOSSES)
