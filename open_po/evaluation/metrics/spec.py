"""What a metric is told, and what describes one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_po.evaluation.bootstrap import Statistics


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What metrics need besides texts; each has its flag of the same name, but for the first two."""

    device: str = "cpu"
    say: Callable[[str], object] = print  # a line for the user
    reward_model: str | None = None  # a folder or a Hub name
    comet_model: str = "Unbabel/wmt22-comet-da"
    bertscore_model: str | None = None  # None: bert-score's own for the language
    target_language: str = "en"  # of the answers, as `de`
    source_pattern: str | None = None  # a regular expression whose first group is what a prompt asks to translate


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Prompts with a model's answers, and what the data hold of them; texts without white space at their ends."""

    prompts: Sequence[str]  # without special tokens
    answers: Sequence[str]
    references: Sequence[str]  # the chosen responses
    seen: Sequence[str]  # the prompts as the model reads them, special tokens and all
    tools: Tools
    chat_template: str | None = None  # that the prompts were made with, if the model's tokenizer has one

    def __len__(self) -> int:
        return len(self.answers)

    @staticmethod
    def of(answers: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None) -> Answered:
        """Texts from anywhere, for a metric that needs no more."""
        prompts = [""] * len(answers) if prompts is None else prompts
        return Answered(prompts=prompts, answers=answers, references=references, seen=prompts, tools=Tools())


Metric = Callable[[Answered], "Sequence[float] | Statistics"]


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A metric and what it needs. Callers ask the spec and never compare names."""

    name: str
    summary: str
    maker: str  # MODULE:FUNCTION, imported when answers are measured
    package: str = ""  # that it needs, as it is imported
    install: str = ""  # what gets it
    option: str = ""  # of `Tools`, without which it cannot be
    check: str = ""  # MODULE:FUNCTION, a line for what else is lacking, or None, from `Tools`
    decimals: int = 1  # of a figure that is shown

    def lacks(self, tools: Tools, *, quick: bool = False) -> str | None:
        """One line for what it needs and there is not, with what gets it; None if there is all.

        `quick`: as far as that can be told without importing anything.
        """
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"metrics: {self.name} needs {self.package}, which is not installed; {self.install}"
        if self.option and getattr(tools, self.option) is None:
            return f"metrics: {self.name} needs --{self.option}"
        if self.check and not quick:
            check: Callable[[Tools], str | None] = _imported(self.check)
            return check(tools)
        return None

    @property
    def fn(self) -> Metric:
        """What computes it. Raises ImportError or AttributeError if a user's function is not there."""
        return _imported(self.maker)


def _imported(where: str) -> Callable[..., Any]:
    module, _, function = where.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
