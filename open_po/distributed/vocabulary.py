"""A head whose vocabulary is divided among ranks: the softmax over all of it, joined from their parts.

Every rank has the same hidden states and ends with the same log-probs. `VocabularyShards.enter` and `join` are where
ranks talk: of a gradient to hidden states each has the part of its own columns, and they are summed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


class VocabularyShards:
    """The ranks that divide a head, in the order of their columns."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def local(self, weight: Tensor) -> Tensor:
        """This rank's rows of a weight [V, ...]; gradients reach them."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def local_targets(self, targets: Tensor, columns: int) -> Tensor:
        """Targets counted in this rank's `columns`, below 0 or beyond them for those of others."""
        return targets - torch.distributed.get_rank(self._group) * columns

    def enter(self, hidden: Tensor) -> Tensor:
        """The same hidden states; their gradient is summed over the ranks."""
        return cast(Tensor, _Enter.apply(hidden, self._group))  # type: ignore[no-untyped-call]

    def join(self, picked: Tensor, normalisers: Tensor) -> Tensor:
        """Log-probs [N] of all: `picked` logits [N], 0 on all ranks but one, and log-sum-exps [N] of their columns."""
        return cast(Tensor, _Join.apply(picked, normalisers, self._group))  # type: ignore[no-untyped-call]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, picked: Tensor, normalisers: Tensor, group: ProcessGroup) -> Tensor:
        picked = picked.clone()
        torch.distributed.all_reduce(picked, group=group)
        parts = [torch.empty_like(normalisers) for _ in range(group.size())]
        torch.distributed.all_gather(parts, normalisers.contiguous(), group=group)
        whole = torch.stack(parts).logsumexp(0)
        ctx.save_for_backward((normalisers - whole).exp())
        return picked - whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (share,) = ctx.saved_tensors
        # Every rank goes backwards from the same log-probs, so that none has to be told of another's gradient.
        return grads[0], -grads[0] * share, None
