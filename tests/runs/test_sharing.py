"""Shared prompts in whole runs: what is computed once, what that must not change, and memory that runs out."""

from __future__ import annotations

import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import open_po.commands.train
import open_po.model.prepare
import open_po.reference.fill
from open_po.model.layout_check import LayoutChoice, choose_layout
from open_po.model.scorer import Scorer, Scores
from open_po.packing import Layout, PackedBatch, Sampler
from tests import cli, tiny
from tests.plain import Plain, Recipe, assert_metrics
from tests.recipes import LEARNING_RATE, RECIPES, fields_of, sgd
from tests.stores import assert_same, expected_rows, stored

Rows = list[dict[str, str]]


def ranked_rows(lists: Sequence[int] = (3, 2, 7, 1, 3, 2), seed: int = 0) -> Rows:
    """Ranked lists of answers, as pairs of each with the next better one, the best also with the worst; shuffled."""
    rows = []
    for number, size in enumerate(lists):
        texts = tiny.text_rows(size + 1, seed=100 * seed + number)
        answers = [text["chosen"] for text in texts]
        pairs = list(pairwise(answers))
        if size > 1:
            pairs.append((answers[0], answers[-1]))
        prompt = f"{number} {texts[0]['prompt']}"
        rows += [{"prompt": prompt, "chosen": better, "rejected": worse} for better, worse in pairs]
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[index] for index in order]


ROWS = ranked_rows()  # 23 pairs of 6 prompts, of which one has more pairs than a step
PROMPT_NUMBERS = np.array([sorted({row["prompt"] for row in ROWS}).index(row["prompt"]) for row in ROWS])
BATCH = 6
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": LEARNING_RATE}  # AdamW enlarges rounding


def token_counts(folder: Path, rows: Rows) -> dict[tuple[str, str], tuple[int, int]]:
    """Tokens of the prompt and of each distinct response, by their texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sides = {(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")}
    return {
        (prompt, answer): (len(tokenizer(prompt)["input_ids"]), len(tokenizer(answer)["input_ids"]) + 1)
        for prompt, answer in sides
    }


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("ranked") / "ranked.jsonl", ROWS)


class Computed:
    """The packs that reference passes, training and evaluation score, apart from those of the check at start."""

    def __init__(self) -> None:
        self.reference: list[PackedBatch] = []
        self.pairs: list[PackedBatch] = []


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    done = Computed()
    by_token, by_pair = Scorer.token_logprobs, Scorer.score
    checking = False

    def choose(*positional: Any, **named: Any) -> LayoutChoice:
        nonlocal checking
        checking = True
        try:
            return choose_layout(*positional, **named)
        finally:
            checking = False

    def token_logprobs(self: Scorer, batch: PackedBatch) -> Tensor:
        if not checking:
            done.reference.append(batch)
        return by_token(self, batch)

    def score(self: Scorer, batch: PackedBatch, **named: Any) -> Scores:
        done.pairs.append(batch)
        return by_pair(self, batch, **named)

    monkeypatch.setattr(open_po.model.prepare, "choose_layout", choose)
    monkeypatch.setattr(Scorer, "token_logprobs", token_logprobs)
    monkeypatch.setattr(Scorer, "score", score)
    return done


# ------------------------------------------------------------------------------------------------- the reference pass


@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_the_reference_pass_computes_each_distinct_response_once(
    sharing: str, llama: Path, ranked: Path, tmp_path: Path, computed: Computed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the whole data set, and over the held-out pairs, of which some are training pairs."""
    held_out = [*ranked_rows(seed=3)[:5], *ROWS[:4]]
    fields = {"eval_mixer_list": [tiny.write_jsonl(tmp_path / "held_out.jsonl", held_out), "1.0"]}
    fields |= {"reference_max_tokens_per_batch": 120, "max_train_steps": 1, "prompt_sharing": sharing}
    output = cli.train(llama, ranked, tmp_path / "run", **fields)
    counts = token_counts(llama, ROWS + held_out)
    assert len(counts) < 0.6 * 2 * len(ROWS + held_out), "responses are shared: the comparison shows something"
    assert sum(batch.num_responses for batch in computed.reference) == len(counts)
    assert sum(len(batch.target_ids) for batch in computed.reference) == sum(answer for _, answer in counts.values())
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, ROWS + held_out))
    shown = capsys.readouterr().out
    distinct = [len(token_counts(llama, ROWS)), len(counts) - len(token_counts(llama, ROWS))]
    for number in distinct:
        assert f"Reference log-probs: {number} distinct responses in " in shown
    packing = cli.summary(output)["reference"]["packing"]
    assert packing["packs"] == len(computed.reference)
    assert (packing["prompt_tokens_saved"] > 0.3) == (sharing == "auto")


def test_two_ranks_compute_each_distinct_response_once(llama: Path, ranked: Path, tmp_path: Path) -> None:
    words = cli.arguments(llama, ranked, tmp_path / "run", max_train_steps=1, reference_max_tokens_per_batch=90)
    assert cli.forked_ranks(words) == [0, 0]
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, ROWS))  # which fails for a row that comes twice


# ------------------------------------------------------------------------------------------------- pairs of one prompt


def grouped(**fields: Any) -> dict[str, Any]:
    given = {"group_pairs_by_prompt": True, "per_device_train_batch_size": BATCH, "num_epochs": 2}
    return given | fields


def steps_of_prompts() -> list[list[int]]:
    """The pairs of each step of two epochs."""
    sampler = Sampler(num_pairs=len(ROWS), global_batch=BATCH, seed=42, prompt_numbers=PROMPT_NUMBERS)
    return [sampler.step_pairs(step) for step in range(2 * sampler.steps_per_epoch)]


@pytest.mark.parametrize("name", ["dpo", "kto_pair-graph", "orpo-prompt", "wpo-aligned"])
def test_grouped_pairs_train_as_separate_ones(
    name: str, llama: Path, ranked: Path, tmp_path: Path, computed: Computed
) -> None:
    """Equal to a plain trainer that scores every response of every pair on its own, in the same steps."""
    output = cli.train(llama, ranked, tmp_path / "run", **grouped(**fields_of(name)))
    plain = Plain.of(llama, ROWS, Recipe(loss=RECIPES[name][1](), flags={}, optimizer=sgd))
    steps = steps_of_prompts()
    plain.train(steps, learning_rate=LEARNING_RATE)
    cli.assert_close_weights(cli.weights(output), plain.model.state_dict(), cli.weights(llama))
    for mine, expected in zip(cli.steps(output), plain.records, strict=True):
        assert_metrics(mine, {"train_loss" if k == "loss" else k: v for k, v in expected.items()})
    passes = 2 if name.startswith("kto_pair") else 1  # a batch-coupled loss scores a step twice
    for number, indices in enumerate(steps):
        (batch, *_) = computed.pairs[number * passes :]
        counts = token_counts(llama, [ROWS[index] for index in indices])
        assert len(batch.pairs) == len(indices)
        prompts = {prompt: tokens for (prompt, _), (tokens, _) in counts.items()}
        assert len(batch.input_ids) == sum(prompts.values()) + sum(answer for _, answer in counts.values())
    assert cli.summary(output)["train"]["packing"]["prompt_tokens_saved"] > 0.6


@pytest.mark.parametrize("name", ["dpo", "mix-coupled"])
def test_grouped_pairs_take_the_same_steps_on_two_ranks(name: str, llama: Path, ranked: Path, tmp_path: Path) -> None:
    fields = grouped(**fields_of(name))
    one = cli.train(llama, ranked, tmp_path / "one" / "run", **fields)
    more = {"per_device_train_batch_size": BATCH // 2, "max_tokens_per_batch": 100}
    words = cli.arguments(llama, ranked, tmp_path / "two" / "run", **(fields | more))
    assert cli.forked_ranks(words) == [0, 0]
    assert_same_run(tmp_path / "two" / "run", one, llama)


def assert_same_run(mine: Path, theirs: Path, start: Path) -> None:
    cli.assert_close_weights(cli.weights(mine), cli.weights(theirs), cli.weights(start))
    for got, expected in zip(cli.steps(mine), cli.steps(theirs), strict=True):
        for measure in ("train_loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert got[measure] == pytest.approx(expected[measure], rel=1e-5, abs=1e-6), measure


def test_whole_prompts_are_drawn_until_the_batch_is_full(llama: Path, ranked: Path, tmp_path: Path) -> None:
    """Steps are of the same size with and without it, and only with it hold whole prompts."""
    splits = []
    for on in (True, False):
        numbers = PROMPT_NUMBERS if on else None
        sampler = Sampler(num_pairs=len(ROWS), global_batch=BATCH, seed=42, prompt_numbers=numbers)
        steps = [sampler.step_pairs(step) for step in range(sampler.steps_per_epoch)]
        assert [len(step) for step in steps] == [6, 6, 6, 5]
        seen = Counter(prompt for step in steps for prompt in set(PROMPT_NUMBERS[step].tolist()))
        splits.append(sum(count > 1 for count in seen.values()))
        output = cli.train(llama, ranked, tmp_path / str(on), **grouped(group_pairs_by_prompt=on, num_epochs=1))
        plain = Plain.of(llama, ROWS, Recipe(loss=RECIPES["dpo"][1](), flags={}))
        with torch.no_grad():
            first = float(plain.score(steps[0], grad=False).chosen.mean())
        assert cli.steps(output)[0]["logps/chosen"] == pytest.approx(first, rel=1e-5)
    assert splits[0] <= 2, "the one that is larger than a step, and perhaps another that nothing else could replace"
    assert splits[1] >= 4


# --------------------------------------------------------------------------------------- what changes nothing in a step


@pytest.fixture
def only_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model run in rows, as one does whose layers ignore segments."""

    def choose(scorer: Scorer, *positional: Any, **named: Any) -> LayoutChoice:
        choice = choose_layout(scorer, *positional, **named)
        scorer.use_layout("rows")
        return LayoutChoice("rows", choice.difference, choice.responses, {})

    monkeypatch.setattr(open_po.model.prepare, "choose_layout", choose)


@pytest.fixture(scope="module")
def usual(llama: Path, ranked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usual")
    return cli.train(
        llama, ranked, folder / "run", **grouped(eval_mixer_list=[ranked, "7"], checkpointing_steps=3, **SGD)
    )


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"max_tokens_per_batch": 1}, "shared"),
        ({"max_tokens_per_batch": 137, "reference_max_tokens_per_batch": 61}, "shared"),
        ({"prompt_sharing": "on", "gradient_checkpointing": True}, "shared"),
        ({"prompt_sharing": "off"}, "unshared"),
        ({"prompt_sharing": "off", "max_tokens_per_batch": 90}, "unshared"),
        ({"max_tokens_per_batch": 300}, "rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_neither_packs_nor_sharing_change_a_step(
    fields: dict[str, Any],
    layout: Layout,
    usual: Path,
    llama: Path,
    ranked: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if layout == "rows":
        request.getfixturevalue("only_rows")
    output = cli.train(llama, ranked, tmp_path / "run", **grouped(eval_mixer_list=[ranked, "7"], **SGD, **fields))
    assert_same_run(output, usual, llama)
    mine, theirs = (cli.summary(folder) for folder in (output, usual))
    assert (mine["train"]["layout"], theirs["train"]["layout"]) == (layout, "shared")
    for name, value in theirs["eval"].items():
        assert mine["eval"][name] == pytest.approx(value, rel=1e-5, abs=2e-5), name
    counts = ("steps", "pairs", "tokens", "response_tokens")
    assert all(mine["train"][name] == theirs["train"][name] for name in counts)


def test_a_resumed_run_of_grouped_pairs_is_the_same_bit_for_bit(usual: Path, llama: Path, ranked: Path) -> None:
    fields = grouped(eval_mixer_list=[ranked, "7"], checkpointing_steps=3, **SGD)
    fields["reference_cache_dir"] = usual.parent / "reference"
    checkpoint = usual / "checkpoints" / "step_000006"
    again = cli.train(llama, ranked, usual.parent / "again", resume_from_checkpoint=checkpoint, **fields)
    assert cli.equal(cli.weights(again), cli.weights(usual))
    later = [record for record in cli.metrics(usual) if record["training_step"] > 6]
    assert cli.without_perf(cli.metrics(again)) == cli.without_perf(later)
    assert cli.summary(again)["train"]["packing"] == cli.summary(usual)["train"]["packing"]


def test_sharing_may_change_between_a_run_and_its_resumption(usual: Path, llama: Path, ranked: Path) -> None:
    fields = grouped(eval_mixer_list=[ranked, "7"], checkpointing_steps=3, prompt_sharing="off", **SGD)
    fields["reference_cache_dir"] = usual.parent / "reference"
    checkpoint = usual / "checkpoints" / "step_000006"
    other = cli.train(llama, ranked, usual.parent / "other", resume_from_checkpoint=checkpoint, **fields)
    cli.assert_close_weights(cli.weights(other), cli.weights(usual), cli.weights(llama))


def test_the_console_says_how_both_models_are_laid_out(
    llama: Path, ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = tiny.make_model_folder(tmp_path / "reference_model", "bloom", **tiny.ROWS_ONLY["bloom"])
    output = cli.train(llama, ranked, tmp_path / "run", reference_model_name_or_path=reference, max_train_steps=1)
    shown = capsys.readouterr().out
    where = "within [0-9]e-[0-9]{2} nats a token of the model's own forward on [0-9]+ responses"
    assert re.search(rf"^Policy: Layout shared: each prompt is computed once \({where}\)$", shown, re.M)
    reason = "; not shared or unshared: 0 of 2 layers use transformers' attention interface"
    rows = rf"^Reference model: Layout rows: prompts are repeated and rows padded \({where}{reason}\)$"
    assert re.search(rows, shown, re.M)
    assert cli.summary(output)["reference"]["packing"]["prompt_tokens_saved"] == 0
    assert_same(stored(tmp_path / "reference"), expected_rows(reference, ROWS))


@pytest.mark.parametrize("long", [True, False])
def test_the_longest_held_out_pair_counts_too(long: bool, tmp_path: Path) -> None:
    """Rotations of a dynamic RoPE depend on the length of rows beyond 64 tokens: one such row, and none is shared."""
    model = tiny.make_model_folder(tmp_path / "model", "llama_dynamic", **tiny.ROWS_ONLY["llama_dynamic"])
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.text_rows(6))
    held_out = tiny.text_rows(3, seed=1)
    held_out[1]["chosen"] *= 10 if long else 1
    fields = {"eval_mixer_list": [tiny.write_jsonl(tmp_path / "held_out.jsonl", held_out), "1.0"]}
    output = cli.train(model, data, tmp_path / "run", max_train_steps=1, **fields)
    assert cli.summary(output)["train"]["layout"] == ("rows" if long else "shared")
    rows = tiny.text_rows(6) + held_out
    expected = {}
    for row in rows:  # a model of its own for each response, since it remembers the longest row
        for side in ("chosen", "rejected"):
            expected |= expected_rows(model, [row | {"chosen": row[side], "rejected": row[side]}])
    assert_same(stored(tmp_path / "reference"), expected)


@pytest.mark.parametrize("where", ["training", "held out"])
def test_the_check_at_start_compares_the_longest_pair(
    where: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and long positions matter there."""
    training, held_out = tiny.text_rows(6), tiny.text_rows(6, seed=1)
    (training if where == "training" else held_out)[4]["rejected"] *= 8
    checked: list[int] = []

    def choose(scorer: Scorer, pairs: Sequence[Any], *positional: Any, longest: int, pad: int) -> LayoutChoice:
        rows = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
        checked.extend(rows)
        assert max(rows) == longest
        return choose_layout(scorer, pairs, *positional, longest=longest, pad=pad)

    monkeypatch.setattr(open_po.model.prepare, "choose_layout", choose)
    data, other = (tiny.write_jsonl(tmp_path / f"{n}.jsonl", r) for n, r in enumerate((training, held_out)))
    cli.train(llama, data, tmp_path / "run", eval_mixer_list=[other, "1.0"], max_train_steps=1)
    assert len(checked) == 3


def test_all_ranks_take_the_layout_that_each_can(llama: Path, ranked: Path, tmp_path: Path) -> None:
    def choose(scorer: Scorer, pairs: Any, sharing: Any, **named: Any) -> LayoutChoice:
        return choose_layout(scorer, pairs, "off", **named)

    words = cli.arguments(llama, ranked, tmp_path / "run", max_train_steps=1)
    prepare = lambda rank: setattr(open_po.model.prepare, "choose_layout", choose) if rank == 1 else None  # noqa: E731
    assert cli.forked_ranks(words, prepare) == [0, 0]
    assert cli.summary(tmp_path / "run")["train"]["layout"] == "unshared"
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, ROWS))


# ---------------------------------------------------------------------------------------------------- memory that ends


def fail_beyond(tokens: int, error: Callable[[], RuntimeError], after: int = 0) -> None:
    """Let reference passes run out of memory in packs of more than `tokens`, from pack number `after` on."""
    real = open_po.reference.fill.ReferencePass.run
    done = 0

    def run(self: open_po.reference.fill.ReferencePass, *positional: Any) -> None:
        score = self.scorer.token_logprobs

        def limited(batch: PackedBatch) -> Tensor:
            nonlocal done
            done += 1
            if done > after and len(batch.input_ids) > tokens:
                raise error()
            return score(batch)

        self.scorer.token_logprobs = limited  # type: ignore[method-assign]
        try:
            real(self, *positional)
        finally:
            del self.scorer.token_logprobs

    open_po.reference.fill.ReferencePass.run = run  # type: ignore[method-assign]


@pytest.fixture
def restored() -> Iterator[None]:
    real = open_po.reference.fill.ReferencePass.run
    yield
    open_po.reference.fill.ReferencePass.run = real  # type: ignore[method-assign]


def gpu_memory_ends() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def memory_ends() -> RuntimeError:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    )


SAID = re.compile(r"Reference log-probs: out of memory, on with ([0-9,]+) tokens at a time")


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("error", [gpu_memory_ends, memory_ends])
def test_out_of_memory_halves_the_budget_of_the_reference_pass(
    error: Callable[[], RuntimeError],
    after: int,
    llama: Path,
    ranked: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_beyond(45, error, after)
    output = cli.train(llama, ranked, tmp_path / "run", reference_max_tokens_per_batch=100)
    (budget,) = (int(said) for said in SAID.findall(capsys.readouterr().out))
    assert 22 < budget <= 50, "half of the budget, or of the pack that did not fit"
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, ROWS))
    assert cli.summary(output)["reference"]["pairs_computed"] == len(ROWS)


@pytest.mark.usefixtures("restored")
def test_a_single_response_that_does_not_fit_ends_with_one_line(
    llama: Path, ranked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = token_counts(llama, ROWS)
    longest = max(prompt + answer for prompt, answer in counts.values())
    fail_beyond(longest - 1, gpu_memory_ends)
    words = cli.arguments(llama, ranked, tmp_path / "run", reference_max_tokens_per_batch=200)
    line = cli.failure(capsys, words)
    said = f"out of memory in the reference pass, with one response of {longest} tokens, its prompt included (CUDA out"
    assert re.match(rf"error: \S+ranked.jsonl row \d+: {re.escape(said)}", line)
    assert line.endswith("; lower max_seq_length")
    assert cli.summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_out_of_memory_halves_its_budget_alone(
    rank: int, llama: Path, ranked: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = cli.arguments(llama, ranked, tmp_path / "run", reference_max_tokens_per_batch=220, max_train_steps=1)
    assert cli.forked_ranks(words, lambda mine: fail_beyond(60, gpu_memory_ends) if mine == rank else None) == [0, 0]
    assert_same(stored(tmp_path / "reference"), expected_rows(llama, ROWS))


def limit_memory(room: int) -> Callable[[], object]:
    """For `cli.forked`: reference passes get `room` bytes of address space more than the process has."""

    def prepare() -> None:
        real = open_po.reference.fill.ReferencePass.run

        def run(self: open_po.reference.fill.ReferencePass, *positional: Any) -> None:
            score = self.scorer.token_logprobs

            def limited(batch: PackedBatch) -> Tensor:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                soft, hard = resource.getrlimit(resource.RLIMIT_AS)
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
                try:
                    return score(batch)
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

            self.scorer.token_logprobs = limited  # type: ignore[method-assign]
            real(self, *positional)
            del self.scorer.token_logprobs

        open_po.reference.fill.ReferencePass.run = run  # type: ignore[method-assign]

    return prepare


def test_memory_that_really_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An MLP of 8,192 needs 32 MB for each 1,000 tokens and each of its tensors; there is room for some 130 MB."""
    model = tiny.make_model_folder(tmp_path / "model", intermediate_size=8192, num_hidden_layers=1)
    rows = [
        {"prompt": row["prompt"], "chosen": 12 * row["chosen"], "rejected": 9 * row["rejected"]}
        for row in tiny.text_rows(24)
    ]
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    words = cli.arguments(
        model, data, tmp_path / "run", max_train_steps=1, max_seq_length=256, reference_max_tokens_per_batch=5000
    )
    capfd.readouterr()
    assert cli.forked(words, limit_memory(130 * 10**6)) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    budgets = [int(said.replace(",", "")) for said in SAID.findall(shown.out)]
    assert budgets == sorted(budgets, reverse=True) != []
    assert 256 < budgets[-1] < 2500
    packs = cli.summary(tmp_path / "run")["reference"]["packing"]["packs"]
    assert packs > 2
    assert_same(stored(tmp_path / "reference"), expected_rows(model, rows))
