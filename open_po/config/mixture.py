"""A mixture of data sets: as mappings in `mixture`, or as words in `mixer_list`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

_MOST_REPEATS = 100  # above, a fraction is a count that somebody wrote with a decimal point


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """What a mixture takes of one data set."""

    dataset: str  # a file or a Hub name
    amount: int | float = 1.0  # a count of rows, or a fraction of them; above 1 rows are repeated
    split: str = "train"
    configuration: str | None = None  # of a Hub data set that has several
    format: str | None = None  # a name of open_po/data/formats, or MODULE:FUNCTION; by its columns if left out
    prompt_template: str | None = None  # of the prompt's text, with {column}


_KEYS = tuple(field.name for field in fields(MixturePart))


def parse_mixture(
    items: Sequence[str], splits: Sequence[str], configs: Sequence[str | None] = (None,), field: str = "mixer_list"
) -> list[MixturePart]:
    """`["a", "0.5", "b", "1000"]`, their splits and configurations as parts. Raises ValueError with one line."""
    if not items or len(items) % 2:
        raise ValueError(f"{field}: needs NAME AMOUNT pairs, got {' '.join(items) or 'nothing'}")
    names, amounts = items[::2], items[1::2]
    for kind, given in (("splits", splits), ("configs", configs)):
        if len(given) not in (1, len(names)):
            raise ValueError(
                f"{field}_{kind}: gives {len(given)} {kind} for {len(names)} datasets; give one, or one for each"
            )
    return [
        MixturePart(
            dataset=name,
            amount=_amount(name, text, field),
            split=splits[i % len(splits)],
            configuration=configs[i % len(configs)],
        )
        for i, (name, text) in enumerate(zip(names, amounts, strict=True))
    ]


def typed_mixture(entries: Sequence[Mapping[str, str]], field: str = "mixture") -> list[MixturePart]:
    """Entries of `mixture` as parts. Raises ValueError with one line per problem."""
    problems: list[str] = []
    parts: list[MixturePart] = []
    for number, entry in enumerate(entries, start=1):
        if unknown := [key for key in entry if key not in _KEYS]:
            close = get_close_matches(unknown[0], _KEYS, n=1)
            known = f"known: {', '.join(_KEYS)}; fields of the run stand beside {field}, not in it"
            advice = f"did you mean {close[0]}?" if close else known
            problems.append(f"{field}: entry {number} has the unknown key {unknown[0]}; {advice}")
        elif "dataset" not in entry:
            problems.append(f"{field}: entry {number} has no dataset, a file or a Hub name")
        else:
            try:
                words = dict(entry)
                amount = _amount(entry["dataset"], words.pop("amount", "1.0"), field)
                parts.append(MixturePart(amount=amount, **words))
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return parts


def _amount(name: str, text: str, field: str) -> int | float:
    try:
        amount: int | float = int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"{field}: amount {text!r} of {name} is neither a fraction (0.5) nor a count (1000)") from None
    if amount < 0:
        raise ValueError(f"{field}: amount {text} of {name} must be above 0")
    if isinstance(amount, float) and not 0 < amount <= _MOST_REPEATS:
        raise ValueError(
            f"{field}: fraction {text} of {name} must lie in (0, {_MOST_REPEATS}], above 1 rows are repeated; a count "
            "of rows has no decimal point"
        )
    if amount == 0:
        raise ValueError(f"{field}: amount 0 of {name} takes no rows")
    return amount
