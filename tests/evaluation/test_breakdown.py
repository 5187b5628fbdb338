"""Held-out metrics with intervals: the same figures as without, of each part those of that part alone."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from open_po.config import load_config
from open_po.data import PreferencePair
from open_po.data.turns import Turns
from open_po.evaluation.breakdown import break_down, loss_statistics, reward_statistics
from open_po.losses import Counts, LossMix, PairLogps
from open_po.output.metrics import LOSS, REWARD_ACCURACY, REWARD_MARGIN
from open_po.output.summary import PartTotals, RunSummary
from open_po.output.tables import groups_table
from open_po.training.trainer import Trainer
from tests import cli, tiny
from tests.packs import dataset_of


def pairs(count: int, seed: int = 0) -> Any:
    """A data set of two sources, in which every third pair has the prompt of the one before it."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(rng.randint(low, high))]

    prompts = [ids(1, 9) for _ in range(count)]
    for number in range(2, count, 3):
        prompts[number] = prompts[number - 1]
    # Of some prompts a turn is scored too, and of some answers one is not.
    turns = [Turns(((1, len(prompt)),), ((0, 1),)) if len(prompt) > 3 else Turns() for prompt in prompts]
    sides = [(ids(2, 14), ids(1, 14)) for _ in prompts]
    dataset = dataset_of(
        [PreferencePair(prompt, *side, turn) for prompt, side, turn in zip(prompts, sides, turns, strict=True)]
    )
    first = count // 3
    sources = [
        PartTotals(
            dataset=name, name=name, format="text", available=pairs, rows=pairs, repeated=0, left_out={}, pairs=pairs
        )
        for name, pairs in (("a.jsonl", first), ("b.jsonl", count - first))
    ]
    return dataclasses.replace(dataset, sources=sources)


def logps(dataset: Any, seed: int) -> PairLogps:
    """Log-probs with all that any loss asks for."""
    torch.manual_seed(seed)
    scored = torch.tensor(dataset.scored).float()
    chosen, rejected = scored[:, 0] + scored[:, 1], scored[:, 0] + scored[:, 2]
    prompts = torch.tensor(dataset.prompt_lengths).float() - scored[:, 0]  # what is not scored with its responses
    return PairLogps(
        chosen=-chosen * torch.rand(len(dataset)) * 2,
        rejected=-rejected * torch.rand(len(dataset)) * 2,
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        prompt=-prompts * torch.rand(len(dataset)),
        prompt_tokens=prompts - 1,
    )


def mix(*flags: str) -> LossMix:
    return load_config(["--model_name_or_path", "m", "--mixer_list", "d", "1.0", *flags]).loss.mix()


MIXES = {
    "dpo": ["--loss_type", "dpo"],
    "nll": ["--loss_type", "cpo"],
    "by token": ["--loss_type", "sft"],
    "two responses": ["--loss_type", "nca_pair"],
    "mix": ["--loss_type", "dpo_norm", "sft", "--loss_weights", "1.0", "0.3"],
    "slic": ["--loss_type", "slic"],
}


@pytest.mark.parametrize("flags", MIXES.values(), ids=MIXES)
def test_the_loss_of_all_pairs_and_of_some_is_what_the_formula_says(flags: list[str]) -> None:
    dataset = pairs(30)
    policy, reference, loss = logps(dataset, 1), logps(dataset, 2), mix(*flags)
    losses = loss(policy, reference)
    found = loss_statistics(losses, dataset)
    assert found.value() == pytest.approx(float(losses.value(Counts.of(policy))), rel=1e-6)
    some = [0, 3, 4, 11, 20, 29]
    theirs = policy.select(some, torch.device("cpu"))
    alone = loss(theirs, reference.select(some, torch.device("cpu"))).value(Counts.of(theirs))
    chosen = np.isin(np.arange(30), some)
    assert found.select(chosen).value() == pytest.approx(float(alone), rel=1e-5)


def test_every_part_has_its_own_figures() -> None:
    dataset = pairs(60, seed=4)
    torch.manual_seed(5)
    chosen, rejected = torch.randn(60), torch.randn(60)
    rejected[7] = chosen[7]  # a tie
    groups = break_down(reward_statistics(chosen, rejected), dataset)
    longer = np.maximum(dataset.chosen_lengths, dataset.rejected_lengths)

    def expected(members: list[int]) -> tuple[int, float, float]:
        right = [0.5 if chosen[i] == rejected[i] else float(chosen[i] > rejected[i]) for i in members]
        return len(members), sum(right) / len(members), float((chosen - rejected)[members].double().mean())

    def told(group: Any) -> tuple[int, float, float]:
        return group.pairs, group.figures[REWARD_ACCURACY].value, pytest.approx(group.figures[REWARD_MARGIN].value)

    assert told(groups.all) == expected(list(range(60)))
    assert list(groups.by_source) == ["a.jsonl", "b.jsonl"]
    assert told(groups.by_source["a.jsonl"]) == expected(list(range(20)))
    assert told(groups.by_source["b.jsonl"]) == expected(list(range(20, 60)))
    for label, sign in (("chosen response longer", 1), ("both as long", 0), ("rejected response longer", -1)):
        members = [i for i in range(60) if np.sign(dataset.chosen_lengths[i] - dataset.rejected_lengths[i]) == sign]
        assert told(groups.by_longer[label]) == expected(members)
    assert sum(group.pairs for group in groups.by_length.values()) == 60
    assert len(groups.by_length) == 4
    start = 0
    for label, group in groups.by_length.items():
        low, high = int(label.split()[3]), int(label.split()[-2])
        members = [i for i in range(60) if low <= longer[i] <= high]
        assert told(group) == expected(members)
        assert low > start
        start = high
    for group in (groups.all, *groups.parts().values()):
        for estimate in group.figures.values():
            assert estimate.low <= estimate.value <= estimate.high


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Three copies of every pair say no more than one does."""
    items = [PreferencePair([5, number], [7, 8], [9]) for number in range(12)]
    torch.manual_seed(6)
    chosen, rejected = torch.randn(12), torch.randn(12)
    once = break_down(reward_statistics(chosen, rejected), dataset_of(items))
    thrice = break_down(reward_statistics(chosen.repeat(3), rejected.repeat(3)), dataset_of(items * 3))
    for name in (REWARD_ACCURACY, REWARD_MARGIN):
        one, three = once.all.figures[name], thrice.all.figures[name]
        assert (one.low, one.high) == pytest.approx((three.low, three.high))


def test_the_table_names_sources_only_where_there_are_several() -> None:
    dataset = pairs(30)
    statistics = reward_statistics(torch.randn(30), torch.randn(30))
    table = groups_table(break_down(statistics, dataset), "Held out")
    assert [column.header for column in table.columns] == ["pairs", "count", "rewards accuracy", "rewards margin"]
    labels = [str(cell) for cell in table.columns[0].cells]
    assert labels[:3] == ["all", "a.jsonl", "b.jsonl"]
    alone = dataclasses.replace(dataset, sources=[dataclasses.replace(dataset.sources[0], pairs=30)])
    labels = [str(cell) for cell in groups_table(break_down(statistics, alone), "x").columns[0].cells]
    assert "a.jsonl" not in labels


# --------------------------------------------------------------------------------------------------------- of a run


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    held_out = [
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.text_rows(count, seed=count))
        for name, count in (("one", 9), ("two", 14))
    ]
    mixer = [word for path in held_out for word in (path, "1.0")]
    return {"eval_mixer_list": mixer, "max_train_steps": 3, "loss_type": ["dpo", "sft"], "beta": 1.0}


def test_a_run_ends_with_intervals_of_its_last_evaluation(
    llama: Path, pairs_file: Path, fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cli.train(llama, pairs_file, tmp_path / "run", **fields, sample_during_eval=2, sample_max_new_tokens=5)
    shown = capsys.readouterr().out
    summary = cli.summary(run)
    figures = summary["held_out"]["all"]["figures"]
    for name in (LOSS, REWARD_ACCURACY, REWARD_MARGIN):
        assert figures[name]["value"] == pytest.approx(summary["eval"][name], rel=1e-5)
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
        if name != REWARD_ACCURACY:  # which may be that of every pair
            assert figures[name]["low"] < figures[name]["high"]
        same = figures[name]["low"] == figures[name]["high"]
        assert f"({'all alike' if same else '{low:.4f} to {high:.4f}'.format(**figures[name])})" in shown
    sources = summary["held_out"]["by_source"]
    assert {Path(name).name: group["pairs"] for name, group in sources.items()} == {"one.jsonl": 9, "two.jsonl": 14}
    assert "Held out, with 95% intervals" in shown
    rows = [
        json.loads(line) for name in ("one", "two") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    for side in ("chosen", "rejected"):  # each with its EOS, and behind the prompt
        lengths = [
            len(tokenizer(row["prompt"] + row[side])["input_ids"]) + 1 - len(tokenizer(row["prompt"])["input_ids"])
            for row in rows
        ]
        assert summary["eval"][f"lengths/{side}"] == pytest.approx(np.mean(lengths))
    assert 1 <= summary["eval"]["lengths/generated"] <= 5
    records = cli.metrics(run)
    assert records[0]["eval/lengths/chosen"] == records[-1]["eval/lengths/chosen"]
    assert "mean tokens" in shown
    read = RunSummary.read(run / "run_summary.json")
    assert read is not None
    assert read.result is not None
    assert read.result.held_out is not None
    assert dataclasses.asdict(read.result.held_out) == summary["held_out"]


@pytest.mark.slow
def test_a_run_that_was_stopped_after_its_last_evaluation_has_them_too(
    llama: Path, pairs_file: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    more = {**fields, "checkpointing_steps": 3, "resume_from_checkpoint": "auto"}
    whole = cli.train(llama, pairs_file, tmp_path / "whole", **more)
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **more)

    def prepare() -> None:
        finish = Trainer.held_out_groups

        def trap(self: Trainer) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)
            return finish(self)

        Trainer.held_out_groups = trap  # type: ignore[method-assign]

    assert cli.forked(words, prepare) == -signal.SIGKILL
    assert cli.forked(words) == 0
    assert cli.summary(tmp_path / "run")["held_out"] == cli.summary(whole)["held_out"]
    assert len(cli.metrics(tmp_path / "run")) == len(cli.metrics(whole)), "it is not written as an evaluation"
