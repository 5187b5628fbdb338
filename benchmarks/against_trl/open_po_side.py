"""open_po on a workload, through its command line and the files a run leaves; used by `benchmarks/against_trl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import Ids

PROGRAM = str(Path(__file__).resolve().parents[2] / "dpo_tune_cache.py")


@dataclass(frozen=True, kw_only=True)
class OpenPoSettings:
    """What the search varies."""

    tokens: int | None  # of one forward and backward pass; None: as it is by default
    reference_tokens: int | None  # of one forward pass of the reference
    allocator: str = "keep"
    checkpointing: bool = False

    @staticmethod
    def defaults() -> OpenPoSettings:
        """What a user gets who sets nothing, the environment included."""
        return OpenPoSettings(tokens=None, reference_tokens=None, allocator="default")

    def __str__(self) -> str:
        if self == OpenPoSettings.defaults():
            return "no setting but batch and length, nothing in the environment"
        parts = [f"{self.tokens} tokens", f"reference {self.reference_tokens} tokens"]
        parts += ["checkpointing"] if self.checkpointing else []
        return ", ".join([*parts, f"allocator: {self.allocator}"])


@dataclass(frozen=True, kw_only=True)
class OpenPoJob:
    """Everything a measurement needs."""

    folder: str  # of the workload: model, pairs.jsonl
    output: str  # an empty folder
    settings: OpenPoSettings
    global_batch: int
    num_pairs: int
    num_steps: int
    longest: int
    device: str
    learning_rate: float
    beta: float
    seed: int

    def arguments(self) -> list[str]:
        """The command line's fields."""
        fields: dict[str, Any] = {
            "model_name_or_path": f"{self.folder}/model",
            "output_dir": f"{self.output}/run",
            "reference_cache_dir": f"{self.output}/reference",
            "max_seq_length": self.longest,
            "loss_type": "dpo",
            "beta": self.beta,
            "per_device_train_batch_size": self.global_batch,
            "gradient_accumulation_steps": 1,
            "num_epochs": -(-self.num_steps * self.global_batch // self.num_pairs),
            "max_train_steps": self.num_steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "seed": self.seed,
        }
        if self.settings.tokens is not None:
            fields |= {
                "max_tokens_per_batch": self.settings.tokens,
                "reference_max_tokens_per_batch": self.settings.reference_tokens,
                "dtype": "bfloat16" if self.device == "cuda" else "float32",
                "logging_steps": 1,
            }
        if self.settings.checkpointing:
            fields["gradient_checkpointing"] = "true"
        flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        return [*flags, "--mixer_list", f"{self.folder}/pairs.jsonl", "1.0"]

    def command(self) -> list[str]:
        return [sys.executable, PROGRAM, *self.arguments()]


def read_result(job: OpenPoJob, ids: Sequence[Ids]) -> dict[str, Any]:
    """What a finished run measured. Raises if it did not score exactly the responses `ids`."""
    from open_po.data.tokenization import response_key
    from open_po.reference.shards import read_shard, shard_files

    run = Path(job.output, "run")
    summary = json.loads((run / "run_summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logps: dict[bytes, float] = {}
    for folder in Path(job.output, "reference").iterdir():
        for path in shard_files(folder):
            shard = read_shard(path)
            logps |= zip(shard.keys.tolist(), shard.logps.tolist(), strict=True)
    keys = [(response_key(p, a), response_key(p, b)) for p, a, b in ids]
    assert set(logps) == {key for pair in keys for key in pair}, "open_po's token ids differ from the workload's"
    budgets = summary["train"]["max_tokens_per_batch"], summary["reference"]["max_tokens_per_batch"]
    chosen = "it took {:,} tokens, in the reference pass {:,}".format(*budgets)
    return {
        "chosen": chosen if job.settings.tokens is None else "",
        "reference_seconds": summary["reference"]["seconds"],
        "step_seconds": [job.global_batch / record["perf/pairs_per_second"] for record in records],
        "peak_bytes": summary["peak_memory_bytes"],
        "losses": [record["train_loss"] for record in records],
        "reference_logps": [[logps[key] for key in pair] for pair in keys],
    }
