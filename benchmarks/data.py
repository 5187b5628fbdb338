"""A million rows: tokenised by one process and by two, mixed, planned, and started again, with the memory it takes.

    python benchmarks/data.py [--rows 1000000] [--words 40] [--out FILE.md]

Rows are text pairs of random words, about three times `--words` each, in one JSONL file; the tokenizer is a byte-level
BPE of 8,192 tokens that is trained on them. Each line of the table is a process of its own. `first`: nothing is
tokenised yet. `again`: as for the second run on the data. The mixture takes the file once, a tenth of it ten times
and half of it half again, so that there is a draw, a part that is repeated, and the same rows in two parts; repeated
pairs are left out by content in one line of the table. Memory is the peak of what is resident, as the system counts it
(VmHWM): pages of files that are mapped are in it, and may be dropped at any time; `own` is without them. Of the
processes that tokenise it is the largest one. The limits are 2 GB resident for every process and 5 seconds for the data
of a second start, imports not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESIDENT_GB, START_SECONDS = 2.0, 5.0
VOCABULARY = 8192
GLOBAL_BATCH, RANKS, BUDGET = 128, 8, 8192


# ---------------------------------------------------------------------------------------------------------------- data


def write_rows(path: Path, rows: int, words: int) -> None:
    """Pairs of random words; of three prompts one comes again."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(words // 2, words * 3 // 2))) for _ in range(4000)]
    prompt = ""
    with open(path, "w") as file:
        for number in range(rows):
            if number % 3:
                prompt = f"{number} {rng.choice(texts)}"
            row = {"prompt": prompt, "chosen": f" {rng.choice(texts)} {number}", "rejected": f" {rng.choice(texts)}"}
            file.write(json.dumps(row) + "\n")


def make_tokenizer(folder: Path, data: Path) -> None:
    """A byte-level BPE trained on some of the rows."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    with open(data) as file:
        tokenizer.train_from_iterator((line for line in islice(file, 5000)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------- within a process


class Clock:
    """Seconds by phase, of the wall and of the processor, whose time a busy machine disturbs less."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}  # of this process and those of its children that have ended

    def __call__(self, phase: str, do: Callable[[], Any]) -> Any:
        """What `do` returns, its time counted for `phase`."""
        start, used = time.monotonic(), _processor()
        result = do()
        self.seconds[phase], self.processor[phase] = time.monotonic() - start, _processor() - used
        return result


def _processor() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Memory:
    """The most memory of its own, without mapped files, that this process had at one of many looks."""

    def __init__(self) -> None:
        self.own = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.own = max(self.own, _status("RssAnon"))
            time.sleep(0.05)


def _status(name: str) -> float:
    """A figure of /proc/self/status, GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast

    from open_po.config import MixturePart
    from open_po.data import load_pairs
    from open_po.data.facts import tell_known
    from open_po.data.selection import Selection
    from open_po.data.tokenization import Truncation
    from open_po.packing import Planner, Sampler, pack_all, plan_epoch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a run
    clock, memory, before = Clock(), Memory(), _status("VmHWM")
    tokenizer = clock("tokenizer", lambda: PreTrainedTokenizerFast.from_pretrained(options.folder / "tokenizer"))
    data, limits = str(options.folder / "rows.jsonl"), Truncation(1024, None)
    parts = [MixturePart(dataset=data)]
    if options.mixed:
        parts += [
            MixturePart(dataset=data, split="train[:10%]", amount=10.0),
            MixturePart(dataset=data, split="train[50%:]", amount=1.5),
        ]
    selection = Selection(deduplicate=options.deduplicate)
    pairs = clock(
        "rows",
        lambda: load_pairs(parts, tokenizer, limits, selection=selection, num_workers=options.processes),
    )
    held_out = clock("held-out rows", lambda: load_pairs([MixturePart(dataset=data, amount=500)], tokenizer, limits))
    clock("known pairs", lambda: tell_known(held_out, pairs))
    if options.plan:
        planner = Planner(dataset=pairs, max_tokens=BUDGET, layout="shared")
        sampler = Sampler(num_pairs=len(pairs), global_batch=GLOBAL_BATCH, seed=0)
        clock("first step", lambda: planner.packs(sampler.step_pairs(0), rank=0, world_size=RANKS))
        clock("reference pass", lambda: pack_all(pairs, "shared", BUDGET, BUDGET, RANKS))
        clock("an epoch", lambda: plan_epoch(planner, sampler, RANKS))
    return {
        "pairs": len(pairs),
        "tokens": int((pairs.prompt_lengths + pairs.chosen_lengths + pairs.rejected_lengths).sum()),
        "seconds": clock.seconds,
        "processor": clock.processor,
        "before": before,
        "peak": _status("VmHWM"),
        "own": memory.own,
        "workers": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
    }


# -------------------------------------------------------------------------------------------------------------- report


def run(folder: Path, cache: str, **options: Any) -> dict[str, Any]:
    """What a process of its own measures."""
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--folder", str(folder), *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{cache} {options}: {found}", file=sys.stderr, flush=True)
    return found


def _report(options: argparse.Namespace, folder: Path) -> str:
    from machine import machine

    data = folder / "rows.jsonl"
    write_rows(data, options.rows, options.words)
    make_tokenizer(folder / "tokenizer", data)
    lines = {
        "first, 1 process": run(folder, "one", processes=1),
        "first, 2 processes": run(folder, "two", processes=2),
        "again": run(folder, "two", processes=2),
        "mixture, first": run(folder, "two", processes=2, mixed=True),
        "mixture, again, and plans": run(folder, "two", processes=2, mixed=True, plan=True),
        "the same, repeated pairs left out": run(folder, "two", processes=2, mixed=True, plan=True, deduplicate=True),
    }
    rows = []
    for name, found in lines.items():
        seconds, processor = found["seconds"], found["processor"]
        rate = f"{options.rows / seconds['rows']:,.0f}" if name.startswith("first") else ""
        plans = " | ".join(f"{seconds[plan]:.1f} ({processor[plan]:.1f})" if plan in seconds else "" for plan in PLANS)
        start, used = (sum(times[phase] for phase in PHASES) for times in (seconds, processor))
        rows.append(
            f"| {name} | {found['pairs']:,} | {start:.1f} ({used:.1f}) | {rate} | {plans} | {found['peak']:.2f} "
            f"({found['own']:.2f}) | {found['workers']:.2f} |"
        )
    tokens = lines["again"]["tokens"]
    worst = max(max(found["peak"], found["workers"]) for found in lines.values())
    second = sum(lines["again"]["seconds"].values())
    verdict = [
        f"Most resident memory of a process: {worst:.2f} GB, {_meets(worst, RESIDENT_GB)} {RESIDENT_GB:g} GB.",
        f"A second start: {second:.1f} s of data, {_meets(second, START_SECONDS)} {START_SECONDS:g} s.",
    ]
    heading = " | ".join(PLANS)
    return "\n".join(
        [
            f"# {options.rows:,} rows",
            "",
            f"`python benchmarks/data.py --rows {options.rows} --words {options.words}`: "
            f"{data.stat().st_size / 1e9:.2f} GB of text, {tokens / 1e6:,.0f} million tokens. Plans are for steps of "
            f"{GLOBAL_BATCH} pairs on {RANKS} ranks, packs of {BUDGET:,} tokens. "
            f"{machine('cpu', 1, 'tokenizers', 'datasets', 'pyarrow')}.",
            "",
            f"| | pairs | data, s | rows/s | {heading} | peak GB (own) | largest worker, GB |",
            f"|---{'|---' * (6 + len(PLANS) - 1)}|",
            *rows,
            "",
            f"Before the data, imports alone: {lines['again']['before']:.2f} GB. `data, s` is the tokenizer, the "
            "mixture, 500 held-out pairs, and which of those are trained on; plans are in seconds. In brackets the "
            "processor's time.",
            "",
            *verdict,
            "",
        ]
    )


PHASES = ("tokenizer", "rows", "held-out rows", "known pairs")
PLANS = ("first step", "reference pass", "an epoch")


def _meets(value: float, limit: float) -> str:
    return "within" if value <= limit else "OVER"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "data.md")
    # of a process that is measured
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    for name in ("mixed", "plan", "deduplicate"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(_measured(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = _report(options, Path(folder))
    options.out.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
