"""The data of a run: its tokenizer, its training pairs and its held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from open_po.config import RunConfig
from open_po.data import PairDataset, load_pairs
from open_po.data.facts import tell_known
from open_po.data.selection import Selection
from open_po.data.tokenization import Truncation
from open_po.data.tokenizer import dated_template, load_tokenizer, no_slow_tokenizer, pad_token_id
from open_po.distributed.runtime import Runtime
from open_po.errors import UserError
from open_po.output.tables import part_line, parts_table


@dataclass(frozen=True, kw_only=True)
class Data:
    """The run's pairs and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerBase
    pad: int
    train: PairDataset
    held_out: PairDataset | None

    @property
    def parts(self) -> list[PairDataset]:
        """The data sets, training first."""
        return [self.train] if self.held_out is None else [self.train, self.held_out]

    @property
    def highest_id(self) -> int:
        """The highest token id of all data, which the model must have an embedding for."""
        return max(part.highest_id for part in self.parts)

    def token_ids(self) -> set[int]:
        """Every token id that occurs."""
        return set().union(*(part.token_ids() for part in self.parts))

    def refuse_lone_answers(self, why: str) -> None:
        """Raises UserError if a pair has no rejected response, `why` being what one is needed for."""
        for part in self.parts:
            lone = np.flatnonzero(part.rejected_lengths == 0)
            if len(lone):
                more = f" ({len(lone) - 1:,} more like it)" if len(lone) > 1 else ""
                raise UserError(f"{part.origin(int(lone[0]))}: has no rejected response, {why}{more}")


def load_data(config: RunConfig, console: Console, compared_by: str | None = None) -> Data:
    """Tokenizer and pairs, tokenised, or read from what is kept of an earlier pass. Raises UserError.

    `compared_by`: what needs both responses, if it is not the loss.
    """
    data = config.data
    tokenizer = load_tokenizer(config.model, add_bos=data.add_bos)
    load = partial(
        load_pairs,
        tokenizer=tokenizer,
        truncation=Truncation(data.max_seq_length, data.max_prompt_length, data.truncation),
        scored_turns=data.scored_turns,
        num_workers=data.preprocessing_num_workers,
        console=console,
    )
    both = compared_by is not None or config.loss.mix().needs_rejected
    selection = Selection.of(data, needs_rejected=both)
    train = load(data.training_mixture, selection=selection, max_rows=data.max_train_samples)
    held_out = None
    if data.held_out_mixture:
        held_out = load(data.held_out_mixture, selection=Selection.of(data, needs_rejected=both, held_out=True))
    loaded = Data(tokenizer=tokenizer, pad=pad_token_id(tokenizer), train=train, held_out=held_out)
    if compared_by is not None:
        loaded.refuse_lone_answers(f"and {compared_by} compares two")
    elif both:
        names = " + ".join(config.loss.names)
        loaded.refuse_lone_answers(f"which loss_type {names} needs; give it a field rejected, or set loss_type sft")
    return loaded


def prepare_data(
    config: RunConfig, runtime: Runtime, *, label: str = "Training data", compared_by: str | None = None
) -> Data:
    """Tokenizer and pairs, `label` the name of the first. Rank 0 tokenises, the others read its cache.

    `compared_by` as in `load_data`.
    """
    loaded = runtime.main_first(load_data, config, runtime.console, compared_by)
    for remark in (no_slow_tokenizer(config.model, loaded.tokenizer), dated_template(loaded.tokenizer)):
        if remark is not None:
            runtime.say(remark)
    for name, part in ((label, loaded.train), ("Held-out data", loaded.held_out)):
        for line in part.describe() if part is not None else []:
            runtime.say(f"{name}: {line}")
        if part is not None and len(part.sources) > 1:
            runtime.on_main(_tell_parts, name, part, runtime.console)
    if loaded.held_out is not None:
        runtime.on_main(_tell_known, loaded.held_out, loaded.train, runtime)
    return loaded


def _tell_known(held_out: PairDataset, training: PairDataset, runtime: Runtime) -> None:
    if (line := tell_known(held_out, training)) is not None:
        runtime.say(f"Held-out data: {line}")


def _tell_parts(name: str, pairs: PairDataset, console: Console) -> None:
    """What came from where: a table on a terminal, a line for each part in a file."""
    if console.is_terminal:
        console.print(parts_table(f"{name}: what came from where", pairs.sources), markup=False)
        return
    for source in pairs.sources:
        console.print(f"{name}: {part_line(source)}", soft_wrap=True, markup=False)
