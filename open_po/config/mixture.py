"""A mixture of data sets, as it is written in `mixer_list`."""

from __future__ import annotations

from collections.abc import Sequence


def mixture(items: Sequence[str]) -> list[tuple[str, int | float]]:
    """`["a", "0.5", "b", "1000"]` as `[("a", 0.5), ("b", 1000)]`. Raises ValueError with one line."""
    if not items or len(items) % 2:
        raise ValueError(f"needs NAME AMOUNT pairs, got {' '.join(items) or 'nothing'}")
    parts: list[tuple[str, int | float]] = []
    for name, text in zip(items[::2], items[1::2], strict=True):
        try:
            amount: int | float = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise ValueError(f"amount {text!r} of {name} is neither a fraction (0.5) nor a count (1000)") from None
        if isinstance(amount, float) and not 0 < amount <= 1:
            raise ValueError(f"fraction {text} of {name} must lie in (0, 1]; a count of rows has no decimal point")
        if amount == 0:
            raise ValueError(f"amount 0 of {name} takes no rows")
        parts.append((name, amount))
    return parts
