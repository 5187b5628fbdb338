"""A mixture of data sets, as it is written in `mixer_list`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class MixturePart(NamedTuple):
    """What a mixture takes of one data set."""

    name: str
    amount: int | float  # a count of rows, or a fraction of them
    split: str = "train"


def parse_mixture(items: Sequence[str], splits: Sequence[str], field: str = "mixer_list") -> list[MixturePart]:
    """`["a", "0.5", "b", "1000"]` and their split or splits as parts. Raises ValueError with one line."""
    if not items or len(items) % 2:
        raise ValueError(f"{field}: needs NAME AMOUNT pairs, got {' '.join(items) or 'nothing'}")
    names, amounts = items[::2], items[1::2]
    if len(splits) not in (1, len(names)):
        raise ValueError(
            f"{field}_splits: gives {len(splits)} splits for {len(names)} datasets; give one, or one for each"
        )
    each = list(splits) * len(names) if len(splits) == 1 else splits
    return [
        MixturePart(name, _amount(name, text, field), split)
        for name, text, split in zip(names, amounts, each, strict=True)
    ]


def _amount(name: str, text: str, field: str) -> int | float:
    try:
        amount: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"{field}: amount {text!r} of {name} is neither a fraction (0.5) nor a count (1000)") from None
    if isinstance(amount, float) and not 0 < amount <= 1:
        raise ValueError(f"{field}: fraction {text} of {name} must lie in (0, 1]; a count of rows has no decimal point")
    if amount == 0:
        raise ValueError(f"{field}: amount 0 of {name} takes no rows")
    return amount
