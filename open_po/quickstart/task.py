"""The task: numbers into English words, a corpus with a systematic flaw, and the pairs that repair it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

# fmt: off
UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
NUMBERS = range(1000, 100_000)
SFT_ROWS, PREFERENCE_ROWS, HELD_OUT_ROWS = 16_000, 8_000, 500
FLAW_RATE = 2 / 3  # share of the compounds that the SFT corpus gets wrong


def number_words(number: int) -> str:
    """The English words of a number from 1 to 999,999, without hyphens and `and`. Raises ValueError."""
    if not 0 < number < 1_000_000:
        raise ValueError(f"{number} does not lie in 1..999999")
    thousands, rest = divmod(number, 1000)
    words = [*_below_thousand(thousands), "thousand"] if thousands else []
    return " ".join(words + _below_thousand(rest))


def _below_thousand(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [UNITS[hundreds], "hundred"] if hundreds else []
    if 0 < rest < 20:
        return [*words, UNITS[rest]]
    tens, ones = divmod(rest, 10)
    return words + ([TENS[tens]] if tens else []) + ([UNITS[ones]] if ones else [])


def swapped_compound(number: int) -> str | None:
    """The answer with the last two digits read the wrong way round, as in 47 `seventy four`: the corpus's flaw.

    None if they make no compound whose swap is one too: a digit is below two, or both are the same.
    """
    tens, ones = divmod(number % 100, 10)
    if tens < 2 or ones < 2 or tens == ones:
        return None
    return number_words(number - number % 100 + 10 * ones + tens)


def teen_for_ty(number: int, rng: random.Random) -> str | None:
    """The answer with one `thirteen` for `thirty` or the other way round; None if it has no such word."""
    twins = dict(zip(UNITS[13:], TENS[3:], strict=True))
    twins |= {ty: teen for teen, ty in twins.items()}
    words = number_words(number).split()
    places = [place for place, word in enumerate(words) if word in twins]
    if not places:
        return None
    place = rng.choice(places)
    return " ".join([*words[:place], twins[words[place]], *words[place + 1 :]])


def left_out_word(number: int, rng: random.Random) -> str | None:
    """The answer without one of its words; None if it has only one."""
    words = number_words(number).split()
    place = rng.randrange(len(words))
    return " ".join(words[:place] + words[place + 1 :]) or None


def misread_digit(number: int, rng: random.Random) -> str:
    """The answer to a number of as many digits that differs in one digit."""
    digits = list(str(number))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "123456789" if d != digits[place]])
    return number_words(int("".join(digits)))


def plausible_mistake(number: int, rng: random.Random) -> str:
    """A wrong answer: the corpus's flaw where it can occur, else one of the other mistakes."""
    swapped = swapped_compound(number)
    if swapped is not None:
        return swapped
    mistakes: list[Callable[[int, random.Random], str | None]] = [teen_for_ty, left_out_word, misread_digit]
    rng.shuffle(mistakes)
    return next(answer for mistake in mistakes if (answer := mistake(number, rng)) is not None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of preference data in layout `text`."""

    prompt: str
    chosen: str
    rejected: str


def _row(number: int, chosen: str, rejected: str) -> Row:
    return Row(prompt=f"{number} in words:", chosen=f" {chosen}", rejected=f" {rejected}")


def preference_row(number: int, rng: random.Random) -> Row:
    """The right answer against a mistake."""
    return _row(number, number_words(number), plausible_mistake(number, rng))


def sft_row(number: int, rng: random.Random) -> Row:
    """The corpus's answer, flawed or not, as chosen; `loss_type: sft` leaves rejected unread."""
    row, swapped = preference_row(number, rng), swapped_compound(number)
    flawed = swapped is not None and rng.random() < FLAW_RATE
    return Row(prompt=row.prompt, chosen=row.rejected, rejected=row.chosen) if flawed else row


def make_rows(seed: int) -> dict[str, list[Row]]:
    """The rows of the files `sft`, `preferences` and `held_out`; no number occurs twice."""
    rng = random.Random(seed)
    numbers = iter(rng.sample(NUMBERS, SFT_ROWS + PREFERENCE_ROWS + HELD_OUT_ROWS))
    plan = {
        "sft": (SFT_ROWS, sft_row),
        "preferences": (PREFERENCE_ROWS, preference_row),
        "held_out": (HELD_OUT_ROWS, preference_row),
    }
    return {name: [make(next(numbers), rng) for _ in range(count)] for name, (count, make) in plan.items()}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
