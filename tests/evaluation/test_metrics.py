"""Metrics give the numbers that the field's own packages give of the same files."""

from __future__ import annotations

import json
import random
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nltk
import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from open_po.errors import UserError
from open_po.evaluation.bootstrap import Statistics
from open_po.evaluation.metrics import METRICS, TASKS, Answered, Tools, metric
from open_po.evaluation.metrics import models as with_models
from tests import tiny

REFERENCES = [
    "The cat sat on the mat, and the dog slept.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "It is raining (again)!",
    "one",
    "A summary of two sentences. The second one is short.",
    "Nothing in common",
]
ANSWERS = [
    "The cat sat on a mat and the dogs slept.",
    "Zwölf Boxer jagen Viktor über den Deich.",
    "It is raining again!",
    "one",
    "The second sentence is short. A summary.",
    "",
]


def value(name: str, answered: Answered) -> float:
    found = metric(name).fn(answered)
    return found.value() if isinstance(found, Statistics) else float(np.mean(found))


def answered(answers: Sequence[str] = ANSWERS, references: Sequence[str] = REFERENCES, **tools: Any) -> Answered:
    prompts = [f"say {number}" for number in range(len(answers))]
    return Answered(prompts=prompts, answers=answers, references=references, seen=prompts, tools=Tools(**tools))


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = (rng.choices(tiny.WORDS, k=rng.randint(1, 12)) for _ in range(count))
    return [" ".join(line) + rng.choice(".!?") for line in words]


TEXTS = {"by hand": (ANSWERS, REFERENCES), "at random": (random_texts(40, 1), random_texts(40, 2))}


# ------------------------------------------------------------------------------------------------ words and letters


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["chrf", "chrf++", "bleu"])
def test_a_corpus_is_scored_as_by_sacrebleu(name: str, texts: tuple[list[str], list[str]]) -> None:
    answers, references = texts
    own = {"chrf": sacrebleu.CHRF(), "chrf++": sacrebleu.CHRF(word_order=2), "bleu": sacrebleu.BLEU()}[name]
    found = metric(name).fn(answered(answers, references))
    assert isinstance(found, Statistics)
    assert found.value() == own.corpus_score(answers, [references]).score
    each = sacrebleu.BLEU(effective_order=True) if name == "bleu" else own
    expected = [
        each.sentence_score(answer, [reference]).score for answer, reference in zip(answers, references, strict=True)
    ]
    assert found.per_example().tolist() == expected


def test_chrf_is_what_its_paper_says() -> None:
    """By hand for one pair: the mean precision and recall of letters in rows of 1 to 6, recall counting twice."""
    answer, reference = "the cat eats", "the cats eat"
    precisions, recalls = [], []
    for length in range(1, 7):
        grams = [[t[i : i + length] for i in range(len(t) - length + 1)] for t in ("thecateats", "thecatseat")]
        same = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
        precisions.append(same / len(grams[0]))
        recalls.append(same / len(grams[1]))
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    assert value("chrf", answered([answer], [reference])) == pytest.approx(
        100 * 5 * precision * recall / (4 * precision + recall)
    )


def test_resamples_of_a_corpus_metric_are_corpus_scores_of_the_drawn_examples() -> None:
    """Not means of sentences' scores."""
    answers, references = random_texts(12, 3), random_texts(12, 4)
    answers[3], answers[7] = references[3], references[7][:-2]
    for name, own in (("bleu", sacrebleu.BLEU()), ("chrf++", sacrebleu.CHRF(word_order=2))):
        found = metric(name).fn(answered(answers, references))
        assert isinstance(found, Statistics)
        for seed in range(5):
            drawn = random.Random(seed).choices(range(12), k=12)
            sums = found.rows[drawn].sum(0)
            expected = own.corpus_score([answers[i] for i in drawn], [[references[i] for i in drawn]]).score
            assert found.score(sums[None])[0] == expected


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name: str, texts: tuple[list[str], list[str]]) -> None:
    answers, references = texts
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    own = [
        scorer.score(reference, answer)[name].fmeasure for answer, reference in zip(answers, references, strict=True)
    ]
    assert value(name, answered(answers, references)) == pytest.approx(100 * np.mean(own), rel=1e-12)


def test_exact_match_passes_over_white_space_at_the_ends_alone() -> None:
    answers = ["one", " one ", "one.", "One", "o ne", ""]
    assert METRICS["exact_match"].fn(answered(answers, ["one"] * 6)) == [100.0, 100.0, 0.0, 0.0, 0.0, 0.0]


def test_bleu_tells_words_apart_as_the_language_does() -> None:
    answers, references = ["我喜欢吃苹果和香蕉"], ["我喜欢吃苹果和梨子"]
    chinese = sacrebleu.BLEU(tokenize="zh").corpus_score(answers, [references]).score
    assert value("bleu", answered(answers, references, target_language="zh")) == chinese > 0
    assert value("bleu", answered(answers, references)) == 0


def test_meteor_is_nltks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a dictionary of one synonym, against the paper's formula by hand."""
    lemma = SimpleNamespace(name=lambda: "kitten")
    words = {"cat": [SimpleNamespace(lemmas=lambda: [lemma])]}
    dictionary = SimpleNamespace(synsets=lambda word: words.get(word, []))
    from nltk.translate import meteor_score

    monkeypatch.setattr(
        meteor_score.single_meteor_score, "__defaults__", (str.lower, nltk.PorterStemmer(), dictionary, 0.9, 3.0, 0.5)
    )
    found = metric("meteor").fn(answered(["a cat runs, slowly"], ["the kitten runs slowly ."]))
    # Of 5 tokens each, cat = kitten, runs, slowly; two chunks: "cat runs" and "slowly", a comma before it.
    precision = recall = 3 / 5
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert found == [pytest.approx(100 * mean * (1 - 0.5 * (2 / 3) ** 3))]


def test_meteor_says_how_to_get_wordnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    line = metric("meteor").lacks(Tools())
    assert line is not None
    assert "python -m nltk.downloader wordnet" in line
    (tmp_path / "corpora" / "wordnet").mkdir(parents=True)
    assert metric("meteor").lacks(Tools()) is None


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A reward model with random weights."""
    tiny.make_tokenizer(tmp_path / "judge")
    config = AutoConfig.for_model("llama", **tiny._SMALL, num_labels=1)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def naive_reward(folder: Path, text: str) -> float:
    """One text alone: the head on the last token's state."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
        return float(model.score(states)[0, -1, 0])


def test_rewards_and_wins_by_a_reward_model(judge: Path) -> None:
    answers, references = ["the cat runs", "a dog", "over the house and under"], ["a dog", "a dog", "the red tree"]
    prompts = ["the small", "blue ", "large"]
    asked = Answered(
        prompts=prompts,
        answers=answers,
        references=references,
        seen=["<s>the small", "blue ", "large"],
        tools=Tools(reward_model=str(judge)),
    )
    expected, others = [], []
    for prompt, answer, reference in zip(["the small ", "blue ", "large "], answers, references, strict=True):
        expected.append(naive_reward(judge, f"<s>{prompt}{answer}</s>"))
        others.append(naive_reward(judge, f"<s>{prompt}{reference}</s>"))
    assert METRICS["reward"].fn(asked) == pytest.approx(expected, abs=1e-5)
    wins = [50.0 if mine == theirs else 100.0 * (mine > theirs) for mine, theirs in zip(expected, others, strict=True)]
    assert METRICS["win_rate"].fn(asked) == wins
    assert wins[1] == 50.0
    assert len(set(wins)) > 1


def test_a_judge_with_a_chat_format_reads_turns(judge: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(judge)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(judge)
    asked = answered(["the cat"], ["a dog"], reward_model=str(judge))
    expected = naive_reward(judge, "user: say 0</s>assistant: the cat</s>")
    assert METRICS["reward"].fn(asked) == [pytest.approx(expected, abs=1e-5)]
    other = Answered(**{**vars(asked), "chat_template": "another"})
    with pytest.raises(UserError, match="has another chat template than the model that is evaluated"):
        METRICS["reward"].fn(other)


def test_what_is_no_reward_model_is_told(judge: Path, llama: Path, tmp_path: Path) -> None:
    for folder, line in (
        (tmp_path / "nowhere", "no model for sequence classification can be loaded ("),
        (llama, "has no weights for score.weight; it is no reward model"),
    ):
        with pytest.raises(UserError) as caught:
            METRICS["reward"].fn(answered(["a"], ["b"], reward_model=str(folder)))
        assert str(caught.value).startswith(f"--reward_model {folder}: {line}")
    assert METRICS["win_rate"].lacks(Tools()) == "metrics: win_rate needs --reward_model"


def test_bertscore_asks_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def score(answers: list[str], references: list[str], **settings: Any) -> Any:
        calls.append((answers, references, settings))
        if settings.get("lang") == "xx":
            raise KeyError("xx")
        return torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]), torch.tensor([0.25, 0.75])

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(score=score))
    asked = answered(["a", "", "b"], ["c", "e", "d"], target_language="de")
    assert with_models.bertscore(asked) == [25.0, 0.0, 75.0]
    assert calls == [(["a", "b"], ["c", "d"], {"lang": "de", "device": "cpu", "batch_size": 16})]
    with pytest.raises(UserError, match=r"bertscore cannot use the model for xx .*--bertscore_model"):
        with_models.bertscore(answered(["a"], ["c"], target_language="xx"))


# -------------------------------------------------------------------------------------------------------------- comet

COMET = """#!{python}
import argparse, json, os, sys
parser = argparse.ArgumentParser()  # the flags of comet/cli/score.py
for flag in ("-s --sources", "-r --references", "--batch_size", "--gpus", "--to_json", "--model"):
    parser.add_argument(*flag.split())
parser.add_argument("-t", "--translations", nargs="+")
for flag in ("--quiet", "--only_system"):
    parser.add_argument(flag, action="store_true")
given = parser.parse_args()
assert "PYTHONPATH" not in os.environ
if given.model == "Unbabel/none":
    print("Traceback\\nException: Unbabel/none is no model", file=sys.stderr)
    sys.exit(1)
assert (given.gpus, given.quiet, given.only_system) == ("0", True, True)
paths = (given.sources, *given.translations, given.references)
lines = [open(path, encoding="utf-8").read().splitlines() for path in paths]
more = "XCOMET" in given.model
rows = [dict(src=s, mt=m, ref=r, COMET=len(m) / 100 + more) for s, m, r in zip(*lines, strict=True)]
json.dump({{given.translations[0]: rows}}, open(given.to_json, "w"))
json.dump(rows, open({log!r}, "w"))
"""


@pytest.fixture
def comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program with comet-score's flags, which gives a hundredth for each letter; what it was given is in its log."""
    program, log = tmp_path / "comet-score", tmp_path / "log.json"
    program.write_text(COMET.format(python=sys.executable, log=str(log)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("OPEN_PO_COMET", str(program))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    return log


def test_comet_is_a_program_of_its_own(comet: Path) -> None:
    prompts = ["Translate.\nEnglish: a cat\nGerman:", "Translate.\nEnglish: two\ndogs\nGerman:"]
    tools = Tools(source_pattern=r"(?s)English: (.*)\nGerman:")
    references = ["Katze", "zwei\nHunde"]
    asked = Answered(prompts=prompts, answers=["eine Katze", ""], references=references, seen=prompts, tools=tools)
    assert METRICS["comet"].lacks(tools) is None
    assert METRICS["comet"].fn(asked) == pytest.approx([10.0, 0.0])
    rows = json.loads(comet.read_text())
    assert [(row["src"], row["mt"], row["ref"]) for row in rows] == [
        ("a cat", "eine Katze", "Katze"),
        ("two dogs", "", "zwei Hunde"),  # a line each
    ]
    assert METRICS["xcomet"].fn(asked) == pytest.approx([110.0, 100.0])


def test_comet_says_what_is_wrong(comet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    asked = answered(["a"], ["b"], comet_model="Unbabel/none", say=said.append)
    with pytest.raises(UserError, match=r"with Unbabel/none has failed \(Exception: Unbabel/none is no model\)"):
        METRICS["comet"].fn(asked)
    assert said[0].startswith("COMET takes the whole prompt for the source;")
    with pytest.raises(UserError, match=r"--source_pattern x\(y\): is nowhere in the prompt 'say 0'"):
        METRICS["comet"].fn(answered(["a"], ["b"], source_pattern="x(y)"))
    for pattern, line in (("a", "has no group"), ("(", "is no regular expression")):
        assert line in str(METRICS["comet"].lacks(Tools(source_pattern=pattern)))
    monkeypatch.setenv("OPEN_PO_COMET", "/nowhere/comet-score")
    assert str(METRICS["comet"].lacks(Tools())).startswith("OPEN_PO_COMET: /nowhere/comet-score is no program; ")
    monkeypatch.delenv("OPEN_PO_COMET")
    monkeypatch.setenv("PATH", "/nowhere")
    assert str(METRICS["comet"].lacks(Tools())).startswith("metrics: comet needs comet-score, which is not on PATH; ")


# ---------------------------------------------------------------------------------------------------------- catalogue


def test_every_entry_names_a_function_and_every_task_metrics() -> None:
    for name, spec in METRICS.items():
        assert callable(spec.fn)
        assert spec.name == name
        assert spec.summary
    for task in TASKS.values():
        assert {*task.always, *task.if_there} <= set(METRICS)


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert metric("rouge1").lacks(Tools(), quick=True) == (
        "metrics: rouge1 needs rouge_score, which is not installed; pip install rouge-score"
    )
    assert str(metric("bertscore").lacks(Tools())).endswith("pip install bert-score")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("chrff", "metrics: there is no chrff; did you mean chrf?"),
        ("wer", "metrics: there is no wer; there are exact_match, chrf, "),
        (
            "no_such_module:fn",
            "metrics: no_such_module:fn cannot be imported (No module named 'no_such",
        ),
        (
            "math:nothing",
            "metrics: math:nothing cannot be imported (module 'math' has no",
        ),
        ("math:pi", "metrics: math:pi is no function"),
    ],
)
def test_names_of_no_metric(name: str, line: str) -> None:
    with pytest.raises(ValueError, match=r"metrics") as caught:
        metric(name)
    assert str(caught.value).startswith(line)


def test_the_documentations_metric_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "add_a_metric.md").read_text()
    code = text.split("```python\n# my_metrics.py\n")[1].split("```")[0]
    (tmp_path / "my_metrics.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    fn = metric("my_metrics:same_numbers").fn
    found = fn(answered(["3 of 4 cats", "no 4", "five"], ["3 cats, 4 dogs", "no 5", "5"]))
    assert found == [100.0, 0.0, 0.0]
