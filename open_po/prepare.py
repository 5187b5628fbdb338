"""What every command starts with: the data as tokens, and models that are set to the layout they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from transformers import PreTrainedTokenizerBase

from open_po.config import RunConfig, Sharing
from open_po.data import PairDataset, load_pairs
from open_po.data.tokenization import Truncation
from open_po.layout import choose_layout
from open_po.model import (
    Numerics,
    Scorer,
    attach_lora,
    checkpoint_gradients,
    load_scorer,
)
from open_po.model_files import ModelSource
from open_po.packing import Layout
from open_po.runtime import Runtime
from open_po.tokenizer import load_tokenizer, pad_token_id


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
        """Of all tokens."""
        return max(part.highest_id for part in self.parts)

    def token_ids(self) -> set[int]:
        """Every token id that occurs."""
        return set().union(*(part.token_ids() for part in self.parts))

    def prepare(self, scorer: Scorer, sharing: Sharing, name: str, runtime: Runtime) -> None:
        """Set the scorer to the best layout that it takes, and say which.

        Raises UserError if the model cannot score these pairs, or scores them differently from its own forward.
        """
        longest = max(part.longest_row for part in self.parts)
        scorer.check_ids(self.highest_id)
        scorer.check_length(longest)
        samples = [self.train[index] for index in range(min(2, len(self.train)))]
        samples += [part[index] for part in self.parts for index in [part.longest_pair] if part.longest_row == longest]
        choice = choose_layout(scorer, samples, sharing, longest=longest, pad=self.pad)
        runtime.say(f"{name}: {choice.describe()}")


def prepare_data(config: RunConfig, runtime: Runtime, *, label: str = "Training data") -> Data:
    """Tokenizer and pairs, `label` the name of the first. Rank 0 tokenises, the others read its cache."""

    def load() -> Data:
        tokenizer = load_tokenizer(config.model)
        data = config.data
        truncation = Truncation(data.max_seq_length, data.max_prompt_length)
        workers = data.preprocessing_num_workers
        train = load_pairs(
            data.mixer_list or [],
            data.mixer_list_splits,
            tokenizer,
            truncation,
            max_rows=data.max_train_samples,
            num_workers=workers,
        )
        held_out = None
        if data.eval_mixer_list is not None:
            held_out = load_pairs(
                data.eval_mixer_list, data.eval_mixer_list_splits, tokenizer, truncation, num_workers=workers
            )
        return Data(tokenizer=tokenizer, pad=pad_token_id(tokenizer), train=train, held_out=held_out)

    if runtime.world_size > 1:
        runtime.on_main(lambda: bool(load()))
    loaded = load()
    for name, part in ((label, loaded.train), ("Held-out data", loaded.held_out)):
        for line in part.describe() if part is not None else []:
            runtime.say(f"{name}: {line}")
    return loaded


def load_alike(load: Callable[[], Scorer], runtime: Runtime) -> Scorer:
    """A model on every rank, all with the same layout, since each plans for all."""
    scorer = runtime.on_all(load)
    layouts = runtime.gather(scorer.layout)
    scorer.use_layout(max(layouts, key=get_args(Layout).index))
    if len(set(layouts)) > 1:
        runtime.say(f"The ranks found different layouts ({', '.join(layouts)}); all take {scorer.layout}")
    return scorer


def policy_source(config: RunConfig) -> ModelSource:
    """Where the policy's starting weights come from."""
    model = config.model
    return ModelSource(
        name=model.model_name_or_path, revision=model.model_revision, trust_remote_code=model.trust_remote_code
    )


def reference_source(config: RunConfig) -> ModelSource | None:
    """Where the reference model comes from, if it is another than the policy's starting weights."""
    name, revision = config.reference.reference_model_name_or_path, config.reference.reference_model_revision
    if name is None or (name, revision) == (config.model.model_name_or_path, config.model.model_revision):
        return None
    return ModelSource(name=name, revision=revision, trust_remote_code=config.model.trust_remote_code)


def load_policy(config: RunConfig, numerics: Numerics, runtime: Runtime, data: Data) -> Scorer:
    """The policy at its starting weights, checked against its own forward, with adapters if the run trains them."""
    model = config.model
    scorer = load_scorer(policy_source(config), numerics, runtime.device)
    data.prepare(scorer, model.prompt_sharing, "Policy", runtime)
    if config.loss.load_balancing_loss:
        scorer.balance_experts()
    if model.gradient_checkpointing:
        checkpoint_gradients(scorer)
    if model.use_lora:
        attach_lora(scorer, model)
    return scorer
