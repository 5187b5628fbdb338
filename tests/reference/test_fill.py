"""The reference pass under kills, several writers and slow file systems: always the same numbers, little repeated."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import open_po.reference.fill
from open_po.commands import cache
from open_po.data import PairDataset
from open_po.data.tokenization import KEY_DTYPE
from open_po.packing import Layout
from open_po.reference.claims import Claims
from open_po.reference.fill import PackPlanner, ReferencePass, ResponsePack, Responses
from open_po.reference.shards import shard_files
from tests import cli, tiny
from tests.packs import datasets, layouts
from tests.stores import Rows, assert_same, expected_rows, rows_in, stored, stores

ROWS = tiny.text_rows(150, seed=5)
BUDGET = 60  # tokens of a pack: a few responses


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "many.jsonl", ROWS)


def build_words(model: Path, data: Path, folder: Path, **fields: Any) -> list[str]:
    """Of `cache build`, with one shard for each pack."""
    given = {"reference_max_tokens_per_batch": BUDGET, "reference_cache_dir": folder / "reference"}
    return ["build", *cli.arguments(model, data, folder / "unused", **(given | fields))]


def before_pass(action: Callable[[ReferencePass], object]) -> None:
    """From now on every pass begins with `action`."""
    real = ReferencePass.run

    def run(self: ReferencePass) -> None:
        action(self)
        real(self)

    ReferencePass.run = run  # type: ignore[method-assign]


def log_scores(log: Path, seconds: float = 0.0) -> None:
    """From now on a line in `log` for each pack of a pass, with how many responses it has; each takes a while."""
    real = ReferencePass._score

    def scored(self: ReferencePass, pack: ResponsePack, *positional: Any) -> int:
        with open(log, "a") as file:
            file.write(f"{len(pack.numbers)}\n")
        time.sleep(seconds)
        return real(self, pack, *positional)

    ReferencePass._score = scored  # type: ignore[method-assign]


def die_in(seconds: float) -> None:
    """SIGKILL this process, whatever it is doing then."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def logged(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def fork(words: list[str], prepare: Callable[[], object]) -> int:
    """Start `cache` with `words` in a fork; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        open_po.reference.fill._SHARD_SECONDS = 0.0
        prepare()
        code = cache.main(words)
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def uninterrupted(llama: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """What one pass stores that nothing disturbs."""
    monkeypatch.setattr(open_po.reference.fill, "_SHARD_SECONDS", 0.0)
    folder = tmp_path / "uninterrupted"
    folder.mkdir()
    assert cache.main(build_words(llama, many, folder)) == 0
    rows = stored(folder / "reference")
    assert_same(rows, expected_rows(llama, ROWS))
    return rows


# ------------------------------------------------------------------------------------------------------------- killed


@pytest.mark.slow
def test_a_pass_killed_twenty_times_repeats_less_than_a_file_a_kill(
    llama: Path, many: Path, tmp_path: Path, uninterrupted: Rows
) -> None:
    """SIGKILL at random moments, while scoring, writing, renaming, claiming; the numbers are the same to the bit."""
    log, rng = tmp_path / "log", random.Random(0)
    words = build_words(llama, many, tmp_path)

    def trap() -> None:
        log_scores(log, 0.01)
        before_pass(lambda _: die_in(rng.uniform(0.0, 0.05)))

    kills = 0
    while kills < 20:
        rng.random()  # forks share what was drawn before
        code = exit_code(fork(words, trap))
        assert code == -signal.SIGKILL, "the pass ended before it was killed: make it longer"
        kills += 1
    assert exit_code(fork(words, lambda: log_scores(log))) == 0
    assert stored(tmp_path / "reference") == uninterrupted
    scored = logged(log)
    assert sum(scored) <= len(uninterrupted) + kills * max(scored)
    (store,) = stores(tmp_path / "reference")
    assert {path.name for path in store.iterdir()} - {path.name for path in shard_files(store)} <= {
        "manifest.json",
        *(path.name for path in store.glob(".*.partial")),
    }, "claims of the dead are gone"


def test_two_ranks_killed_in_the_pass_go_on_to_the_same_numbers(llama: Path, many: Path, tmp_path: Path) -> None:
    """Packs are the same whichever rank computes them, in whatever order, before a kill or after."""
    fields = {"reference_max_tokens_per_batch": BUDGET, "max_train_steps": 1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def by_pack(_: int) -> None:
        open_po.reference.fill._SHARD_SECONDS = 0.0

    def dies(rank: int) -> None:
        """At any moment from its fifth pack on."""
        by_pack(rank)
        real, packs = ReferencePass._score, 0

        def scored(self: ReferencePass, *positional: Any) -> int:
            nonlocal packs
            packs += 1
            if packs == 5:
                die_in(random.uniform(0.0, 0.05))
            time.sleep(0.01)
            return real(self, *positional)

        ReferencePass._score = scored  # type: ignore[method-assign]

    words = {folder: cli.arguments(llama, many, folder / "run", **fields) for folder in (whole, killed)}
    assert cli.forked_ranks(words[whole], by_pack) == [0, 0]
    assert cli.forked_ranks(words[killed], dies) == [-signal.SIGKILL, -signal.SIGKILL]
    some = len(stored(killed / "reference"))
    assert 0 < some < len(stored(whole / "reference"))
    assert cli.forked_ranks([*words[killed], "--resume_from_checkpoint", "auto"], by_pack) == [0, 0]
    assert stored(killed / "reference") == stored(whole / "reference")
    assert cli.equal(cli.weights(killed / "run"), cli.weights(whole / "run"))


# ------------------------------------------------------------------------------------------------------ several writers


def test_four_writers_share_the_work(llama: Path, many: Path, tmp_path: Path, uninterrupted: Rows) -> None:
    words = build_words(llama, many, tmp_path)
    logs = [tmp_path / f"log {number}" for number in range(4)]
    together = multiprocessing.get_context("fork").Barrier(4, timeout=60)

    def prepare(log: Path) -> None:
        log_scores(log, 0.05)
        before_pass(lambda _: together.wait())

    children = [fork(words, partial(prepare, log)) for log in logs]
    assert [exit_code(child) for child in children] == [0] * 4
    assert stored(tmp_path / "reference") == uninterrupted  # which fails for a row that comes twice
    shares = [sum(logged(log)) for log in logs]
    assert sum(shares) <= 1.02 * len(uninterrupted)
    assert min(shares) > 0, "none of them is idle"


def test_what_another_stores_before_a_claim_is_seen_is_not_computed_again(
    llama: Path, many: Path, tmp_path: Path, uninterrupted: Rows
) -> None:
    """One process has chosen its packs; before it claims them another computes, stores and releases them all."""
    words, log = build_words(llama, many, tmp_path), tmp_path / "log"

    def prepare() -> None:
        real = ReferencePass._write_claim

        def late(self: ReferencePass, window: Sequence[ResponsePack]) -> None:
            ReferencePass._write_claim = real  # type: ignore[method-assign]
            assert exit_code(fork(words, lambda: None)) == 0
            log_scores(log)
            real(self, window)

        ReferencePass._write_claim = late  # type: ignore[method-assign]

    assert exit_code(fork(words, prepare)) == 0
    assert logged(log) == []
    assert stored(tmp_path / "reference") == uninterrupted


def test_writers_of_other_data_share_what_they_have_in_common(llama: Path, many: Path, tmp_path: Path) -> None:
    """Other packs, other orders: a response may be computed twice, if at all, and is right."""
    parts = [ROWS[:100], ROWS[50:]]
    files = [tiny.write_jsonl(tmp_path / f"part {number}.jsonl", part) for number, part in enumerate(parts)]
    logs = [tmp_path / f"log {number}" for number in range(2)]
    children = [
        fork(build_words(llama, file, tmp_path), partial(log_scores, log, 0.01))
        for file, log in zip(files, logs, strict=True)
    ]
    assert [exit_code(child) for child in children] == [0, 0]
    found = {key: row for path in shard_files(stores(tmp_path / "reference")[0]) for key, row in rows_in(path).items()}
    assert_same(found, expected_rows(llama, ROWS))
    assert sum(sum(logged(log)) for log in logs) <= 1.05 * len(found)


@pytest.mark.parametrize(
    ("host", "pid", "seconds"), [("elsewhere", "1", 3.0), (None, "dead", 600.0)], ids=["silent", "dead"]
)
def test_a_claim_of_a_process_that_is_gone_holds_nobody_up(
    host: str | None, pid: str, seconds: float, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """A dead one of this machine at once, one of another machine when its time is over."""
    cli.train(llama, pairs_file, tmp_path / "first", mixer_list=[pairs_file, "1"], max_train_steps=1)
    (store,) = stores(tmp_path / "reference")
    every = b"".join(expected_rows(llama, tiny.text_rows(24)))
    if pid == "dead":
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        pid = str(ended.pid)
    key = {"host": host or os.uname().nodename, "pid": pid, "seconds": str(seconds)}
    claim = store / "claim-of-another.safetensors"
    save_file({"keys": np.frombuffer(every, np.uint8).reshape(-1, 16)}, claim, key)
    start = time.monotonic()
    run = cli.train(llama, pairs_file, tmp_path / "second", max_train_steps=1)
    assert cli.summary(run)["reference"]["pairs_computed"] == 23
    passed = time.monotonic() - start
    assert passed < 60 if pid != "1" else passed > 0.9 * seconds
    assert not claim.exists()


def test_a_claim_that_has_ended_and_cannot_be_removed_is_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, in a folder where each may only remove files of their own."""
    claim = tmp_path / "claim-of-another.safetensors"
    save_file({"keys": np.zeros((1, 16), np.uint8)}, claim, {"host": "elsewhere", "pid": "1", "seconds": "60"})
    assert len(Claims(tmp_path).others()) == 1
    os.utime(claim, (0, 0))
    real = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self == claim:
            raise PermissionError(1, "Operation not permitted")
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert Claims(tmp_path).others() == []


def test_a_store_is_not_pruned_while_its_pass_is_planned(
    llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, codes = PackPlanner.plan, []

    def plan(self: PackPlanner, world_size: int) -> list[ResponsePack]:
        (store,) = (tmp_path / "reference").glob("*/")
        words = ["prune", "--dir", str(tmp_path / "reference"), "--key", store.name]
        codes.append(exit_code(fork(words, lambda: None)))
        return real(self, world_size)

    monkeypatch.setattr(PackPlanner, "plan", plan)
    run = cli.train(llama, pairs_file, tmp_path / "run", max_train_steps=1)
    assert cli.summary(run)["reference"]["pairs_computed"] == 24
    assert codes == [1]


def test_claims_are_seen_taken_and_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of this very process number is of a process before it, as in a container that was started again."""
    mine, theirs = Claims(tmp_path), Claims(tmp_path)
    keys = np.frombuffer(bytes(range(48)), dtype=KEY_DTYPE)
    assert mine.others() == []
    theirs.take(keys, 60)
    assert mine.others() == []
    assert not theirs.path.exists()
    real = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    theirs.take(keys, 60)
    monkeypatch.setattr(os, "getpid", lambda: real)
    (seen,) = mine.others()
    assert (seen == keys).all()
    assert theirs.others() == []
    monkeypatch.setattr(os, "getpid", lambda: 1)
    theirs.take(keys[:1], 60)
    monkeypatch.setattr(os, "getpid", lambda: real)
    (seen,) = mine.others()
    assert (seen == keys[:1]).all()
    theirs.path.write_bytes(theirs.path.read_bytes()[:20])  # as another machine may see it for a moment
    assert mine.others() == []
    theirs.release()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- late file systems


@pytest.fixture
def late_renames(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Renamed files have their new name only a second later, as on some network file systems."""
    real = Path.replace
    timers: list[threading.Timer] = []

    def late(self: Path, target: Path) -> Path:
        if not Path(target).name.startswith("rows-"):
            return real(self, target)
        hidden = self.with_name(f".late.{self.name}")
        real(self, hidden)
        timers.append(threading.Timer(1.0, lambda: hidden.exists() and real(hidden, target)))
        timers[-1].start()
        return Path(target)

    monkeypatch.setattr(Path, "replace", late)
    yield
    for timer in timers:
        timer.join()


@pytest.mark.usefixtures("late_renames")
def test_a_file_system_that_renames_late(llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Two ranks: each sees the other's files a second after they were written, or computes their rows again."""
    fields = {"reference_max_tokens_per_batch": 200, "max_train_steps": 1, "per_device_train_batch_size": 2}
    words = cli.arguments(llama, pairs_file, tmp_path / "run", **fields)

    def linger(rank: int) -> None:
        exit_now = os._exit

        def wait(code: int) -> None:
            time.sleep(1.5)
            exit_now(code)

        os._exit = wait  # type: ignore[assignment]  # or the timers would end with the process

    assert cli.forked_ranks(words, linger) == [0, 0]
    (store,) = stores(tmp_path / "reference")
    found = {key: row for path in shard_files(store) for key, row in rows_in(path).items()}
    assert_same(found, expected_rows(llama, tiny.text_rows(24)))


# ---------------------------------------------------------------------------------------------------------------- plans


@given(datasets, st.integers(1, 300), st.integers(1, 4), layouts, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_a_plan_holds_what_is_missing_and_whole_packs_survive_a_kill(
    dataset: PairDataset, budget: int, world_size: int, layout: Layout, random: random.Random
) -> None:
    responses = Responses(dataset)
    planner = PackPlanner(responses=responses, layout=layout, budget=budget, pad=2)
    first = planner.plan(world_size)
    distinct = len(set(dataset.response_numbers.ravel().tolist()))
    assert sorted(number for pack in first for number in pack.numbers.tolist()) == list(range(distinct))
    # Some packs are stored, in no order, and the pass begins again: the others are those of the first plan.
    done = random.sample(range(len(first)), random.randint(0, len(first)))
    for place in done:
        responses.stored[first[place].numbers] = True
    again = planner.plan(world_size)
    left = [pack for place, pack in enumerate(first) if place not in done]
    assert [pack.numbers.tolist() for pack in again] == [pack.numbers.tolist() for pack in left]
    # Single responses are stored, as by a run on other data; then some packs, and the pass begins again.
    responses.stored[:] = [random.random() < 0.5 for _ in range(distinct)]
    missing = [number for number in range(distinct) if not responses.stored[number]]
    partly = planner.plan(world_size)
    assert sorted(number for pack in partly for number in pack.numbers.tolist()) == missing
    done = random.sample(range(len(partly)), random.randint(0, len(partly)))
    for place in done:
        responses.stored[partly[place].numbers] = True
    left = [pack.numbers.tolist() for place, pack in enumerate(partly) if place not in done]
    assert [pack.numbers.tolist() for pack in planner.plan(world_size)] == left


def test_every_rank_has_a_pack(llama: Path) -> None:
    from tests.packs import sized

    dataset = sized([(10, [(5, 6), (7, 8)]), (12, [(9, 4)]), (3, [(9, 9)])])
    planner = PackPlanner(responses=Responses(dataset), layout="shared", budget=1000, pad=2)
    assert len(planner.plan(1)) == 1
    assert len(planner.plan(3)) >= 3


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_a_separate_reference_model_gives_its_memory_back(tmp_path: Path) -> None:
    """80% of its weights' bytes, between the end of its pass and the loading of the policy: 190 MB here."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6}
    big = tiny.make_model_folder(tmp_path / "big", **sizes)
    small = tiny.make_model_folder(tmp_path / "small", seed=1)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.text_rows(6))
    words = cli.arguments(
        small, data, tmp_path / "run", reference_model_name_or_path=big, max_train_steps=1, max_tokens_per_batch=64
    )
    script = f"""
import re, sys, torch
torch.set_num_threads(1)
import open_po.model.prepare, open_po.reference.ensure, open_po.reference.fill
from open_po.commands.train import main
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def note(module, name, what, before):
    real = getattr(module, name)
    def noted(*positional, **named):
        if before: print(what, resident(), file=sys.stderr)
        result = real(*positional, **named)
        if not before: print(what, resident(), file=sys.stderr)
        return result
    setattr(module, name, noted)
note(open_po.reference.ensure, "agreed_identity", "empty", False)
note(open_po.reference.fill.ReferencePass, "run", "used", False)
note(open_po.model.prepare, "load_scorer", "policy", True)
main({words!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=cli.environment())
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: int(line.split()[1]) for line in done.stderr.splitlines() if len(line.split()) == 2}
    weights = (big / "model.safetensors").stat().st_size
    assert weights > 100e6
    assert found["used"] - found["empty"] > 0.8 * weights, "it was in memory"
    assert found["used"] - found["policy"] > 0.8 * weights, "and is gone"
    assert torch.get_num_threads() == 1
