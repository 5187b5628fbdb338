"""A trainer without packs, fused kernels or caches, one response at a time: what runs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@dataclass
class Scores:
    """Log-probs of pairs, one tensor per pair, and the responses' token counts."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_squares: Tensor  # sum over the response of log sum_v p(v)^2
    rejected_squares: Tensor
    prompt: Tensor  # log-prob of the prompt's tokens but the first
    prompt_tokens: Tensor

    def take(self, indices: Sequence[int]) -> Scores:
        """Some of the pairs."""
        return Scores(*(value[list(indices)] for value in vars(self).values()))


@dataclass(kw_only=True)
class Recipe:
    """A run, both as flags and as the formulas that the plain trainer follows."""

    loss: Callable[[Scores, Scores], tuple[Tensor, Tensor, Tensor]]  # losses, chosen and rejected rewards of each pair
    flags: dict[str, Any]
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(
        p, weight_decay=0.0
    )
    rate: Callable[[int, int], float] = lambda step, steps: (steps - step) / steps  # after a warm-up of one step
    max_grad_norm: float = 1.0
    tokens_divide: bool = False  # the losses are summed over the step and divided by its chosen tokens


@dataclass
class Plain:
    """A trainer without packs, fused kernels or caches: one response at a time."""

    model: PreTrainedModel
    pairs: list[tuple[list[int], list[int], list[int]]]
    recipe: Recipe
    records: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def of(folder: Path, rows: Sequence[dict[str, str]], recipe: Recipe) -> Plain:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        end = [tokenizer.eos_token_id]
        texts = [[tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected")] for row in rows]
        pairs = [(prompt, chosen + end, rejected + end) for prompt, chosen, rejected in texts]
        return Plain(AutoModelForCausalLM.from_pretrained(folder).eval(), pairs, recipe)

    def score(self, indices: Sequence[int], *, grad: bool) -> Scores:
        with torch.set_grad_enabled(grad):
            sides = [[self._logps(self.pairs[i][0], self.pairs[i][side]) for i in indices] for side in (1, 2)]
        chosen, rejected = ([torch.stack([row[k] for row in side]) for k in range(3)] for side in sides)
        counts = [torch.tensor([len(self.pairs[i][side]) for i in indices]) for side in (1, 2, 0)]
        return Scores(chosen[0], rejected[0], *counts[:2], chosen[1], rejected[1], chosen[2], counts[2] - 1)

    def _logps(self, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob of the response, its summed log of squared probabilities, and the log-prob of the prompt."""
        ids = torch.tensor([prompt + response])
        logps = F.log_softmax(self.model(input_ids=ids).logits[0, :-1], -1)
        own = logps.gather(1, ids[0, 1:, None])[:, 0]
        start = len(prompt) - 1
        squares = torch.log(torch.exp(logps[start:]).square().sum(-1)).sum().detach()
        return own[start:].sum(), squares, own[:start].sum()

    def train(self, steps: list[list[int]], learning_rate: float) -> None:
        reference = self.score(range(len(self.pairs)), grad=False)
        parameters = list(self.model.parameters())
        optimizer = self.recipe.optimizer(parameters)
        for step, indices in enumerate(steps):
            rate = learning_rate * self.recipe.rate(step, len(steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            metrics, loss = self.metrics(indices, reference, grad=True)
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
            for gradient in gradients:
                gradient *= min(1.0, self.recipe.max_grad_norm / (norm + 1e-6))
            optimizer.step()
            self.records.append(metrics | {"grad_norm": norm, "learning_rate": rate})

    def metrics(self, indices: Sequence[int], reference: Scores, *, grad: bool) -> tuple[dict[str, float], Tensor]:
        """The metrics of the pairs `indices`, and the scalar loss; `reference` holds all pairs."""
        policy = self.score(indices, grad=grad)
        losses, chosen, rejected = self.recipe.loss(policy, reference.take(indices))
        loss = losses.sum() / (policy.chosen_tokens.sum() if self.recipe.tokens_divide else len(indices))
        margins = (chosen - rejected).detach()
        losses, chosen, rejected = losses.detach(), chosen.detach(), rejected.detach()
        metrics = {
            "loss": float(loss.detach()),
            "logps/chosen": float(policy.chosen.detach().mean()),
            "logps/rejected": float(policy.rejected.detach().mean()),
            "rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "rewards/average": float((chosen + rejected).mean()) / 2,
            "rewards/accuracy": float((margins > 0).float().mean()),
            "rewards/margin": float(margins.mean()),
            "ties": float((margins.abs() < 1e-4).float().mean()),  # who wins these is a matter of rounding
        }
        return metrics, loss


REJECTED = ("logps/rejected", "rewards/rejected", "rewards/average", "rewards/accuracy", "rewards/margin")


def assert_metrics(got: dict[str, float], expected: dict[str, float]) -> None:
    """Rewards are differences of log-probs near -100 nats, so float32 leaves them, and losses, an absolute error.

    So it leaves gradients of losses that are exponentials of them a relative one.
    """
    ties = expected.pop("ties")
    for name, value in expected.items():
        slack = ties if name.endswith("accuracy") else 2e-5 if "rewards" in name or "loss" in name else 1e-6
        relative = 5e-5 if name == "grad_norm" else 1e-5
        assert got[name] == pytest.approx(value, rel=relative, abs=slack), name
