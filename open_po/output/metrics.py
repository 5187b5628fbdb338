"""The records of a run's metrics.jsonl, and what its figures are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from open_po.output.files import read_json_lines

Metrics = dict[str, float]

STEP = "training_step"
TRAIN_LOSS = "train_loss"
LOSS = "loss"  # a record of training has it as TRAIN_LOSS; `loss/NAME` is that of a part of a mix
AUX_LOSS = "aux_loss"  # load balancing of experts
CHOSEN_LOGPS = "logps/chosen"
REJECTED_LOGPS = "logps/rejected"
CHOSEN_REWARDS = "rewards/chosen"
REJECTED_REWARDS = "rewards/rejected"
REWARD_AVERAGE = "rewards/average"
REWARD_ACCURACY = "rewards/accuracy"
REWARD_MARGIN = "rewards/margin"
LEARNING_RATE = "learning_rate"
EPOCH = "epoch"
GRAD_NORM = "grad_norm"  # before clipping
UPDATE_FRACTION = "optim/update_fraction"  # of trained weights, that changed in the step; docs/numerics.md
TOKENS_PER_SECOND = "perf/tokens_per_second"
PAIRS_PER_SECOND = "perf/pairs_per_second"
PEAK_MEMORY_GB = "perf/peak_memory_gb"
# Mean tokens of a response, the one that ends it counted; of pairs, and of the answers of sample_during_eval
CHOSEN_LENGTH = "lengths/chosen"
REJECTED_LENGTH = "lengths/rejected"
GENERATED_LENGTH = "lengths/generated"
HELD_OUT = "eval/"  # what the names of held-out figures begin with

_SHOWN = {
    TRAIN_LOSS: "loss {:.4f}",
    LOSS: "loss {:.4f}",
    REWARD_ACCURACY: "accuracy {:.3f}",
    REWARD_MARGIN: "margin {:.3f}",
    CHOSEN_LOGPS: "chosen {:.2f}",
    LEARNING_RATE: "lr {:.2e}",
}


def short_figures(metrics: Mapping[str, float]) -> str:
    """The few numbers of a record that a person watches, those of training or the held-out ones."""
    own = {name.removeprefix(HELD_OUT): value for name, value in metrics.items()}
    parts = [form.format(own[name]) for name, form in _SHOWN.items() if name in own]
    return ", ".join(parts).replace("-0.000,", "0.000,")


def read_metrics(path: Path) -> list[Metrics]:
    """The records of a metrics.jsonl; a line cut off by a crash is passed over."""
    return read_json_lines(path)


def evaluations(records: Sequence[Metrics]) -> list[Metrics]:
    """The held-out records of a metrics.jsonl, by step, names without `eval/`."""
    return [
        {name.removeprefix(HELD_OUT): value for name, value in record.items()}
        for record in records
        if HELD_OUT + LOSS in record
    ]
