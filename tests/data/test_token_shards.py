"""Tokenisation by processes that are killed, work at the same time, or find what is there damaged."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from open_po.config import MixturePart
from open_po.data import PairDataset, load_pairs, token_shards
from open_po.data.content import cache_folder
from open_po.data.tokenization import Truncation, tokenise
from open_po.errors import UserError
from tests import tiny

LIMITS = Truncation(64, None)
ROWS = 200


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return tiny.make_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., PairDataset]:
    mixture = [MixturePart(dataset=str(tiny.write_jsonl(tmp_path / "x.jsonl", tiny.text_rows(ROWS))))]
    return lambda **more: load_pairs(mixture, tokenizer, LIMITS, **more)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of 10 rows, of which each row takes 5 ms; the prompts that are tokenised, by all processes, in a file."""
    path = tmp_path / "log"
    path.touch()

    def slow(pair: Any, *how: Any) -> Any:
        time.sleep(0.005)
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\t{pair.prompt}\n")
        return tokenise(pair, *how)

    monkeypatch.setattr(token_shards, "tokenise", slow)
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", 10)
    monkeypatch.setattr(token_shards, "_ROWS_PER_WORKER", 1)
    return path


def logged(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def forked(do: Callable[[], object]) -> int:
    """The number of a process that does it."""
    if number := os.fork():
        return number
    try:
        do()
        os._exit(0)
    except BaseException:
        os._exit(1)


def content(pairs: PairDataset) -> list[Any]:
    return [pairs[index] for index in range(len(pairs))]


def expected(load: Callable[..., PairDataset], tmp_path: Path) -> list[Any]:
    """What one process makes of the rows, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other_cache")
        patch.setattr(token_shards, "tokenise", tokenise)
        return content(load(num_workers=1))


def alive(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_tokenisation_goes_on_from_its_shards(
    workers: int, load: Callable[..., PairDataset], log: Path, tmp_path: Path
) -> None:
    """At most a shard of each process is done again, and no process outlives the one that was killed."""
    kills = 2
    for kill in range(1, kills + 1):
        child = forked(lambda: load(num_workers=workers))
        until(lambda kill=kill: len(logged(log)) > kill * 50)  # type: ignore[misc]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        until(lambda: not any(alive(int(number)) for number, _ in logged(log)))
    pairs = load(num_workers=workers)
    assert content(pairs) == expected(load, tmp_path)
    times = Counter(prompt for _, prompt in logged(log))
    assert len(times) == ROWS
    assert sum(times.values()) - ROWS <= kills * 10 * workers
    assert not list(cache_folder().rglob("shards"))


def test_processes_that_start_together_share_the_work(
    load: Callable[..., PairDataset], log: Path, tmp_path: Path
) -> None:
    children = [forked(lambda: load(num_workers=1)) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    done = logged(log)
    assert Counter(prompt for _, prompt in done) == Counter(row["prompt"] for row in tiny.text_rows(ROWS))
    assert len({number for number, _ in done}) == 3
    assert content(load()) == expected(load, tmp_path)
    assert len(logged(log)) == ROWS


def test_a_worker_that_is_killed_is_told_in_one_line(
    load: Callable[..., PairDataset], log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, slow = os.getpid(), token_shards.tokenise

    def killed(pair: Any, *how: Any) -> Any:
        if os.getpid() != parent and len(logged(log)) > 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return slow(pair, *how)

    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "tokenise", killed)
        with pytest.raises(UserError, match=r"a process that tokenises was killed, .* goes on from there"):
            load(num_workers=2)
    before = len(logged(log))
    assert content(load(num_workers=2)) == expected(load, tmp_path)
    assert len(logged(log)) - before <= ROWS - 40


def test_an_error_in_a_worker_is_raised(
    load: Callable[..., PairDataset], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:  # it does not pickle
            super().__init__(f"{one} and {two}")

    def fails(pair: Any, *how: Any) -> Any:
        if len(logged(log)) > 30:
            raise Odd(1, 2)
        with open(log, "a") as file:
            file.write("1\tx\n")
        return tokenise(pair, *how)

    monkeypatch.setattr(token_shards, "tokenise", fails)
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        load(num_workers=2)


@pytest.mark.parametrize("name", ["ids.arrow", "rows.arrow"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_what_is_damaged_is_made_again(
    name: str, how: str, load: Callable[..., PairDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(token_shards, "tokenise", lambda pair, *how: seen.append(pair) or tokenise(pair, *how))
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", 60)
    first = content(load(num_workers=1))
    (path,) = cache_folder().rglob(name)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if how == "cut" else b"")
    for _ in range(2):
        assert content(load(num_workers=1)) == first
        assert len(seen) == 2 * ROWS


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("how", ["cut", "zeros", "empty", "written over"])
def test_a_damaged_shard_is_made_again(
    number: int, how: str, load: Callable[..., PairDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shards that a start before has left, without the files that they become."""
    seen: list[Any] = []
    monkeypatch.setattr(token_shards, "tokenise", lambda pair, *how: seen.append(pair) or tokenise(pair, *how))
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", 50)

    def killed(work: token_shards.Tokenisation) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "_merge", killed)
        with pytest.raises(KeyboardInterrupt):
            load(num_workers=1)
    assert len(seen) == ROWS
    path = next(cache_folder().rglob(f"{number:04d}.arrow"))
    whole = path.read_bytes()
    inner = len(whole) - 8 - 10 - int.from_bytes(whole[-10:-6], "little")  # bytes of batches, before the footer
    damaged = {
        "cut": whole[:-100],
        "zeros": bytes(len(whole)),
        "empty": b"",
        "written over": whole[:8] + b"\xff" * inner + whole[8 + inner :],
    }
    path.write_bytes(damaged[how])
    again = content(load(num_workers=1))
    assert len(seen) == ROWS + 50, "the others stay"
    assert again == expected(load, tmp_path)


def test_a_full_disk_does_not_cost_the_shards(
    load: Callable[..., PairDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_shards, "_SHARD_ROWS", 50)

    def full(batch: Any, writer: Any, tables: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "_part", full)
        with pytest.raises(OSError, match="No space left"):
            load(num_workers=1)
    assert len(list(cache_folder().rglob("000?.arrow"))) == 4
    monkeypatch.setattr(token_shards, "tokenise", lambda *how: pytest.fail("tokenised again"))
    assert len(load(num_workers=1)) > 0


def test_a_format_of_ones_own_is_known_by_its_code(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed code reads the rows anew; in another process, as a module is imported once."""
    monkeypatch.syspath_prepend(tmp_path)
    data = str(tiny.write_jsonl(tmp_path / "x.jsonl", [{"text": "q"}]))
    found: list[Sequence[int]] = []
    for answer in ("good", "better"):
        (tmp_path / "rows_of_mine.py").write_text(
            "from open_po.data.formats import TextPair\n"
            f"def read(row):\n    return TextPair(row['text'], {answer!r}, 'bad')\n"
        )

        def check(answer: str = answer) -> None:
            pairs = load_pairs([MixturePart(dataset=data, format="rows_of_mine:read")], tokenizer, LIMITS)
            assert tokenizer.decode(pairs[0].chosen_ids, skip_special_tokens=True) == answer

        assert os.waitstatus_to_exitcode(os.waitpid(forked(check), 0)[1]) == 0, answer
        found.append([path.stat().st_ino for path in cache_folder().rglob("ids.arrow")])
    assert [len(each) for each in found] == [1, 2]
