"""One measurement of `benchmarks/against_trl`: a workload on disk, a fresh process for a side, and what came of it."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import matmul_rate
from comparison_report import BUSY
from open_po_side import OpenPoJob, OpenPoSettings, read_result
from presets import ALLOCATORS, Preset, Settings
from trl_side import TrlJob, TrlSettings
from workloads import Ids, Workload, build_command, counts, write_pairs

from open_po.packing import Sampler

LEARNING_RATE, BETA = 1e-5, 0.1
PATIENCE = 120.0  # seconds to wait for a quiet moment

T = TypeVar("T")


class MeasurementError(Exception):
    """A child process failed; the message is why."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one process measured."""

    reference_seconds: float
    step_seconds: list[float]
    peak_bytes: int
    losses: list[float]
    reference_logps: list[list[float]]  # of each pair: chosen, rejected
    chosen: str = ""  # what the trainer has chosen by itself
    others: float = 0.0  # share of the CPUs' time that other processes took meanwhile

    def training_rate(self, pairs: int) -> float:
        """Pairs per second: the median over steps of `pairs`, without the first."""
        return statistics.median(pairs / seconds for seconds in self.step_seconds[1:])

    def reference_rate(self) -> float:
        return len(self.reference_logps) / self.reference_seconds

    def share(self, flops: Sequence[float], rate: float) -> float:
        """Median over the steps, without the first, of the useful FLOP/s in units of `rate`."""
        shares = [count / seconds / rate for count, seconds in zip(flops, self.step_seconds, strict=True)]
        return statistics.median(shares[1:])

    def difference(self, other: Measurement) -> tuple[float, float]:
        """Greatest difference of reference log-probs and of losses, each |x - y| / max(1, |y|)."""
        pairs = zip(self.reference_logps, other.reference_logps, strict=True)
        logps = [(x, y) for mine, theirs in pairs for x, y in zip(mine, theirs, strict=True)]
        losses = list(zip(self.losses, other.losses, strict=False))  # a search has fewer steps
        return relative_difference(logps), relative_difference(losses)


class CpuShare:
    """How much of the CPUs' time goes to other processes, or to other virtual machines, from now on."""

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds so far: wall, all CPUs busy (0 where it cannot be known), this process and its finished children."""
        stat = Path("/proc/stat")
        ticks = [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]] if stat.exists() else [0] * 8
        idle = ticks[3] + ticks[4]
        return time.monotonic(), (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])

    def of_others(self) -> float:
        wall, busy, own = (now - then for now, then in zip(self._read(), self.start, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def wait_for_quiet() -> None:
    """Return when nobody else has used the CPUs for two seconds, or after `PATIENCE`."""
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        cpus = CpuShare()
        time.sleep(2.0)
        if cpus.of_others() <= BUSY:
            return


def relative_difference(values: Sequence[tuple[float, float]]) -> float:
    """Greatest |x - y| / max(1, |y|); infinite if any of them is not a number."""
    found = [abs(x - y) / max(1.0, abs(y)) for x, y in values]
    return max(found) if all(map(math.isfinite, found)) else math.inf


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One workload, built, and how to measure a side on it."""

    preset: Preset
    workload: Workload
    ids: list[Ids]
    folder: Path
    seed: int
    threads: int

    def steps(self, count: int) -> list[list[int]]:
        """The pairs of each optimizer step, as open_po's sampler deals them."""
        sampler = Sampler(num_pairs=len(self.ids), global_batch=self.preset.global_batch, seed=self.seed)
        return [sampler.step_pairs(step) for step in range(count)]

    def trl_job(self, settings: TrlSettings, steps: int, output: str) -> TrlJob:
        return TrlJob(
            folder=str(self.folder),
            output=output,
            settings=settings,
            steps=self.steps(steps),
            device=self.preset.device,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            seed=self.seed,
        )

    def open_po_job(self, settings: OpenPoSettings, steps: int, output: str) -> OpenPoJob:
        return OpenPoJob(
            folder=str(self.folder),
            output=output,
            settings=settings,
            global_batch=self.preset.global_batch,
            num_pairs=len(self.ids),
            num_steps=steps,
            longest=self.workload.longest,
            device=self.preset.device,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            seed=self.seed,
        )

    def measure(self, settings: Settings, steps: int) -> Measurement:
        """A side with these settings, in a fresh process. Raises MeasurementError."""

        def once() -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=self.folder) as output:
                if isinstance(settings, TrlSettings):
                    self.run(self.trl_job(settings, steps, output).command(), settings.allocator)
                    found: dict[str, Any] = json.loads(Path(output, "measurement.json").read_text())
                    return found
                job = self.open_po_job(settings, steps, output)
                self.run(job.command(), settings.allocator)
                return read_result(job, self.ids)

        found, others = self.undisturbed(once)
        return Measurement(**found, others=others)

    def matmul_rate(self, tokens: int) -> tuple[float, float]:
        """FLOP/s of the model's own products for a pack of `tokens`, and the time that others took meanwhile."""
        scored = max(1, round(tokens * counts(self.ids)["scored_share"]))
        shape = asdict(self.workload.shape)
        job = {"shape": shape, "tokens": tokens, "scored": scored, "device": self.preset.device}
        command = [sys.executable, matmul_rate.__file__, json.dumps(job)]
        out, others = self.undisturbed(lambda: self.run(command, "keep"))
        return float(json.loads(out.splitlines()[-1])["flops"]), others

    def undisturbed(self, once: Callable[[], T]) -> tuple[T, float]:
        """What `once` returns, and the share of the CPUs' time that other processes took meanwhile.

        On a machine that others use too it waits for a quiet moment, tries up to `attempts` times and keeps the least
        disturbed: two jobs of as many threads as there are cores slow each other down by far more than half.
        """
        tries: list[tuple[T, float]] = []
        for _ in range(self.preset.attempts):
            if self.preset.attempts > 1:
                wait_for_quiet()
            cpus = CpuShare()
            tries.append((once(), cpus.of_others()))
            if tries[-1][1] <= BUSY:
                break
        return min(tries, key=lambda found: found[1])

    def run(self, command: Sequence[str], allocator: str) -> str:
        """Standard output of a child process. Raises MeasurementError with the last lines of what it said."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | ALLOCATORS[allocator]
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "huggingface"),
            "TQDM_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "WANDB_MODE": "disabled",
        }
        if self.preset.device == "cpu":
            threads = str(self.threads)
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        child = subprocess.run(command, capture_output=True, text=True, env=environment)
        if child.returncode:
            said = (child.stderr.strip() or child.stdout.strip()).splitlines()
            raise MeasurementError(next((x for x in reversed(said) if "rror" in x), said[-1] if said else "no output"))
        return child.stdout


@contextmanager
def built(preset: Preset, workload: Workload, seed: int, threads: int) -> Iterator[Bench]:
    """The workload's model and pairs in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="against_trl_") as name:
        ids = workload.draw(seed)
        bench = Bench(preset=preset, workload=workload, ids=ids, folder=Path(name), seed=seed, threads=threads)
        write_pairs(ids, bench.folder)
        bench.run(build_command(workload.shape, bench.folder / "model", seed), "default")
        yield bench


def disagreement(measured: Measurement, expected: Measurement, preset: Preset) -> str | None:
    """Why a measurement does not count, if it does not."""
    logps, losses = measured.difference(expected)
    if logps <= preset.tolerance and losses <= preset.loss_tolerance:
        return None
    return f"invalid: reference log-probs differ by {logps:.1e}, losses by {losses:.1e}"
