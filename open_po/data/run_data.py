"""The data of a run: its tokenizer, its training pairs and its held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from open_po.config import RunConfig
from open_po.data import PairDataset, load_pairs
from open_po.data.tokenization import Truncation
from open_po.data.tokenizer import load_tokenizer, no_slow_tokenizer, pad_token_id
from open_po.distributed.runtime import Runtime


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


def load_data(config: RunConfig, console: Console) -> Data:
    """Tokenizer and pairs, tokenised or read from the cache of `datasets`. Raises UserError."""
    data = config.data
    tokenizer = load_tokenizer(config.model, add_bos=data.add_bos)
    truncation = Truncation(data.max_seq_length, data.max_prompt_length, data.truncation)
    scored = data.scored_turns
    workers = data.preprocessing_num_workers
    train = load_pairs(
        data.training_mixture,
        tokenizer,
        truncation,
        scored_turns=scored,
        max_rows=data.max_train_samples,
        num_workers=workers,
        console=console,
    )
    held_out = None
    if data.held_out_mixture:
        held_out = load_pairs(
            data.held_out_mixture, tokenizer, truncation, scored_turns=scored, num_workers=workers, console=console
        )
    return Data(tokenizer=tokenizer, pad=pad_token_id(tokenizer), train=train, held_out=held_out)


def prepare_data(config: RunConfig, runtime: Runtime, *, label: str = "Training data") -> Data:
    """Tokenizer and pairs, `label` the name of the first. Rank 0 tokenises, the others read its cache."""
    loaded = runtime.main_first(load_data, config, runtime.console)
    if line := no_slow_tokenizer(config.model, loaded.tokenizer):
        runtime.say(line)
    for name, part in ((label, loaded.train), ("Held-out data", loaded.held_out)):
        for line in part.describe() if part is not None else []:
            runtime.say(f"{name}: {line}")
    return loaded
