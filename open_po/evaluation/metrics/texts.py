"""Metrics that compare an answer's words or letters with the reference's, by the field's own packages."""

from __future__ import annotations

from typing import Any

import numpy as np

from open_po.errors import UserError
from open_po.evaluation.bootstrap import Array, Statistics
from open_po.evaluation.metrics.spec import Answered, Tools


def exact_match(answered: Answered) -> list[float]:
    """100 for an answer that is the reference, white space at the ends aside, else 0."""
    pairs = zip(answered.answers, answered.references, strict=True)
    return [100.0 * (answer.strip() == reference.strip()) for answer, reference in pairs]


def chrf(answered: Answered) -> Statistics:
    """chrF2 (Popović 2015) of the corpus, by sacrebleu with its defaults."""
    from sacrebleu.metrics.chrf import CHRF

    return _of_corpus(CHRF(), answered)


def chrf_plus_plus(answered: Answered) -> Statistics:
    """chrF2++ (Popović 2017), which counts words and pairs of words too."""
    from sacrebleu.metrics.chrf import CHRF

    return _of_corpus(CHRF(word_order=2), answered)


def bleu(answered: Answered) -> Statistics:
    """BLEU of the corpus, by sacrebleu with its defaults for the language; an example's own has effective order.

    Raises UserError if the language's tokeniser is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU

    language = answered.tools.target_language
    try:
        corpus, sentence = (BLEU(trg_lang=language, effective_order=own, force=True) for own in (False, True))
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"metrics: bleu cannot tokenise {language} ({_line(error)}); pip install 'sacrebleu[{language}]'"
        ) from error
    found = _of_corpus(corpus, answered)
    return Statistics(rows=found.rows, score=found.score, examples=_scores(sentence, found.rows))


def _of_corpus(metric: Any, answered: Answered) -> Statistics:
    """What sacrebleu counts in each example, and the score that it makes of sums of that: its own bootstrap's way."""
    counts = metric._extract_corpus_statistics(list(answered.answers), [list(answered.references)])
    return Statistics(rows=np.array(counts, dtype=np.float64), score=lambda sums: _scores(metric, sums))


def _scores(metric: Any, sums: Array) -> Array:
    return np.array([metric._compute_score_from_stats(row).score for row in sums.tolist()])


def rouge1(answered: Answered) -> list[float]:
    """ROUGE-1 (Lin 2004): F1 of the words."""
    return _rouge(answered, "rouge1")


def rouge2(answered: Answered) -> list[float]:
    """ROUGE-2: F1 of the pairs of words."""
    return _rouge(answered, "rouge2")


def rouge_l(answered: Answered) -> list[float]:
    """ROUGE-L: F1 of the longest common sequence of words."""
    return _rouge(answered, "rougeL")


def _rouge(answered: Answered, kind: str) -> list[float]:
    """By rouge-score with its defaults, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    pairs = zip(answered.references, answered.answers, strict=True)
    return [100.0 * scorer.score(reference, answer)[kind].fmeasure for reference, answer in pairs]


def meteor(answered: Answered) -> list[float]:
    """METEOR (Banerjee and Lavie 2005) by nltk, words told apart by its tokeniser for English, in percent."""
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    words = NLTKWordTokenizer().tokenize
    pairs = zip(answered.references, answered.answers, strict=True)
    return [100.0 * single_meteor_score(words(reference), words(answer)) for reference, answer in pairs]


def lacks_wordnet(tools: Tools) -> str | None:
    """A line if nltk does not find WordNet."""
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        return None
    return (
        "metrics: meteor needs nltk's WordNet, which is in none of its folders; python -m nltk.downloader wordnet, or "
        "copy it to nltk_data/corpora in your home or where NLTK_DATA says"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
