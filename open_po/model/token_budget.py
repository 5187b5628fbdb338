"""How many tokens go through a model at a time where the configuration says `auto`.

Where memory decides, on CUDA, it is what fills the room that is left. Where speed does, on a CPU, small packs stay in
the caches and large ones waste less: a short measurement finds the smallest that is about as fast as any. What was
measured is kept, so that a run gives the same numbers twice, and the runs of a sweep do not each measure beside others.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_po.distributed.runtime import Runtime
from open_po.model.memory import room_bytes
from open_po.model.scorer import Scorer
from open_po.output.files import write_atomically

SMALLEST = 1024  # tokens; less was never faster
_GAIN = 0.03  # by so much more tokens must be faster, or fewer are taken, which need less memory
_TURNS = 3  # in which two budgets are timed one after the other; the least time of each counts
_SHARE, _MOST = 0.02, 10.0  # of a pass's time that a measurement may take, and the most seconds
_OF_SHORT, _LEAST = 0.1, 3.0  # the same of a pass so short that these are more: what is found is kept for the next
_PAIRS = 3  # a pack holds so many of mean length where nothing is measured
_FULL = 0.9  # of the memory that is free; the rest is lost between tensors
_STEP = 256  # a budget that memory decides is a multiple of this


class Timing(NamedTuple):
    """What a trial took, on the slowest rank."""

    seconds: float
    tokens: int


Trial = Callable[[int, int], Timing]  # so many tokens of the data, at least one pair, in packs of a budget: its time


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What there is to compute, the same on all ranks; in tokens."""

    together: int  # that could go into one pack: a step's, or all that a rank computes
    total: int  # of the whole pass, on a rank
    pair: int  # of a mean pair
    longest: int  # row


class TokenBudget(NamedTuple):
    """A budget and where it comes from."""

    tokens: int
    reason: str

    def describe(self, name: str) -> str:
        """One line."""
        return f"{name}: auto, {self.tokens:,} tokens ({self.reason})"


def candidates(most: int) -> list[int]:
    """Powers of two from `SMALLEST` to the first that holds `most` tokens."""
    found = [SMALLEST]
    while found[-1] < most:
        found.append(2 * found[-1])
    return found


def usual(pair: int) -> int:
    """What is taken where nothing is measured: the least power of two that holds a few pairs of mean length."""
    return candidates(_PAIRS * pair)[-1]


class Search(NamedTuple):
    """What a search for a budget came to."""

    best: int
    timed: list[int]  # budgets that were compared, ascending
    short: int | None = None  # the budget at which memory ran out, if it did

    def describe(self) -> str:
        """Why `best` is it."""
        lacking = "" if self.short is None else f"memory ran out at {self.short:,}"
        if len(self.timed) < 2:
            return lacking
        *others, last = (f"{budget:,}" for budget in self.timed)
        found = f"measured: the smallest of {', '.join(others)} and {last} that is about as fast as any"
        return f"{found}; {lacking}" if lacking else found


def fastest(budgets: Sequence[int], trial: Trial, total: int) -> Search | None:
    """The smallest of ascending `budgets` that is about as fast as any.

    Each is timed against the next one, on the same pairs and in turns, as long as more tokens are faster: so no pack is
    more than twice as large as what is chosen. A trial that memory does not suffice for, whose time is infinite, ends
    the search. None if the time for this, by the `total` of the pass, is too short.
    """
    probes = [trial(budgets[0], 1) for _ in range(2)]  # the first pass of a process is slower
    spent = sum(probe.seconds for probe in probes)
    before = best = budgets[0]
    timed: list[int] = []
    if spent == math.inf:
        return Search(best, timed, best)
    rate = max(1e-9, *(probe.tokens / probe.seconds for probe in probes))  # tokens a second
    for larger in budgets[1:]:
        limit = min(_MOST, max(_SHARE * total / rate, min(_LEAST, _OF_SHORT * total / rate)))
        least = {best: math.inf, larger: math.inf}
        for _ in range(_TURNS):
            if spent + 2 * larger / rate > limit:
                break
            for budget in least:
                took = trial(budget, larger)
                if took.seconds == math.inf:
                    return Search(best if budget == larger else before, timed, budget)
                spent += took.seconds
                least[budget] = min(least[budget], took.seconds)
                rate = max(rate, took.tokens / took.seconds)
        if least[best] == math.inf:
            break
        timed = timed or [best]
        timed.append(larger)
        if least[larger] * (1 + _GAIN) > least[best]:
            break
        before, best = best, larger
    return Search(best, timed) if timed else None


class BudgetBook:
    """Budgets that were measured, in a file of a folder; each by what it is a budget for."""

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        self.path = folder / "token_budgets.json"
        self._what = what
        self._key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> int | None:
        """What was found, if anything was."""
        tokens = self._content().get(self._key, {}).get("tokens")
        return tokens if isinstance(tokens, int) and tokens > 0 else None

    def keep(self, tokens: int) -> int:
        """Note what was found, unless another process has meanwhile: returns what counts from now on."""
        if (known := self.read()) is not None:
            return known
        content = self._content() | {self._key: {"tokens": tokens, **self._what}}
        with suppress(OSError):  # then it is measured again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
        return tokens

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        entries = content.items() if isinstance(content, dict) else ()
        return {key: value for key, value in entries if isinstance(value, dict)}


def budget_book(folder: Path, purpose: str, scorer: Scorer, demand: Demand, runtime: Runtime) -> BudgetBook:
    """The book's entry for a model of this shape, spread as it is on this machine, and rows of about this length."""
    shapes = [  # DeepSpeed leaves empty tensors where weights are divided
        (name, list(getattr(weight, "ds_shape", weight.shape)), weight.requires_grad)
        for name, weight in scorer.named_parameters()
    ]
    what = {
        "purpose": purpose,
        "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        **scorer.numerics.key(),
        "layout": scorer.layout,
        "checkpointing": bool(scorer.base.is_gradient_checkpointing),
        "device": _device_name(scorer.device),
        "threads": torch.get_num_threads(),
        "engine": runtime.parallelism.kind,
        "processes": runtime.local_world_size,
        "divided": scorer.lockstep,
        "rows": candidates(demand.longest)[-1],
    }
    if runtime.device.type == "cuda":  # where memory decides
        what |= {"ranks": runtime.world_size, "gigabytes": round(room_bytes(runtime.device) / 1e9)}
    return BudgetBook(folder, what)


def measured_budget(demand: Demand, trial: Trial | None, fits: int, book: BudgetBook, runtime: Runtime) -> TokenBudget:
    """The budget where speed decides: what was found before, or is by `trial`; all ranks call this.

    `fits`: tokens that memory has room for, on this rank. `trial` None: none can be had.
    """
    fits = min(runtime.gather(fits))
    budgets = [tokens for tokens in candidates(demand.together) if tokens <= max(fits, SMALLEST)]
    if len(budgets) == 1:
        return TokenBudget(budgets[0], "which hold all there is" if demand.together <= SMALLEST else "for memory")
    known = runtime.from_main(book.read)
    if known is not None:
        return TokenBudget(min(known, budgets[-1]), f"as measured before, see {book.path}")
    found = None if trial is None else fastest(budgets, trial, demand.total)
    if found is None:
        reason = "not measured, the pass is too short" if trial is not None else "not measured under this engine"
        return TokenBudget(min(usual(demand.pair), budgets[-1]), f"room for {_PAIRS} pairs of mean length; {reason}")
    # Where memory ran out there may be more of it for the next run.
    tokens = found.best if found.short is not None else runtime.from_main(book.keep, found.best)
    return TokenBudget(tokens, found.describe())


def filling_budget(demand: Demand, fits: int, runtime: Runtime) -> TokenBudget:
    """The budget where memory decides: what fits on every rank, no more than there is; all ranks call this."""
    fits = max(SMALLEST, min(runtime.gather(fits)) // _STEP * _STEP)
    most = candidates(demand.together)[-1]
    return TokenBudget(most, "which hold all there is") if most <= fits else TokenBudget(fits, "what fits in memory")


def roughly_filling(room_bytes: int, scorer: Scorer, *, trains: bool) -> int:
    """Tokens of a pass whose tensors fill so many bytes: a rule of thumb by the sizes of a decoder's layers.

    Of each token a layer keeps for the backward pass about sixteen tensors of the model's width and four of its MLP's;
    a checkpointed one keeps its input, and a pass without gradients no layer but the one that is at work.
    """
    config = scorer.base.config.get_text_config(decoder=True)
    width = int(getattr(config, "hidden_size", None) or scorer.head().weight.shape[-1])
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    layer = 16 * width + 4 * inner
    layers = int(config.num_hidden_layers)
    if not trains:
        values = layer
    elif scorer.base.is_gradient_checkpointing:
        values = layer + layers * width
    else:
        values = layers * layer
    return int(_FULL * max(0, room_bytes) / (values * scorer.numerics.compute_dtype.itemsize))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
