"""All metrics, an entry each, and what a task is measured by if nothing else is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from open_po.evaluation.metrics.spec import MetricSpec

_TEXTS = "open_po.evaluation.metrics.texts"
_MODELS = "open_po.evaluation.metrics.models"
_COMET = "open_po.evaluation.metrics.comet"


def _counted(name: str, function: str, summary: str, package: str, check: str = "") -> MetricSpec:
    """A metric that counts words or letters, by a small package."""
    install = f"pip install {package.replace('_', '-')}"
    return MetricSpec(
        name=name, summary=summary, maker=f"{_TEXTS}:{function}", package=package, install=install, check=check
    )


_SPECS = (
    MetricSpec(name="exact_match", summary="percent of answers that are the reference", maker=f"{_TEXTS}:exact_match"),
    _counted("chrf", "chrf", "chrF2 of the corpus", "sacrebleu"),
    _counted("chrf++", "chrf_plus_plus", "chrF2++ of the corpus, with words and pairs of words", "sacrebleu"),
    _counted("bleu", "bleu", "BLEU of the corpus, tokenised for --target_language", "sacrebleu"),
    _counted("rouge1", "rouge1", "ROUGE-1: mean F1 of words, in percent, no stemming", "rouge_score"),
    _counted("rouge2", "rouge2", "ROUGE-2: of pairs of words", "rouge_score"),
    _counted("rougeL", "rouge_l", "ROUGE-L: of the longest common sequence of words", "rouge_score"),
    _counted("meteor", "meteor", "METEOR with WordNet, mean in percent", "nltk", check=f"{_TEXTS}:lacks_wordnet"),
    MetricSpec(
        name="bertscore",
        summary="BERTScore: mean F1 in percent, not rescaled; --target_language or --bertscore_model",
        maker=f"{_MODELS}:bertscore",
        package="bert_score",
        install="pip install bert-score",
    ),
    MetricSpec(
        name="comet",
        summary="COMET in percent, by the comet-score of another environment; --comet_model, --source_pattern",
        maker=f"{_COMET}:comet",
        check=f"{_COMET}:lacks_program",
    ),
    MetricSpec(
        name="xcomet",
        summary="the same with Unbabel/XCOMET-XL",
        maker=f"{_COMET}:xcomet",
        check=f"{_COMET}:lacks_program",
    ),
    MetricSpec(
        name="reward",
        summary="mean score by --reward_model",
        maker=f"{_MODELS}:reward",
        option="reward_model",
        decimals=3,
    ),
    MetricSpec(
        name="win_rate",
        summary="percent of answers that --reward_model puts above the reference; a tie counts half",
        maker=f"{_MODELS}:win_rate",
        option="reward_model",
    ),
)
METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _SPECS}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a task is measured by."""

    always: tuple[str, ...]
    if_there: tuple[str, ...] = ()  # where what they need is at hand


TASKS = {
    "mt": Task(always=("chrf", "chrf++", "bleu"), if_there=("comet",)),
    "sum": Task(always=("rouge1", "rouge2", "rougeL", "chrf"), if_there=("bertscore",)),
    "exact": Task(always=("exact_match", "chrf")),
}


def metric(name: str) -> MetricSpec:
    """The metric called `name`, or of a user's function `MODULE:FUNCTION`. Raises ValueError with one line."""
    if ":" in name:
        return _custom(name)
    if name not in METRICS:
        close = get_close_matches(name, METRICS, n=1, cutoff=0.5)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(METRICS)}, and MODULE:FUNCTION"
        raise ValueError(f"metrics: there is no {name}; {advice}")
    return METRICS[name]


def _custom(name: str) -> MetricSpec:
    spec = MetricSpec(name=name, summary="", maker=name)
    try:
        fn = spec.fn
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"metrics: {name} cannot be imported ({error}); is its folder in PYTHONPATH?") from error
    if not callable(fn):
        raise ValueError(f"metrics: {name} is no function")
    return spec
