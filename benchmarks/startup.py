"""How long a start takes: of a small run by phase, to the end of its first step, and of what answers without running.

    python benchmarks/startup.py [--pairs 256] [--rounds 5] [--threads 1] [--out FILE.md]

The run is the real command line on a CPU, offline, each time in a fresh process: a random Llama of 2 layers x 64 and
pairs of about 40 + 20 + 20 tokens. `new`: its folders are empty, so rows are tokenised and reference log-probs
computed; `again`: both are there already, as for the second run of a sweep. A phase is what the named function takes,
without the phases inside it; what none of them takes is the rest. The processor's time, of the process and its
children, is what a busy machine disturbs less.

The answers are those of `--help`, of mistakes in a configuration and of wrong commands and flags.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.7  # seconds for an answer
MISTAKE = "learning_rte: 1e-6\nnum_epochs: many\n"
SCORED = ["--model", "m", "--data", "d", "--out", "o"]
ANSWERS = {
    "--help": ["dpo_tune_cache.py", "--help"],
    "a wrong field": ["dpo_tune_cache.py", "--learning_rte", "1e-6"],
    "a wrong YAML": ["dpo_tune_cache.py", "mistake.yaml"],
    "a wrong command": ["-m", "open_po", "scores"],
    "cache --help": ["-m", "open_po", "cache", "--help"],
    "score --help": ["-m", "open_po", "score", "--help"],
    "sweep --help": ["-m", "open_po", "sweep", "--help"],
    "launch --help": ["-m", "open_po", "launch", "--help"],
    "a wrong flag of cache": ["-m", "open_po", "cache", "prune", "--mdel", "x"],
    "a wrong field for score": ["-m", "open_po", "score", *SCORED, "--learning_rte", "1"],
    "a wrong field for sweep": ["-m", "open_po", "sweep", "--grid", "learning_rte=1,2"],
    "a wrong field for launch": ["-m", "open_po", "launch", "--learning_rte", "1"],
}
# Phases by the functions that they are, MODULE:NAME, in the order in which a run comes to them.
PHASES = {
    "configuration": ["open_po.commands.train:load_config"],
    "imports": ["open_po.commands.train:_job"],
    "joining the ranks, seeds": ["open_po.distributed.runtime:Runtime.start"],
    "data: reading, tokenising": ["open_po.training.run:prepare_data"],
    "hash of the model's files": ["open_po.training.run:agreed_identity"],
    "loading the policy": ["open_po.training.run:load_policy"],
    "layout check": ["open_po.model.prepare:choose_layout"],
    "reference log-probs": ["open_po.training.run:ensure_reference"],
    "first step": ["open_po.training.trainer:Trainer.train_step"],
}
START, REST, TOTAL = "interpreter", "the rest", "to the end of the first step"


# ----------------------------------------------------------------------------------------------------- within a process


def processor_seconds() -> float:
    """Of this process and those of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@dataclass(kw_only=True)
class Clock:
    """Seconds, of the wall and of the processor, by phase: time goes to the innermost that has begun."""

    wall: float  # when the process was started
    processor: float = 0.0
    phases: list[str] = field(default_factory=lambda: [START])
    spent: dict[str, list[float]] = field(default_factory=dict)

    def note(self) -> None:
        """Give the time since the last note to the phase that it was."""
        wall, processor = time.monotonic(), processor_seconds()
        spent = self.spent.setdefault(self.phases[-1], [0.0, 0.0])
        self.spent[self.phases[-1]] = [spent[0] + wall - self.wall, spent[1] + processor - self.processor]
        self.wall, self.processor = wall, processor

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*positional: Any, **named: Any) -> Any:
            self.note()
            self.phases.append(phase)
            result = function(*positional, **named)
            self.note()
            self.phases.pop()
            return result

        return run

    def watch(self, names: Sequence[str]) -> None:
        """Time the phases of these functions."""
        for phase, functions in PHASES.items():
            for name in set(functions) & set(names):
                module, _, path = name.partition(":")
                owner: Any = importlib.import_module(module)
                *outer, last = path.split(".")
                for part in outer:
                    owner = getattr(owner, part)
                timed = self.timed(phase, getattr(owner, last))
                setattr(owner, last, staticmethod(timed) if isinstance(vars(owner)[last], staticmethod) else timed)


def start_a_run(started: float, words: Sequence[str]) -> None:
    """Run the command line `words` to the end of its first step, print the times and end the process."""
    clock = Clock(wall=started)
    clock.note()
    clock.phases = [REST]
    sys.path.insert(0, str(ROOT))
    train = importlib.import_module("open_po.commands.train")
    early = [name for names in PHASES.values() for name in names if name.startswith("open_po.commands.train:")]
    clock.watch(early)
    job = train._job

    def watched(*given: Any) -> Any:
        found = job(*given)
        clock.watch([name for names in PHASES.values() for name in names if name not in early])
        trainer = importlib.import_module("open_po.training.trainer").Trainer
        step = trainer.train_step

        def last(*positional: Any) -> None:
            step(*positional)
            print(json.dumps(clock.spent), flush=True)
            os._exit(0)

        trainer.train_step = last
        return found

    train._job = watched
    sys.exit(train.main(words))


# --------------------------------------------------------------------------------------------------------- from outside


Times = dict[str, list[list[float]]]  # by phase, of each round: seconds of the wall and of the processor


def environment(folder: Path, threads: int = 1) -> dict[str, str]:
    """Of a process that finds nothing of earlier ones but in `folder`, and no network."""
    offline = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
    }
    return {**os.environ, **offline, "HF_DATASETS_CACHE": str(folder / "datasets"), "PYTHONPATH": str(ROOT)}


def measure_runs(pairs: int, rounds: int, threads: int) -> dict[str, Times]:
    """The phases of a run in empty folders, and of another that finds its data and reference there."""
    import numpy as np
    from workloads import Shape, build_command, write_pairs

    shape = Shape(hidden=64, layers=2, heads=4, kv_heads=4, intermediate=128, vocabulary=1024)
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(20, 60), rng.integers(10, 30), rng.integers(10, 30)) for _ in range(pairs)]
    ids = [tuple(rng.integers(3, shape.vocabulary, length).tolist() for length in row) for row in lengths]
    times: dict[str, Times] = {"new": {}, "again": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs([(p, [*a, 1], [*b, 1]) for p, a, b in ids], folder)
        build = build_command(shape, folder / "model", 0)
        subprocess.run(build, check=True, capture_output=True, env=environment(folder))
        words = ["--model_name_or_path", str(folder / "model"), "--mixer_list", str(folder / "pairs.jsonl"), "1.0"]
        for number in range(rounds + 1):  # the first reads files that no other has read, and does not count
            own = folder / str(number)
            for kind, found in times.items():
                places = ["--output_dir", str(own / kind), "--reference_cache_dir", str(own / "reference")]
                spent = run_in_child([*words, *places, "--max_seq_length", "256"], environment(own, threads))
                for phase, seconds in spent.items() if number else ():
                    found.setdefault(phase, []).append(seconds)
    return times


def run_in_child(words: Sequence[str], environment: dict[str, str]) -> dict[str, list[float]]:
    """Seconds by phase of one start."""
    command = [sys.executable, __file__, "--start", repr(time.monotonic()), "--", *words]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise SystemExit(f"the run failed:\n{child.stderr}")
    spent: dict[str, list[float]] = json.loads(child.stdout.splitlines()[-1])
    spent[TOTAL] = [sum(seconds) for seconds in zip(*spent.values(), strict=True)]
    return spent


def measure_answers(rounds: int) -> Times:
    """What each answer takes."""
    times: Times = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "mistake.yaml").write_text(MISTAKE)
        for number in range(rounds + 1):
            for what, words in ANSWERS.items():
                program = [str(ROOT / word) if word == "dpo_tune_cache.py" else word for word in words]
                wall, processor = time.monotonic(), processor_seconds()
                child = subprocess.run(
                    [sys.executable, *program], cwd=name, env=environment(Path(name)), capture_output=True
                )
                spent = [time.monotonic() - wall, processor_seconds() - processor]
                assert child.returncode == (0 if "--help" in words else 2), child.stderr
                if number:
                    times.setdefault(what, []).append(spent)
    return times


# --------------------------------------------------------------------------------------------------------------- report


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def cells(rounds: Sequence[Sequence[float]] | None) -> list[str]:
    """Both kinds of seconds of a phase; one that a run did not come to has none."""
    return ["-", "-"] if rounds is None else [spread(values) for values in zip(*rounds, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(pairs: int, rounds: int, threads: int) -> str:
    runs, answers = measure_runs(pairs, rounds, threads), measure_answers(rounds)
    phases = [START, *PHASES, REST, TOTAL]
    slowest = max(answers, key=lambda what: statistics.median(seconds for seconds, _ in answers[what]))
    return "\n\n".join(
        [
            f"Start of a run with {pairs} pairs, {rounds} rounds in turns, seconds: median (range).",
            table(
                ["phase", "new: wall", "new: processor", "again: wall", "again: processor"],
                [[phase, *cells(runs["new"].get(phase)), *cells(runs["again"].get(phase))] for phase in phases],
            ),
            f"Answers without a run, {rounds} rounds in turns, seconds: median (range). The slowest median is "
            f"{statistics.median(seconds for seconds, _ in answers[slowest]):.2f} s, of {slowest} (target: below "
            f"{LIMIT} s).",
            table(["answer", "wall", "processor"], [[what, *cells(rounds)] for what, rounds in answers.items()]),
        ]
    )


def main() -> None:
    if sys.argv[1:2] == ["--start"]:  # in a process whose start is measured
        start_a_run(float(sys.argv[2]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1: the model is that small)")
    parser.add_argument("--out", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    busy = os.getloadavg()[0]
    text = report(arguments.pairs, arguments.rounds, arguments.threads)
    print(text)
    if arguments.out:
        from machine import machine

        about = f"Made by `python benchmarks/startup.py`. {machine('cpu', arguments.threads, 'datasets')}."
        if busy > 1:
            about += f" Other work kept it busy: {busy:.1f} processes wanted a core in the minute before."
        arguments.out.write_text(f"{about}\n\n{text}\n")


if __name__ == "__main__":
    main()
