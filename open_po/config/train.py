"""The section of optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from open_po.config.field import option
from open_po.optimizers import OPTIMIZERS

GradDtype = Literal["auto", "float32", "bfloat16"]
Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer steps. The global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks pairs."""

    per_device_train_batch_size: int = option(4, "pairs, see gradient_accumulation_steps", above=0)
    gradient_accumulation_steps: int = option(
        8, "the global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks, in pairs", above=0
    )
    max_tokens_per_batch: int | Literal["auto"] = option(
        "auto",
        "tokens of one forward pass, shared prompts counted once, padding included (a pair that needs more goes "
        "alone). auto: as many as a GPU has memory for; on a CPU what is fastest, by a short measurement. "
        "Changes memory and speed, never a step's value. If memory runs out in a step it is done again with half",
        above=0,
        shapes_result=False,
    )
    group_pairs_by_prompt: bool = option(
        False,
        "draw whole prompts, so that a step holds all pairs of a prompt and computes each response once; a prompt is "
        "split between steps only if it is larger than a step or nothing that is left fits into a step's rest",
    )
    optimizer: str = option("adamw", f"one of {', '.join(OPTIMIZERS)}; docs/numerics.md says what each takes")
    learning_rate: float = option(5e-7, "peak learning rate", above=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "linear, cosine, constant or constant_with_warmup"
    )
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises", not_negative=True, below=1)
    warmup_steps: int | None = option(
        None, "steps in which the learning rate rises, instead of warmup_ratio", not_negative=True
    )
    weight_decay: float = option(
        0.0,
        "decoupled weight decay of adamw, its variants, adafactor and muon; not on norms and biases",
        not_negative=True,
    )
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", not_negative=True)
    grad_dtype: GradDtype = option(
        "auto",
        "float32 or bfloat16: in which the gradients of bfloat16 weights add up over a step's packs. bfloat16 is "
        "rounded stochastically and takes half the memory; auto: float32 where a GPU has room. Gradients of float32 "
        "weights are float32",
    )
    optimizer_in_backward: Switch = option(
        "auto",
        "on or off: in steps of one pack update each weight as soon as its gradient is complete, so that no more than "
        "a few are ever held (one GPU, or parallel layers). The weights are the same, but for what optimizers round by "
        "chance. auto: where max_grad_norm is 0, since clipping needs all gradients first",
        shapes_result=False,
    )
    num_epochs: int = option(1, "passes over the training data", above=0)
    max_train_steps: int | None = option(None, "stop after so many optimizer steps", above=0)
    max_run_time: float | None = option(
        None,
        "stop after so many hours, counted from the start of the program: the step is finished and a checkpoint "
        "written, as on SIGTERM and SIGUSR1; exit code 75",
        above=0,
        shapes_result=False,
    )
    seed: int = option(42, "seed of the data order, dropout and new adapters", not_negative=True, below=2**32)
    eval_steps: int | None = option(
        None,
        "evaluate every so many steps, besides before the first and after the last",
        above=0,
        needs="eval_mixer_list or eval_mixture, the held-out data",
        shapes_result=False,
    )
    sample_during_eval: int = option(
        0,
        "at each evaluation, answer so many held-out prompts greedily, the same every time: console, samples.jsonl, "
        "trackers. Where ranks divide the weights, these are gathered for every token: slow for large models",
        not_negative=True,
        needs="eval_mixer_list or eval_mixture, the held-out data",
        shapes_result=False,
    )
    sample_max_new_tokens: int = option(
        256, "longest such answer, in tokens", above=0, needs="sample_during_eval", shapes_result=False
    )
    logging_steps: int = option(1, "write metrics every so many steps", above=0, shapes_result=False)

    def warmup(self, steps: int) -> int:
        """In how many of a run's `steps` steps the learning rate rises."""
        return math.ceil(self.warmup_ratio * steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def pairs_of_rank(self) -> int:
        """That a rank takes in a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def token_budget(self) -> int:
        """`max_tokens_per_batch` once it is a number, as in a run that has begun to train."""
        assert self.max_tokens_per_batch != "auto", "max_tokens_per_batch is not settled yet"
        return self.max_tokens_per_batch
