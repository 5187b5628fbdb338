"""TRL's DPOTrainer on a workload, timed from inside; a child process of `benchmarks/against_trl`.

Two ways: `stock`, and `patched`, in which only response tokens go through the head. TRL 1.16.0 does that by itself
where Triton runs, that is on CUDA; on a CPU it scores every position of every row. The patch makes the CPU path select
the scored positions as well, and leaves out the head's outputs that only feed logged metrics (entropy, mean logit,
token accuracy), so that it is the fastest head that stays within TRL. It has two forms to choose from: ordinary logits
and cross-entropy (3 products of the head's size), or TRL's own tiles (4, its backward pass makes the logits again).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TRL_VERSION = "1.16.0"


@dataclass(frozen=True, kw_only=True)
class TrlSettings:
    """What the search varies."""

    batch: int = 1  # pairs of one forward and backward pass
    reference_batch: int = 1  # pairs of one forward pass of the reference
    attention: str = "sdpa"
    allocator: str = "keep"
    head: str = "stock"  # or the patch's: logits, tiles
    liger: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        parts = [f"batch {self.batch}", f"reference batch {self.reference_batch}", self.attention]
        parts += [f"head: {self.head}"] if self.head != "stock" else []
        parts += ["Liger"] if self.liger else []
        parts += ["checkpointing"] if self.checkpointing else []
        return ", ".join([*parts, f"allocator: {self.allocator}"])


@dataclass(frozen=True, kw_only=True)
class TrlJob:
    """Everything a measurement needs."""

    folder: str  # of the workload: model, pairs.jsonl, ids.json
    output: str
    settings: TrlSettings
    steps: list[list[int]]  # the pairs of every optimizer step
    device: str
    learning_rate: float
    beta: float
    seed: int

    def command(self) -> list[str]:
        return [sys.executable, __file__, json.dumps(asdict(self))]


def config_arguments(job: TrlJob) -> dict[str, Any]:
    """Arguments of DPOConfig. Its defaults differ: gradient checkpointing and bfloat16 are on, max_length is 1024."""
    settings, global_batch, cuda = job.settings, len(job.steps[0]), job.device == "cuda"
    return {
        "output_dir": job.output,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": global_batch // settings.batch,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": settings.reference_batch,
        "max_length": None,  # nothing is cut, and no pair is dropped for its prompt
        "loss_type": "sigmoid",
        "beta": job.beta,
        "max_steps": len(job.steps),
        "train_sampling_strategy": "sequential",  # the steps' pairs are in order already
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",  # the faster form of torch's AdamW, with torch's betas and epsilon
        "gradient_checkpointing": settings.checkpointing,
        "use_liger_kernel": settings.liger,
        "bf16": cuda,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "dataloader_num_workers": 0,  # collating a few lists takes no time, a worker process would
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
    }


def train_order(steps: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """The steps' pairs one after another, each step's by length, so that pairs of like length share a batch."""
    return [index for step in steps for index in sorted(step, key=lambda index: (-lengths[index], index))]


def patch_head(kind: str) -> None:
    """Make TRL score response tokens only, whatever the device, and nothing but their log-probs."""
    import torch
    from trl.trainer import utils

    tiles = utils._ChunkedLogProbFunction

    class ResponseHead:
        @staticmethod
        def apply(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            *rest: Any,
        ) -> tuple[torch.Tensor | None, ...]:
            if kind == "tiles":
                logprobs = tiles.apply(hidden, weight, bias, targets, *rest[:-1], ("log_probs",))[0]
            else:
                logits = torch.nn.functional.linear(hidden, weight, bias)
                logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            none = torch.zeros_like(logprobs, requires_grad=False)
            return logprobs, none, None, none, none.bool()

    utils._ChunkedLogProbFunction = ResponseHead
    utils._use_triton = lambda device: True  # this name only chooses between all and the labelled positions


def peak_bytes(device: str) -> int:
    """The most memory this process has held: allocated on the GPU, or resident."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(job: TrlJob) -> dict[str, Any]:
    """Reference log-probs and optimizer steps with their times. Raises if TRL's token ids are not the workload's."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    assert trl.__version__ == TRL_VERSION, f"TRL {TRL_VERSION} is wanted, this is {trl.__version__}"
    if job.settings.head != "stock":
        patch_head(job.settings.head)
    folder = Path(job.folder)
    ids = [tuple(pair) for pair in json.loads((folder / "ids.json").read_text())]
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    lengths = [len(p) + max(len(a), len(b)) for p, a, b in ids]
    by_length = sorted(range(len(ids)), key=lambda index: (-lengths[index], index))  # for the reference pass
    clock: dict[str, float] = {}
    step_seconds: list[float] = []

    def now() -> float:
        if job.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Timed(DPOTrainer):
        losses: list[torch.Tensor]

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            # open_po's model has scored its longest pairs by then, in the check of its layout.
            batch = self.data_collator([dataset[index] for index in range(batch_size)])
            self.compute_ref_log_probs(self.model, self._prepare_inputs(batch))
            start = now()
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)
            clock["reference"] = now() - start
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    class StepClock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock["step"] = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_seconds.append(now() - clock["step"])

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation=job.settings.attention
        ),
        args=DPOConfig(**config_arguments(job)),
        train_dataset=Dataset.from_list([rows[index] for index in by_length]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[StepClock()],
    )
    trainer.losses = []
    data = trainer.train_dataset
    seen = list(zip(data["prompt_ids"], data["chosen_ids"], data["rejected_ids"], strict=True))
    assert seen == [ids[index] for index in by_length], "TRL's token ids differ from the workload's"
    sides = [dict(zip(by_length, data[f"ref_{side}_logps"], strict=True)) for side in ("chosen", "rejected")]
    place = {index: position for position, index in enumerate(by_length)}
    trainer.train_dataset = data.select([place[index] for index in train_order(job.steps, lengths)])
    trainer.train()
    losses = torch.stack(trainer.losses).double().view(len(job.steps), -1).mean(1)  # batches of a step are equal
    return {
        "reference_seconds": clock["reference"],
        "step_seconds": step_seconds,
        "peak_bytes": peak_bytes(job.device),
        "losses": losses.tolist(),
        "reference_logps": [[side[index] for side in sides] for index in range(len(ids))],
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    request["settings"] = TrlSettings(**request["settings"])
    result = measure(TrlJob(**request))
    Path(request["output"], "measurement.json").write_text(json.dumps(result))
