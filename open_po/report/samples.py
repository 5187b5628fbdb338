"""Answers to the same prompts before and after training, of every run that kept some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from open_po.report.runs import ReportedRun

_CHARACTERS = 1_500_000  # of all samples on a page
_MOST, _FEWEST = 6000, 200  # of a text
_PROMPTS = 40


@dataclass(frozen=True)
class Answer:
    """What a run answered after so many steps."""

    step: int
    text: str
    equals: str  # "chosen" or "rejected", if it is that response word for word


@dataclass(frozen=True)
class Answers:
    """A run's answers to a prompt: the first, the last, and how many lie between."""

    run: int
    first: Answer
    last: Answer | None  # None: there is one alone
    between: int


@dataclass(frozen=True)
class Prompt:
    """A prompt with the responses of its pair, and what the runs answered."""

    prompt: str
    chosen: str
    rejected: str
    origin: str
    answers: list[Answers] = field(default_factory=list)


@dataclass(frozen=True)
class Samples:
    """What the page shows, and what it leaves out."""

    prompts: list[Prompt]
    more_prompts: int
    longest: int  # characters shown of a text


def samples_of(runs: Sequence[ReportedRun]) -> Samples:
    """The samples of runs, by prompt, in the order in which they were kept."""
    found: dict[tuple[str, ...], dict[int, list[Answer]]] = {}
    for number, run in enumerate(runs):
        for record in run.samples:
            step, answer = record.get("training_step"), record.get("answer")
            if not isinstance(step, int) or not isinstance(answer, str):
                continue
            pair = tuple(str(record.get(name) or "") for name in ("prompt", "chosen", "rejected", "origin"))
            _, chosen, rejected, _ = (text.strip() for text in pair)
            named = {rejected: "rejected", chosen: "chosen"}
            equals = named.get(answer.strip(), "") if answer.strip() else ""
            found.setdefault(pair, {}).setdefault(number, []).append(Answer(step, answer, equals))
    shown = dict(list(found.items())[:_PROMPTS])
    texts = sum(3 + 2 * len(by_run) for by_run in shown.values())
    longest = max(_FEWEST, min(_MOST, _CHARACTERS // max(texts, 1)))
    prompts = []
    for pair, by_run in shown.items():
        prompt, chosen, rejected, origin = (_cut(text, longest) for text in pair)
        answers = [_answers(number, given, longest) for number, given in by_run.items()]
        prompts.append(Prompt(prompt, chosen, rejected, origin, answers))
    return Samples(prompts=prompts, more_prompts=len(found) - len(shown), longest=longest)


def _answers(number: int, given: Sequence[Answer], longest: int) -> Answers:
    """A step that was sampled again after a resumption counts once, as it came last."""
    by_step = {answer.step: answer for answer in given}
    steps = sorted(by_step)
    kept = [
        Answer(answer.step, _cut(answer.text, longest), answer.equals)
        for answer in (by_step[step] for step in dict.fromkeys((steps[0], steps[-1])))
    ]
    return Answers(number, kept[0], kept[1] if len(kept) > 1 else None, max(len(steps) - 2, 0))


def _cut(text: str, longest: int) -> str:
    left = len(text) - longest
    return text if left <= 0 else f"{text[:longest]} ... ({left:,} more characters)"
