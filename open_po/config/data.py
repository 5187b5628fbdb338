"""The section of training and held-out data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from open_po.config.field import option
from open_po.config.mixture import MixturePart, parse_mixture


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs are trained and evaluated on, and how they become tokens."""

    mixer_list: list[str] = option(
        None,
        "training data: NAME AMOUNT [NAME AMOUNT ...]; an amount is a fraction (0.5) or a count of rows (1000)",
        derived=True,
    )
    dataset_mixer: dict[str, str] | None = option(None, "the same as a YAML mapping NAME: AMOUNT")
    mixer_list_splits: list[str] = option(["train"], "one split for all datasets, or one for each: train, train[:90%]")
    eval_mixer_list: list[str] | None = option(None, "held-out data, written as mixer_list", shapes_result=False)
    eval_mixer_list_splits: list[str] = option(
        ["train"], "splits of the held-out data", needs="eval_mixer_list, the held-out data", shapes_result=False
    )
    max_train_samples: int | None = option(None, "use at most so many training rows", above=0)
    max_seq_length: int = option(
        2048, "longest prompt + response, in tokens; longer responses lose their newest", above=0
    )
    max_prompt_length: int | None = option(
        None,
        "longest prompt, in tokens; longer ones lose their oldest. Default: what the longer response leaves of "
        "max_seq_length, and at least half of it",
        above=0,
    )
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise; default: the CPUs at hand", above=0, shapes_result=False
    )

    @cached_property
    def mixture(self) -> list[MixturePart]:
        """The training data. Raises ValueError with one line."""
        return parse_mixture(self.mixer_list, self.mixer_list_splits, "mixer_list")

    @cached_property
    def held_out_mixture(self) -> list[MixturePart]:
        """The held-out data; empty if there is none. Raises ValueError with one line."""
        if self.eval_mixer_list is None:
            return []
        return parse_mixture(self.eval_mixer_list, self.eval_mixer_list_splits, "eval_mixer_list")
