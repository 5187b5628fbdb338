"""`python -m open_po evaluate`: models whose answers are known, what is written of them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import load_file
from transformers import AutoTokenizer

from open_po.commands import evaluate, evaluate_models
from open_po.evaluation import engines
from open_po.model.scorer import Scorer
from open_po.output.evaluation import Estimate, Evaluation, ModelScores
from open_po.output.score_plot import plot_scores
from tests import cli, tiny
from tests.evaluation import bigrams
from tests.runs.test_samples import naive_answer

Capture = pytest.CaptureFixture[str]
GOOD = {"cat": "runs", "runs": "over", "over": bigrams.END, "dog": "eats", "eats": bigrams.END, "tree": bigrams.END}
BAD = {**GOOD, "dog": "sleeps", "sleeps": bigrams.END, "tree": "house", "house": bigrams.END}
LASTS = ["cat", "dog", "tree", "cat", "dog", "cat", "dog", "dog"]


def rows() -> list[dict[str, str]]:
    """Prompts of different lengths with what GOOD says to all but the last; of an empty answer a single word."""
    found = []
    for number, last in enumerate(LASTS):
        right = bigrams.answer(last, GOOD) or "red"
        chosen = " sees" if number == len(LASTS) - 1 else f" {right}"
        prompt = f"{number} {'the small ' * (number % 4)}{last}"
        found.append({"prompt": prompt, "chosen": chosen, "rejected": " the large blue house"})
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "data.jsonl", rows())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigrams.make(tmp_path_factory.mktemp("models") / "good", GOOD)


@pytest.fixture(scope="module")
def bad(good: Path) -> Path:
    return bigrams.make(good.parent / "bad", BAD)


def run(
    tmp_path: Path,
    models: Sequence[Path],
    data: Path,
    *words: str,
    code: int = 0,
    task: str = "exact",
    plot: bool = False,
) -> Any:
    """Evaluate, without the plot, which takes the most time; what evaluation.json says."""
    out = tmp_path / "out"
    asked = ["--model", *map(str, models), "--task", task, "--data", str(data), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        if not plot:
            patch.setattr(evaluate_models, "plot_scores", lambda evaluation, path: None)
        assert evaluate.main([*asked, "--reference_cache_dir", str(tmp_path / "cache"), *words]) == code
    return json.loads((out / "evaluation.json").read_text()) if code == 0 else None


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each batch had that was answered."""
    sizes: list[int] = []
    answer = Scorer.answer

    def counted(self: Scorer, prompts: Any) -> Any:
        sizes.append(len(prompts.input_ids))
        return answer(self, prompts)

    monkeypatch.setattr(Scorer, "answer", counted)
    return sizes


# ------------------------------------------------------------------------------------------------------------- scores


def test_a_model_is_measured_by_what_it_says(good: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    found = run(tmp_path, [good], data, plot=True)
    shown = capsys.readouterr().out
    expected = [bigrams.answer(row["prompt"], GOOD) for row in rows()]
    references = [row["chosen"].strip() for row in rows()]
    answers = lines(tmp_path / "out" / "answers" / "good.jsonl")
    assert [line["answer"] for line in answers] == expected
    assert [line["reference"] for line in answers] == references
    assert [line["prompt"] for line in answers] == [row["prompt"] for row in rows()]
    right = [float(answer == reference) for answer, reference in zip(expected, references, strict=True)]
    assert sum(right) == 6
    scores = found["models"]["good"]["metrics"]
    assert list(scores) == ["exact_match", "chrf"]
    assert scores["exact_match"]["value"] == 75.0
    assert 25.0 <= scores["exact_match"]["low"] < 75.0 < scores["exact_match"]["high"] <= 100.0
    assert scores["chrf"]["value"] == sacrebleu.CHRF().corpus_score(expected, [references]).score
    assert [line["scores"]["exact_match"] for line in answers] == [100 * each for each in right]
    tokenizer = AutoTokenizer.from_pretrained(good)
    sides = {"generated": expected, "chosen": references, "rejected": ["the large blue house"] * 8}
    for side, texts in sides.items():
        assert found["models"]["good"]["characters"][side] == np.mean([len(text) for text in texts])
        own = np.mean([len(tokenizer(text)["input_ids"]) for text in texts])
        assert found["models"]["good"]["lengths"][side] == pytest.approx(own)
    assert (found["task"], found["data"], found["examples"]) == ("exact", [str(data)], 8)
    assert found["comparisons"] == []
    assert f"75.0 ({scores['exact_match']['low']:.1f} to {scores['exact_match']['high']:.1f})" in shown
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 10_000


def test_two_models_are_compared_on_the_same_examples(good: Path, bad: Path, data: Path, tmp_path: Path) -> None:
    found = run(tmp_path, [good, bad], data, "--metrics", "exact_match")
    assert found["models"]["bad"]["metrics"]["exact_match"]["value"] == 37.5
    (comparison,) = found["comparisons"]
    assert {name: comparison[name] for name in ("metric", "first", "other", "difference")} == {
        "metric": "exact_match",
        "first": "good",
        "other": "bad",
        "difference": -37.5,
    }
    drawn = np.random.default_rng(1).integers(0, 8, (4000, 8))
    lost = np.array([0, 1, 0, 0, 1, 0, 1, 0])  # of the rows that only the first one has right
    low, high = np.percentile(-100 * lost[drawn].mean(1), [2.5, 97.5])
    assert (comparison["low"], comparison["high"]) == (low, high)
    assert 0.001 < comparison["p"] < 0.06
    assert set(lines(tmp_path / "out" / "answers" / "bad.jsonl")[0]["scores"]) == {"exact_match"}


@pytest.mark.parametrize(
    ("task", "metrics"), [("mt", ["chrf", "chrf++", "bleu"]), ("sum", ["rouge1", "rouge2", "rougeL", "chrf"])]
)
def test_a_task_has_its_metrics(
    task: str, metrics: list[str], good: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no comet-score
    assert list(run(tmp_path, [good], data, task=task)["models"]["good"]["metrics"]) == metrics


def test_answers_are_as_long_as_they_may_be(good: Path, data: Path, tmp_path: Path) -> None:
    run(tmp_path, [good], data, "--max_new_tokens", "1")
    expected = [bigrams.answer(row["prompt"], GOOD, 1) for row in rows()]
    assert [line["answer"] for line in lines(tmp_path / "out" / "answers" / "good.jsonl")] == expected


def test_a_metric_of_ones_own(good: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "def words(answered):\n    return [len(answer.split()) for answer in answered.answers]\n"
    (tmp_path / "my_words.py").write_text(module + "def none(answered):\n    return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = run(tmp_path, [good], data, "--metrics", "my_words:words", "exact_match")
    words = [len(bigrams.answer(row["prompt"], GOOD).split()) for row in rows()]
    assert found["models"]["good"]["metrics"]["my_words:words"]["value"] == pytest.approx(np.mean(words))


# ------------------------------------------------------------------------------------------------------------- resume


def test_answers_that_are_there_are_not_made_again(
    good: Path, bad: Path, data: Path, tmp_path: Path, asked: list[int], capsys: Capture
) -> None:
    first = run(tmp_path, [good], data)
    assert sum(asked) == 8
    assert run(tmp_path, [good], data) == first
    assert sum(asked) == 8
    assert "good: 8 of 8 answers are in " in capsys.readouterr().out
    tiny.write_jsonl(data, [*rows(), {"prompt": "one more tree", "chosen": " a", "rejected": " b"}])
    assert run(tmp_path, [good], data)["examples"] == 9
    assert sum(asked) == 9, "one row is new"
    run(tmp_path, [good], data, "--max_new_tokens", "9")
    assert sum(asked) == 18, "asked otherwise"
    elsewhere = tmp_path / "elsewhere" / "good"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(bad)
    run(tmp_path, [tmp_path / "elsewhere" / "good"], data)
    assert sum(asked) == 27, "another model of the same name"


def test_a_run_that_was_stopped_goes_on(
    good: Path, data: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Scorer.answer

    def stopped(self: Scorer, prompts: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, prompts)

    small = ["--reference_max_tokens_per_batch", "30", "--max_new_tokens", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "answer", stopped)
        run(tmp_path, [good], data, *small, code=130)
    path = tmp_path / "out" / "answers" / "good.jsonl"
    there = len(lines(path))
    assert 0 < there == sum(asked) < 8
    with open(path, "a") as file:
        file.write('{"key": "half a li')
    run(tmp_path, [good], data, *small)
    assert sum(asked) == 8
    expected = [bigrams.answer(row["prompt"], GOOD) for row in rows()]
    assert [line["answer"] for line in lines(path)] == expected


def test_a_prompt_is_answered_once_for_all_its_rows(good: Path, tmp_path: Path, asked: list[int]) -> None:
    pairs = [{**rows()[0], "rejected": f" {word}"} for word in ("a", "b", "c")]
    found = run(tmp_path, [good], tiny.write_jsonl(tmp_path / "data.jsonl", [*pairs, *rows()[1:3]]))
    assert sum(asked) == 3
    assert found["examples"] == 5
    assert found["models"]["good"]["metrics"]["exact_match"]["value"] == 80.0


def test_answers_to_other_data_stay(good: Path, data: Path, tmp_path: Path, asked: list[int]) -> None:
    """The file has those of the latest evaluation alone; none is generated again."""
    other = tiny.write_jsonl(tmp_path / "other.jsonl", rows()[:3])
    path = tmp_path / "out" / "answers" / "good.jsonl"
    run(tmp_path, [good], data, "--max_new_tokens", "4")
    first = lines(path)
    run(tmp_path, [good], other, "--max_new_tokens", "5")
    assert (sum(asked), len(lines(path)), len(first)) == (8 + 3, 3, 8)
    assert lines(path.parent / "earlier" / path.name) == first
    for each, count in ((data, "4"), (other, "5"), (data, "4")):
        run(tmp_path, [good], each, "--max_new_tokens", count)
    assert sum(asked) == 8 + 3
    assert lines(path) == first


def test_memory_that_runs_out_halves_a_batch(
    good: Path, data: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Scorer.answer

    def tight(self: Scorer, prompts: Any) -> Any:
        if len(prompts.input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, prompts)

    monkeypatch.setattr(Scorer, "answer", tight)
    assert run(tmp_path, [good], data)["models"]["good"]["metrics"]["exact_match"]["value"] == 75.0
    assert max(asked) <= 3
    assert sum(asked) == 8


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_checkpoints_of_a_run_are_a_curve(
    lora: bool, llama: Path, pairs_file: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    more: dict[str, Any] = {"use_lora": True, "lora_rank": 4, "lora_target_modules": "all-linear"} if lora else {}
    fields = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 3e-2, "save_dtype": "float32", **more}
    output = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    found = run(tmp_path, [output, llama], data, "--checkpoints", "--max_new_tokens", "6")
    names = {"run-step_000002": 2, "run-step_000004": 4, "run": 4, llama.name: None}
    assert {name: scores["step"] for name, scores in found["models"].items()} == names
    assert [each["other"] for each in found["comparisons"][::2]] == list(names)[1:]
    folder = tmp_path / "out" / "answers"
    said = {name: [line["answer"] for line in lines(folder / f"{name}.jsonl")] for name in names}
    assert said["run-step_000004"] == said["run"]
    assert len({tuple(answers) for answers in said.values()}) == 3
    if not lora:  # the weights themselves, in a plain model
        plain, tokenizer = tiny.plain_model(llama), AutoTokenizer.from_pretrained(llama)
        weights = load_file(output / "checkpoints" / "step_000002" / "weights.safetensors")
        plain.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()}, strict=False)
        for row, answer in zip(rows(), said["run-step_000002"], strict=True):
            ids = naive_answer(plain, tokenizer(row["prompt"])["input_ids"], 6)
            assert answer == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "run-step_000002" in capsys.readouterr().out
    alone = run(tmp_path, [output / "checkpoints" / "step_000002"], data, "--max_new_tokens", "6")
    assert list(alone["models"]) == ["run-step_000002"]


def test_checkpoints_that_no_model_can_be_made_of(
    llama: Path, pairs_file: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = cli.train(llama, pairs_file, tmp_path / "run", max_train_steps=1, checkpointing_steps=1)
    checkpoint = output / "checkpoints" / "step_000001"
    state = checkpoint / "trainer_state.json"
    content = state.read_text()

    def line(*words: str) -> str:
        capsys.readouterr()
        run(tmp_path, [checkpoint], data, *words, code=1)
        return cli.only_error(capsys.readouterr().err)

    state.write_text(content.replace('"kind": "single"', '"kind": "fsdp"'))
    assert line().startswith(f"error: {checkpoint}: was written under parallel fsdp, in parts that ")
    state.write_text("{")
    assert line() == f"error: {checkpoint}: is no whole checkpoint; evaluate another one"
    state.write_text(content)
    (checkpoint / "weights.safetensors").write_bytes(b"nothing")
    assert f"{checkpoint / 'weights.safetensors'}: are no weights for {llama} (" in line()
    capsys.readouterr()
    run(tmp_path, [llama], data, "--checkpoints", code=1)
    assert cli.only_error(capsys.readouterr().err) == (
        f"error: --checkpoints: {llama} holds none; a run writes them with checkpointing_steps"
    )


# --------------------------------------------------------------------------------------------------------------- vllm


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in: it ends every answer with a token that ends, and records how it was called."""
    calls: dict[str, Any] = {"prompts": []}

    class LLM:
        def __init__(self, **settings: Any) -> None:
            calls["settings"] = settings

        def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
            calls["sampling"] = vars(sampling)
            calls["prompts"] += [prompt["prompt_token_ids"] for prompt in prompts]
            answers = [[*prompt["prompt_token_ids"][-1:], sampling.stop_token_ids[0]] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(answer))]) for answer in answers]

    module = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm", module)
    return calls


def test_vllm_gets_the_same_token_ids(good: Path, data: Path, tmp_path: Path, vllm: dict[str, Any]) -> None:
    run(tmp_path, [good], data, "--engine", "vllm", "--max_new_tokens", "7")
    assert vllm["settings"] == {
        "model": str(good),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "trust_remote_code": False,
        "tensor_parallel_size": 1,
        "generation_config": "vllm",
    }
    assert vllm["sampling"] == {"temperature": 0.0, "max_tokens": 7, "stop_token_ids": [1], "detokenize": False}
    tokenizer = AutoTokenizer.from_pretrained(good)
    assert vllm["prompts"] == [tokenizer(row["prompt"])["input_ids"] for row in rows()]
    answers = [line["answer"] for line in lines(tmp_path / "out" / "answers" / "good.jsonl")]
    assert answers == LASTS, "without the token that ended them"
    run(tmp_path, [good], data, "--engine", "vllm", "--max_new_tokens", "7")
    assert len(vllm["prompts"]) == 8


def test_vllm_is_taken_by_itself_on_a_gpu_alone(vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one: Any = SimpleNamespace(world_size=1)
    assert engines.choose_engine("auto", one, whole_model=True) == "transformers"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engines.choose_engine("auto", one, whole_model=True) == "vllm"
    assert engines.choose_engine("auto", one, whole_model=False) == "transformers"
    assert engines.choose_engine("transformers", one, whole_model=True) == "transformers"
    assert engines.choose_engine("auto", SimpleNamespace(world_size=2), whole_model=True) == "transformers"  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ("--metrics chrff", 2, "config error: metrics: there is no chrff; did you mean chrf?"),
        ("--metrics reward", 2, "config error: metrics: reward needs --reward_model"),
        ("--learning_rate 1", 2, "config error: learning_rate: evaluate does not train; leave it out"),
        ("--loss_type dpo", 2, "config error: loss_type: evaluate does not train; leave it out"),
        ("--mixer_list a 1.0", 2, "config error: mixer_list: evaluate takes this from --data"),
        (
            "--reference_model_name_or_path a",
            2,
            "config error: reference_model_name_or_path: evaluate reads no",
        ),
        ("--max_seq_lenth 3", 2, "config error: max_seq_lenth: unknown field; did you mean max_seq_length?"),
        ("--engine vllm", 1, "error: --engine vllm: is not installed; pip install vllm, or use transformers"),
        (
            "--metrics comet",
            1,
            "error: metrics: comet needs comet-score, which is not on PATH; ",
        ),
        ("--metrics my_words:none", 1, "error: metrics: my_words:none gives 0 numbers for 8 answers"),
        ("--metrics my_words:bad", 1, "error: metrics: my_words:bad gives no finite number for DATA row 1"),
    ],
)
def test_what_is_refused(
    words: str,
    code: int,
    line: str,
    good: Path,
    data: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    module = "def none(answered):\n    return []\ndef bad(answered):\n    return [float('nan')] * len(answered)\n"
    (tmp_path / "my_words.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_words", None)
    run(tmp_path, [good], data, *words.split(), code=code)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line.replace("DATA", str(data)))


def test_models_and_data_that_are_none(good: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    def line(models: Sequence[Path], asked: Path, *words: str) -> str:
        capsys.readouterr()
        run(tmp_path, models, asked, *words, code=1)
        return cli.only_error(capsys.readouterr().err)

    nowhere = tmp_path / "nowhere"
    assert line([good, nowhere], data) == f"error: --model: {nowhere} is no folder"
    assert (
        line([good, good], data)
        == "error: --model: names " + str(good.resolve()).strip("/").replace("/", "-") + " twice; leave one of them out"
    )
    assert line([good], nowhere).startswith(f"error: {nowhere}: neither a file (")
    assert line([good], data, "--out", str(data)) == f"error: --out {data}: is the data; choose another folder"
    inside = data / "x"
    assert (
        line([good], data, "--out", str(inside)) == f"error: --out {inside}: cannot be made a folder (Not a directory)"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert line([empty], data).startswith(f"error: {empty}: ")
    out = tmp_path / "out" / "answers" / "good.jsonl"
    assert not out.exists(), "it is told before anything is answered"


def test_a_tokenizer_that_leaves_out_other_rows(good: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    """One that knows no word makes longer rows, of which truncation leaves equal responses."""
    other = bigrams.make(tmp_path / "other", GOOD)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(content))
    same = tiny.write_jsonl(
        tmp_path / "same.jsonl", [*rows(), {"prompt": "a dog", "chosen": " eats", "rejected": " eat"}]
    )
    run(tmp_path, [good, other], same, "--max_seq_length", "8", "--max_prompt_length", "5", code=1)
    said = cli.only_error(capsys.readouterr().err)
    assert said.startswith("error: other: its tokenizer leaves out other rows than that of good (")


def test_a_prompt_that_fills_all_positions(data: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tiny.make_model_folder(tmp_path / "gpt2", "gpt2", max_position_embeddings=10)
    run(tmp_path, [model], data, code=1)
    assert "tokens leaves no room for an answer in the model's 10 positions; lower it" in capsys.readouterr().err


def test_two_models_of_one_name_are_told_apart(good: Path, data: Path, tmp_path: Path) -> None:
    other = bigrams.make(tmp_path / "elsewhere" / "good", BAD)
    found = run(tmp_path, [good, other], data)
    assert list(found["models"]) == [f"{good.parent.name}-good", "elsewhere-good"]
    assert {path.stem for path in (tmp_path / "out" / "answers").iterdir()} == set(found["models"])


def test_help_names_every_metric(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in (
        "exact_match",
        "rougeL",
        "xcomet",
        "win_rate",
        "--source_pattern",
        "chrf, chrf++, bleu, comet if",
    ):
        assert name in shown


def test_a_plot_of_any_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(step: int | None, run: str | None, value: float) -> ModelScores:
        estimate = Estimate(value=value, low=value - 2, high=value - 1)  # a corpus metric's may lie outside
        lengths = {"chosen": 5.0, "generated": value / 10}
        return ModelScores(
            model="m",
            run=run,
            step=step,
            metrics={"bleu": estimate, "chrf": estimate},
            lengths=lengths,
            characters=lengths,
        )

    seen: list[list[bool]] = []
    show = FigureCanvasAgg.print_figure

    def watched(self: Any, *words: Any, **more: Any) -> Any:
        seen.append([axes.get_visible() for axes in self.figure.axes])
        return show(self, *words, **more)

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", watched)
    one = {"a": scores(None, None, 30)}
    curve = {f"r-{step}": scores(step, "r", 30 + step) for step in (1, 2, 3)}
    for name, models in {"one": one, "curve": curve, "both": {**one, **curve, "b": scores(9, "q", 31)}}.items():
        evaluation = Evaluation(task="mt", data=["d"], examples=3, max_new_tokens=4, models=models, comparisons=[])
        plot_scores(evaluation, tmp_path / f"{name}.png")
        assert seen.pop() == [True, True, True, False], "two metrics, lengths, and an empty place"
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ranks_share_the_prompts(good: Path, data: Path, tmp_path: Path) -> None:
    words = [
        "--model",
        good,
        "--task",
        "exact",
        "--data",
        data,
        "--out",
        tmp_path / "two",
        "--reference_max_tokens_per_batch",
        "30",
    ]
    words += ["--max_new_tokens", "4", "--reference_cache_dir", tmp_path / "cache"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "open_po", "evaluate"]
    done = subprocess.run(
        [*launch, *map(str, words)], cwd=cli.REPOSITORY, env=cli.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = [line["answer"] for line in lines(tmp_path / "two" / "answers" / "good.jsonl")]
    assert answers == [bigrams.answer(row["prompt"], GOOD) for row in rows()]
    assert done.stdout.count("Evaluation: exact, 8 examples") == 1
