"""Metrics: summed over packs and ranks, and where they go: console, metrics.jsonl, Weights & Biases."""

from __future__ import annotations

import json
import resource
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from torch import Tensor

from open_po.config import RunConfig
from open_po.errors import UserError
from open_po.losses import Counts, MixedLosses, PairLogps
from open_po.output import disk_faults, write_atomically
from open_po.runtime import Runtime

Metrics = dict[str, float]

_WIDE = 110  # columns of a terminal that has room for a bar beside the figures
_PLAIN_SECONDS = 10.0  # a console that is no terminal gets one progress line per so many seconds


# Rewards closer than this are a tie: log-probs near -1000 nats carry rounding of that size, and a policy that still is
# its reference would win or lose by it.
_TIE = 1e-4


def wins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen reward is the greater, 0.5 where they are a tie, else 0: [P]."""
    return torch.where((chosen - rejected).abs() < _TIE, 0.5, (chosen > rejected).float())


class PreferenceMeter:
    """Sums the metrics of preference pairs over packs; `means` reduces them over ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, policy: PairLogps, losses: MixedLosses, counts: Counts) -> None:
        """Add one pack of a step, or of an evaluation, that holds `counts`."""
        chosen, rejected = losses.chosen_rewards, losses.rejected_rewards
        found = {
            "loss": losses.value(counts),
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracy": wins(chosen, rejected),
            "pairs": torch.ones_like(chosen),
            "rejected_pairs": (policy.rejected_tokens > 0).float(),
        }
        if len(losses.parts) > 1:
            parts = zip(losses.names, losses.parts, strict=True)
            found |= {f"loss/{name}": part.value(counts) for name, part in parts}
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum()

    def add_aux(self, loss: Tensor) -> None:
        """Add one pack's part of its step's load balancing loss."""
        self.sums["aux_loss"] = self.sums.get("aux_loss", 0) + loss.detach().double()

    def means(self, runtime: Runtime, steps: int = 1) -> Metrics:
        """Metrics over all ranks; losses are means over `steps` steps, the others are means over pairs.

        A reward tie counts half in `rewards/accuracy`. Where rejected responses were not scored, what needs them is
        left out. A mix adds each part's loss as `loss/NAME`, before its weight. Afterwards the meter is empty.
        """
        total: dict[str, float] = defaultdict(float)
        for sums in runtime.gather({name: float(value) for name, value in self.sums.items()}):
            for name, value in sums.items():
                total[name] += value
        self.sums = {}
        pairs = total["pairs"]
        metrics = {name: total[name] / steps for name in total if name.startswith(("loss", "aux_loss"))}
        metrics |= {name: total[name] / pairs for name in _PAIR_MEANS}
        if total["rejected_pairs"] == pairs:
            metrics |= {name: total[name] / pairs for name in _BOTH_SIDES}
            metrics["rewards/average"] = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            metrics["rewards/margin"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics


_PAIR_MEANS = ("logps/chosen", "rewards/chosen")
_BOTH_SIDES = ("logps/rejected", "rewards/rejected", "rewards/accuracy")


def peak_memory_bytes() -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress:
    """Work with a known end: a live bar on a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console, label: str, *, total: int, unit: str, done: int = 0) -> None:
        self.console, self.label, self.total, self.unit, self.done = console, label, total, unit, done
        self._started_at, self._first = time.monotonic(), done
        self._tokens = 0
        self._note = ""
        self._said = time.monotonic()
        self._live = None
        if console.is_terminal and not console.quiet:
            self._live = RichProgress(
                TextColumn("{task.description}"),
                *([BarColumn(bar_width=16)] if console.width >= _WIDE else []),
                TextColumn("{task.completed:,}/{task.total:,} " + unit),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),
                console=console,
                transient=True,
                expand=True,  # a narrow terminal cuts the note, not the time left
            )

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
            self._task = self._live.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if kind is None:
            self._print(
                f"{self.label}: {self.done - self._first:,} {self.unit} in {self._elapsed():.1f} s{self._rates()}"
            )

    def advance(self, count: int, *, tokens: int = 0, note: str = "") -> None:
        """`count` more units are done, with so many tokens; the last `note` stands in place of the rates."""
        self.done += count
        self._tokens += tokens
        self._note = note or self._note
        note = self._note or self._rates().removeprefix(", ")
        if self._live is not None:
            self._live.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._said > _PLAIN_SECONDS and self.done < self.total:
            self._said = time.monotonic()
            remaining = self._elapsed() * (self.total - self.done) / max(1, self.done - self._first)
            line = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {note}, {remaining:.0f} s left"
            self._print(line)

    def done_elsewhere(self, count: int) -> None:
        """`count` more units are done, by others: they are in no rate, and not in the last line."""
        self._first += count
        self.advance(count)

    def _elapsed(self) -> float:
        return max(1e-9, time.monotonic() - self._started_at)

    def _rates(self) -> str:
        if not self._tokens:
            return ""
        elapsed = self._elapsed()
        return f", {(self.done - self._first) / elapsed:,.1f} {self.unit}/s, {self._tokens / elapsed:,.0f} tokens/s"

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Metrics) -> None:
        """Record one set of metrics, `training_step` among them."""

    def close(self) -> None:
        """No more metrics will come."""


class JsonlTracker:
    """One JSON object per line; on resumption lines after the resumed step are dropped."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["training_step"] <= resumed_step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda temporary: temporary.write_text(lines))
        self.path = path

    def log(self, metrics: Metrics) -> None:
        with disk_faults(str(self.path), "checkpoints are kept"), open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[Metrics]:
    """The records of a metrics.jsonl; a line cut off by a crash is passed over."""
    records: list[Metrics] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


class WandbTracker:
    """Weights & Biases, in the project and mode that its own environment variables say unless the run does."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        import wandb

        output = config.output
        try:
            self.run = wandb.init(
                project=output.wandb_project_name or "open_po",
                entity=output.wandb_entity,
                name=output.exp_name,
                id=run_id,
                resume="allow" if run_id else None,
                dir=folder,
                config=config.flat(),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"with_tracking: W&B cannot start ({' '.join(str(error).split())}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def log(self, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=int(metrics["training_step"]))

    def close(self) -> None:
        self.run.finish()


class Trackers:
    """All trackers of the main rank; on other ranks there are none."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, metrics: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(dict(metrics))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
