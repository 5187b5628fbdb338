"""Preference metrics with their intervals: of all pairs, by source, and by the lengths of responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_po.data import PairDataset
from open_po.evaluation.bootstrap import Array, Statistics, estimates
from open_po.evaluation.meter import wins
from open_po.losses import MixedLosses
from open_po.losses.types import Divisor
from open_po.output.estimate import Group, Groups
from open_po.output.metrics import REWARD_ACCURACY, REWARD_MARGIN

_QUARTERS = (0.25, 0.5, 0.75)


def reward_statistics(chosen: Any, rejected: Any) -> dict[str, Statistics]:
    """Accuracy and margin of rewards, tensors [P]."""
    chosen, rejected = chosen.detach().cpu(), rejected.detach().cpu()
    return {
        REWARD_ACCURACY: Statistics.mean(wins(chosen, rejected).numpy()),
        REWARD_MARGIN: Statistics.mean((chosen - rejected).double().numpy()),
    }


def loss_statistics(losses: MixedLosses, dataset: PairDataset) -> Statistics:
    """The loss of a data set's pairs, taken as one batch.

    Where a loss couples pairs, each has in every resample the loss that it has beside all of them.
    """
    weights, columns = [], []
    for weight, above, below in _terms(losses, dataset):
        weights.append(weight)
        columns += [above, below]
    rows = np.stack(columns, axis=1)
    return Statistics(rows=rows, score=lambda sums: (sums[:, ::2] / sums[:, 1::2]) @ np.array(weights))


def _terms(losses: MixedLosses, dataset: PairDataset) -> Iterator[tuple[float, Array, Array]]:
    """Weight, numerators and denominators [P] of what the loss is a sum of."""
    pairs = np.ones(len(dataset))
    divisors: Mapping[Divisor, Array] = {
        "pairs": pairs,
        "chosen_tokens": dataset.chosen_tokens.astype(np.float64),
        "prompt_and_chosen_tokens": dataset.prompt_and_chosen_tokens.astype(np.float64),
    }
    for weight, part in zip(losses.weights, losses.parts, strict=True):
        if part.losses is not None:  # one of each pair, or one of each response
            each = part.losses.detach().double().cpu().view(-1, len(dataset)).mean(0)
            yield weight, each.numpy(), pairs
        if part.nll is not None:
            yield weight * part.nll.weight, part.nll.sums.detach().double().cpu().numpy(), divisors[part.nll.divisor]


def break_down(statistics: Mapping[str, Statistics], dataset: PairDataset) -> Groups:
    """Figures with intervals of a data set's pairs and of their parts. Pairs of one prompt are drawn together."""
    drawn = {name: figure.grouped(dataset.prompt_numbers) for name, figure in statistics.items()}

    def group(members: NDArray[np.bool_]) -> Group:
        figures = {name: figure.select(members) for name, figure in drawn.items()}
        return Group(pairs=int(members.sum()), figures=estimates(figures))

    def groups(labels: Mapping[str, NDArray[np.bool_]]) -> dict[str, Group]:
        return {label: group(members) for label, members in labels.items() if members.any()}

    return Groups(
        all=group(np.ones(len(dataset), dtype=bool)),
        by_source=groups(_sources(dataset)),
        by_length=groups(dict(_lengths(np.maximum(dataset.chosen_lengths, dataset.rejected_lengths)))),
        by_longer=groups(_longer(dataset)),
    )


def _sources(dataset: PairDataset) -> dict[str, NDArray[np.bool_]]:
    names = np.repeat([source.dataset for source in dataset.sources], [source.pairs for source in dataset.sources])
    return {name: names == name for name in dict.fromkeys(source.dataset for source in dataset.sources)}


def _lengths(lengths: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Quarters of the pairs, fewer where many are as long."""
    quarters = np.digitize(lengths, np.quantile(lengths, _QUARTERS), right=True)
    for quarter in np.unique(quarters):
        members = quarters == quarter
        low, high = lengths[members].min(), lengths[members].max()
        yield f"longer response of {low}{f' to {high}' if high > low else ''} tokens", members


def _longer(dataset: PairDataset) -> dict[str, NDArray[np.bool_]]:
    """By which response is the longer one; none where a pair has one alone."""
    chosen, rejected = dataset.chosen_lengths, dataset.rejected_lengths
    if not rejected.all():
        return {}
    return {
        "chosen response longer": chosen > rejected,
        "both as long": chosen == rejected,
        "rejected response longer": chosen < rejected,
    }
