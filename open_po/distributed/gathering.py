"""Log-probs of which each rank has computed a part, put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch

from open_po.distributed.runtime import Runtime
from open_po.losses import PairLogps


def gather_logps(parts: Iterable[tuple[Sequence[int], PairLogps]], order: Sequence[int], runtime: Runtime) -> PairLogps:
    """The log-probs of the pairs `order`, in that order, of which each rank gives some with their indices."""
    rows: list[tuple[int, dict[str, float]]] = []
    for indices, logps in parts:
        fields = {name: value.tolist() for name, value in vars(logps).items() if value is not None}
        for position, index in enumerate(indices):
            rows.append((index, {name: values[position] for name, values in fields.items()}))
    by_index = dict(chain.from_iterable(runtime.gather(rows)))
    names = by_index[order[0]].keys()
    return PairLogps(
        **{name: torch.tensor([by_index[index][name] for index in order], device=runtime.device) for name in names}
    )
