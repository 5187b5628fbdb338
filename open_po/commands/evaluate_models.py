"""The work of `python -m open_po evaluate`: questions, answers, scores."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from open_po.commands.evaluated_models import Subject, find_subjects
from open_po.config import RunConfig
from open_po.data.run_data import load_data, prepare_data
from open_po.data.tokenization import tokenizer_digest
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.evaluation.answers import AnswerFile
from open_po.evaluation.bootstrap import Statistics, difference, estimates
from open_po.evaluation.engines import AnswerEngine, TransformersEngine, VllmEngine, choose_engine
from open_po.evaluation.generation import Greedy
from open_po.evaluation.metrics import METRICS, TASKS, Answered, MetricSpec, Tools
from open_po.evaluation.questions import Questions, Texts, read, refuse_other_rows
from open_po.model.generation import end_tokens, generation_settings
from open_po.model_files import adapter_base
from open_po.output.console import Output
from open_po.output.evaluation import Comparison, Evaluation, ModelScores, comparisons_table, scores_table
from open_po.output.files import disk_faults
from open_po.output.progress import Progress
from open_po.output.score_plot import plot_scores

_BUDGET = {"cuda": 65536, "cpu": 8192}  # tokens of a batch, if nothing else is said; halved where memory runs out
_Scores = dict[str, Statistics]  # by the metric's name


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What a model has said, to every question."""

    subject: Subject
    questions: Questions
    file: AnswerFile
    keys: Sequence[str]  # of the answers in its file
    texts: Sequence[str]


def evaluate(config: RunConfig, runtime: Runtime, arguments: argparse.Namespace) -> None:
    """Ask every model, measure what it says, and write and print what came of it."""
    given = dataclasses.replace(arguments.tools, device=runtime.device.type, say=runtime.say)
    runtime.on_main(_check, arguments, given)
    specs = runtime.from_main(_with_those_at_hand, arguments, given)
    subjects = runtime.from_main(find_subjects, arguments.model, config.model, checkpoints=arguments.checkpoints)
    texts: Texts | None = None
    answers: dict[str, _Answers] = {}
    for name, subject in subjects.items():
        own = dataclasses.replace(config, model=subject.model)
        if texts is None:
            data = prepare_data(own, runtime, label="Data")
            texts = Texts.of(data)
        else:
            data = runtime.main_first(load_data, own, Output(quiet=True))
            refuse_other_rows(name, data, next(iter(subjects)), texts)
        answers[name] = _ask(name, subject, Questions.of(data), own, runtime, arguments)
        _free_memory()
    assert texts is not None, "the command line asks for a model"
    runtime.on_main(_conclude, texts, answers, specs, given, arguments, runtime)


def _check(arguments: argparse.Namespace, given: Tools) -> None:
    """Raises UserError, before anything takes long, for what cannot be."""
    out: Path = arguments.out
    if any(out.resolve() == Path(name).resolve() for name in arguments.data):
        raise UserError(f"--out {out}: is the data; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from error
    for spec in arguments.specs:
        if (line := spec.lacks(given)) is not None:
            raise UserError(line)


def _with_those_at_hand(arguments: argparse.Namespace, given: Tools) -> list[MetricSpec]:
    """The metrics that are asked for, or the task's with those of the heavy ones that can be."""
    specs: list[MetricSpec] = list(arguments.specs)
    if arguments.metrics is None:
        heavy = (METRICS[name] for name in TASKS[arguments.task].if_there)
        specs += [spec for spec in heavy if spec.lacks(given) is None]
    return specs


# ------------------------------------------------------------------------------------------------------------- answers


def _ask(
    name: str,
    subject: Subject,
    questions: Questions,
    config: RunConfig,
    runtime: Runtime,
    arguments: argparse.Namespace,
) -> _Answers:
    """The model's answers, those that are on disk and the rest; all ranks call this."""
    runtime.main_first(subject.source.folder)  # one rank downloads it
    numerics = runtime.from_main(subject.numerics, runtime.device)
    engine = runtime.from_main(choose_engine, arguments.engine, runtime, whole_model=subject.is_whole)
    memo = Path(config.reference.reference_cache_dir)
    greedy = Greedy(
        ends=runtime.from_main(_ends, subject, questions),
        pad=questions.pad,
        max_new_tokens=arguments.max_new_tokens,
        budget=_budget(config, runtime),
    )
    settings = {
        "model": runtime.from_main(subject.identity, memo),
        "numerics": numerics.key(),
        "engine": engine,
        "tokenizer": tokenizer_digest(questions.tokenizer),
        "ends": greedy.ends,
        "max_new_tokens": greedy.max_new_tokens,
    }
    keys = questions.keys(json.dumps(settings, sort_keys=True))
    file = AnswerFile(arguments.out / "answers" / f"{name}.jsonl")
    known = runtime.from_main(file.known)
    prompts = {key: prompt for key, prompt in zip(keys, questions.prompts, strict=True) if key not in known}
    if len(prompts) < len(set(keys)):
        runtime.say(f"{name}: {len(set(keys)) - len(prompts):,} of {len(set(keys)):,} answers are in {file.path}")

    def load() -> AnswerEngine:
        if engine == "vllm":
            return VllmEngine(subject.source, numerics, greedy)
        return TransformersEngine(subject.load(runtime.device), greedy, runtime)

    if prompts:
        loaded = runtime.on_every_rank(load)
        names = list(prompts)
        with Progress(runtime.console, f"Answers of {name}", total=len(names), unit="prompts") as bar:
            for answers in loaded.rounds(list(prompts.values())):
                told = read(questions.tokenizer, list(answers.values()))
                fresh = {names[number]: text for number, text in zip(answers, told, strict=True)}
                runtime.on_main(file.add, fresh)
                known |= fresh
                bar.advance(len(fresh))
    return _Answers(subject=subject, questions=questions, file=file, keys=keys, texts=[known[key] for key in keys])


def _ends(subject: Subject, questions: Questions) -> list[int]:
    """What ends an answer. Raises UserError if the model's files cannot be had."""
    source = subject.source
    base = adapter_base(source.folder(), source.trust_remote_code)
    folder = (source if base is None else base).folder()
    try:
        settings = generation_settings(folder, source.trust_remote_code)
    except Exception as error:  # transformers raises whatever a bad folder makes it
        raise UserError(f"{source.name}: its configuration cannot be read ({error})") from error
    return sorted({*end_tokens(settings, questions.tokenizer.eos_token_id), *questions.turn_ends})


def _budget(config: RunConfig, runtime: Runtime) -> int:
    asked = config.reference.reference_max_tokens_per_batch  # of a pass that keeps no activations
    return asked if isinstance(asked, int) else _BUDGET["cuda" if runtime.device.type == "cuda" else "cpu"]


def _free_memory() -> None:
    """Of a model that has gone: the next one, and the metrics' own, need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------------- scores


def _conclude(
    texts: Texts,
    answers: Mapping[str, _Answers],
    specs: Sequence[MetricSpec],
    given: Tools,
    arguments: argparse.Namespace,
    runtime: Runtime,
) -> None:
    """Measure the answers of all models, write what came of it, and print it."""
    optional = set() if arguments.metrics else {*TASKS[arguments.task].if_there}
    scores: dict[str, _Scores] = {name: {} for name in answers}
    measured: list[MetricSpec] = []
    for spec in specs:
        try:
            found = {name: _measure(spec, texts, said.texts, given) for name, said in answers.items()}
        except UserError as error:
            if spec.name not in optional:
                raise
            runtime.say(f"Left out: {error}")
            continue
        measured.append(spec)
        for name, statistics in found.items():
            scores[name][spec.name] = statistics
    evaluation = Evaluation(
        task=arguments.task,
        data=arguments.data,
        examples=len(texts.prompts),
        max_new_tokens=arguments.max_new_tokens,
        models={name: _model_scores(said, texts, scores[name]) for name, said in answers.items()},
        comparisons=_comparisons(scores),
    )
    for name, said in answers.items():
        said.file.write(_records(said, texts, scores[name]))
    out: Path = arguments.out
    with disk_faults(str(out), "answers are kept"):
        evaluation.write(out / "evaluation.json")
        plot_scores(evaluation, out / "evaluation.png")
    decimals = {spec.name: spec.decimals for spec in measured}
    runtime.console.print(scores_table(evaluation, decimals))
    if evaluation.comparisons:
        runtime.console.print(comparisons_table(evaluation, decimals))
    for label, path in (("scores", "evaluation.json"), ("plot", "evaluation.png"), ("answers", "answers")):
        runtime.say(f"{label}: {out / path}")


def _measure(spec: MetricSpec, texts: Texts, said: Sequence[str], given: Tools) -> Statistics:
    """What a metric makes of a model's answers. Raises UserError if it is no number for each."""
    answered = Answered(
        prompts=texts.prompts,
        answers=said,
        references=texts.references,
        seen=texts.seen,
        tools=given,
        chat_template=texts.chat_template,
    )
    found = spec.fn(answered)
    statistics = found if isinstance(found, Statistics) else Statistics.mean(found)
    if len(statistics.rows) != len(said):
        raise UserError(f"metrics: {spec.name} gives {len(statistics.rows)} numbers for {len(said)} answers")
    if not np.isfinite(statistics.rows).all():
        bad = int(np.flatnonzero(~np.isfinite(statistics.rows).all(1))[0])
        raise UserError(f"metrics: {spec.name} gives no finite number for {texts.origins[bad]}")
    return statistics.grouped(texts.groups)


def _model_scores(said: _Answers, texts: Texts, scores: _Scores) -> ModelScores:
    sides = {"chosen": texts.references, "rejected": texts.rejected, "generated": said.texts}
    written = {side: each for side, each in sides.items() if any(each)}  # rows may have no rejected response
    written |= {"generated": said.texts}
    subject = said.subject
    return ModelScores(
        model=str(subject.checkpoint or subject.model.model_name_or_path),
        run=None if subject.run is None else str(subject.run),
        step=subject.step,
        metrics=estimates(scores),
        lengths={side: said.questions.mean_tokens(each) for side, each in written.items()},
        characters={side: float(np.mean([len(text) for text in each])) for side, each in written.items()},
    )


def _comparisons(scores: Mapping[str, _Scores]) -> list[Comparison]:
    """Every other model beside the first, by every metric."""
    (first, own), *others = scores.items()
    return [
        Comparison(
            metric=metric,
            first=first,
            other=name,
            difference=found.value,
            low=found.low,
            high=found.high,
            p=found.p,
        )
        for name, theirs in others
        for metric in own
        for found in [difference(own[metric], theirs[metric])]
    ]


def _records(said: _Answers, texts: Texts, scores: _Scores) -> list[dict[str, object]]:
    """The lines of the file of answers."""
    each = {name: statistics.per_example().tolist() for name, statistics in scores.items()}
    return [
        {
            "origin": texts.origins[number],
            "prompt": texts.seen[number],
            "answer": said.texts[number],
            "reference": texts.references[number],
            "scores": {name: values[number] for name, values in each.items()},
            "key": said.keys[number],
        }
        for number in range(len(said.texts))
    ]
