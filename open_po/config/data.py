"""The section of training and held-out data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from open_po.config.field import option
from open_po.config.mixture import MixturePart, parse_mixture, typed_mixture

OnBadRows = Literal["stop", "skip"]
LongRows = Literal["truncate", "leave_out"]
KeptEnd = Literal["keep_start", "keep_end"]
ScoredTurns = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs are trained and evaluated on, and how they become tokens."""

    mixer_list: list[str] | None = option(
        None,
        "training data: NAME AMOUNT [NAME AMOUNT ...]; an amount is a fraction (0.5; 2.0 takes every row twice) or a "
        "count of rows (1000)",
    )
    dataset_mixer: dict[str, str] | None = option(None, "the same as a YAML mapping NAME: AMOUNT")
    mixer_list_splits: list[str] = option(["train"], "one split for all datasets, or one for each: train, train[:90%]")
    mixer_list_configs: list[str | None] | None = option(
        None, "Hub data sets that have several configurations: one for all, or one for each", needs="mixer_list"
    )
    mixture: list[dict[str, str]] | None = option(
        None,
        "training data in YAML, instead of mixer_list: a list of {dataset, amount, split, configuration, format, "
        "prompt_template}, of which only dataset is required",
    )
    eval_mixer_list: list[str] | None = option(None, "held-out data, written as mixer_list", shapes_result=False)
    eval_mixer_list_splits: list[str] = option(
        ["train"], "splits of the held-out data", needs="eval_mixer_list", shapes_result=False
    )
    eval_mixer_list_configs: list[str | None] | None = option(
        None, "configurations of the held-out data", needs="eval_mixer_list", shapes_result=False
    )
    eval_mixture: list[dict[str, str]] | None = option(None, "held-out data, written as mixture", shapes_result=False)
    format: str | None = option(
        None,
        "layout of the rows: a name of docs/add_a_dataset.md, or MODULE:FUNCTION; default: found by each row's columns",
    )
    prompt_template: str | None = option(
        None, "text of the prompt with {column} for a row's columns, instead of the layout's own prompt"
    )
    on_bad_rows: OnBadRows = option(
        "stop", "rows that cannot be read: stop and name them, or skip them, counted and named"
    )
    deduplicate: bool = option(False, "leave out training pairs whose prompt, chosen and rejected came before")
    min_score_gap: float | None = option(
        None,
        "leave out training pairs whose chosen score exceeds the rejected by less; rows need scores",
        not_negative=True,
    )
    min_score_ratio: float | None = option(
        None,
        "leave out training pairs whose scores' ratio, higher by lower, is less; needs rows with scores",
        not_negative=True,
    )
    min_response_length: int | None = option(
        None, "leave out training pairs with a shorter response, in tokens", above=0
    )
    long_rows: LongRows = option(
        "truncate", "truncate training pairs longer than max_seq_length or max_prompt_length, or leave_out"
    )
    max_train_samples: int | None = option(None, "use at most so many training rows", above=0)
    max_seq_length: int = option(
        2048, "longest prompt + response, in tokens; longer responses lose their newest", above=0
    )
    max_prompt_length: int | None = option(
        None,
        "longest prompt, in tokens; what longer ones lose says truncation. Default: what the longer response leaves of "
        "max_seq_length, and at least half of it",
        above=0,
    )
    truncation: KeptEnd = option(
        "keep_end", "of a prompt that is too long: keep_end loses its oldest tokens, keep_start its newest"
    )
    scored_turns: ScoredTurns = option(
        "last",
        "last scores what follows the prompt, all every turn of the assistant, those in the prompt too, and no one "
        "else's (they count in the length that dpo_norm divides by); rows of text have no turns, all is last there",
    )
    add_bos: bool = option(False, "put BOS before the chat template's text, which must not begin with it itself")
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise; default: the CPUs at hand", above=0, shapes_result=False
    )

    @cached_property
    def training_mixture(self) -> list[MixturePart]:
        """The training data. Raises ValueError with one line per problem."""
        if self.mixture is not None:
            return self._as_the_run_reads(typed_mixture(self.mixture))
        configs = self.mixer_list_configs or [None]
        return self._as_the_run_reads(parse_mixture(self.mixer_list or [], self.mixer_list_splits, configs))

    @cached_property
    def held_out_mixture(self) -> list[MixturePart]:
        """The held-out data; empty if there is none. Raises ValueError with one line per problem."""
        if self.eval_mixture is not None:
            return self._as_the_run_reads(typed_mixture(self.eval_mixture, "eval_mixture"))
        if self.eval_mixer_list is None:
            return []
        configs = self.eval_mixer_list_configs or [None]
        parts = parse_mixture(self.eval_mixer_list, self.eval_mixer_list_splits, configs, "eval_mixer_list")
        return self._as_the_run_reads(parts)

    def _as_the_run_reads(self, parts: list[MixturePart]) -> list[MixturePart]:
        """Parts that have no format or prompt template of their own with those of the run."""
        return [
            replace(
                part,
                format=part.format or self.format,
                prompt_template=self.prompt_template if part.prompt_template is None else part.prompt_template,
            )
            for part in parts
        ]
