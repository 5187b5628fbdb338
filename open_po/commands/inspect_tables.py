"""What is known of a run's data and steps before it starts, as tables for the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from open_po.commands.inspect_rows import COLOURS
from open_po.config import DataConfig, RunConfig
from open_po.data import PairDataset
from open_po.data.facts import Ending, Shared, SpecialTokens
from open_po.data.token_texts import Piece
from open_po.output.histograms import Column, Histograms, Limit
from open_po.packing import EpochPlan, Layout, Sampler


@dataclass(frozen=True, kw_only=True)
class Part:
    """The training or the held-out data, and what is known of it."""

    title: str
    pairs: PairDataset
    special: SpecialTokens
    shared: Shared


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", show_header=len(columns) > 2)
    for number, column in enumerate(columns):
        table.add_column(column, style="bold" if number == 0 else None, overflow="fold")
    return table


def _token(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str:
    if token is None:
        return "none"
    name = str(tokenizer.convert_ids_to_tokens(token))
    return f"{Piece((token,), name, name).shown}, id {token:,}"


def tokenizer_table(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Table:
    """Which tokenizer and which template."""
    table = _table("Tokenizer", "what", "value")
    table.add_row("from", Text(config.model.tokenizer_name or config.model.model_name_or_path))
    table.add_row("kind", f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens")
    table.add_row("BOS", Text(_token(tokenizer, tokenizer.bos_token_id)))
    table.add_row("EOS", Text(_token(tokenizer, tokenizer.eos_token_id)))
    template = config.model.chat_template_name or ("the tokenizer's own" if tokenizer.chat_template else "none")
    template += ", with BOS before it" if config.data.add_bos else ""
    table.add_row("chat template", Text(f"{template} (for rows of messages; text stays as it stands)"))
    return table


def sources_table(parts: Sequence[Part]) -> Table:
    """How many rows and pairs came from where."""
    columns = ["rows taken", "repeated", "left out", "pairs", "mean tokens of a pair"]
    table = _table("Rows", "data", "source", "format", *columns)
    for column in table.columns[3:]:
        column.justify = "right"
    for part in parts:
        pairs, start = part.pairs, 0
        tokens = pairs.prompt_lengths + pairs.chosen_lengths + pairs.rejected_lengths
        for source in pairs.sources:
            mine = tokens[start : start + source.pairs]
            start += source.pairs
            table.add_row(
                part.title,
                Text(source.name),
                source.format or "",
                f"{source.rows:,} of {source.available:,}",
                f"{source.repeated:,}",
                f"{sum(source.left_out.values()):,}",
                f"{source.pairs:,}",
                f"{mine.mean():,.0f}" if len(mine) else "",
            )
    return table


def left_out_table(parts: Sequence[Part]) -> Table | Text:
    """Why rows cannot train, and which."""
    if not any(part.pairs.left_out for part in parts):
        return Text("No row is left out.")
    table = _table("Rows left out", "data", "reason", "rows", "which")
    for part in parts:
        for reason, rows in part.pairs.left_out.items():
            more = f"; and {rows.more:,} more" if rows.more else ""
            table.add_row(part.title, reason, f"{rows.count:,}", Text("; ".join(rows.first) + more))
    return table


def _before_truncation(pairs: PairDataset) -> dict[str, NDArray[np.int64]]:
    lengths = np.stack([pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths], 1) + pairs.lost
    named = {name: part for name, part in zip(COLOURS, lengths.T, strict=True) if part.any()}
    return named | {"prompt + longer": lengths[:, 0] + lengths[:, 1:].max(1)}


def histograms(pairs: PairDataset, data: DataConfig) -> Histograms:
    """Lengths before truncation, so that what is beyond the limits is seen."""
    columns = [
        Column(title=title, lengths=lengths, style=COLOURS.get(title, ("#d7af5f",))[0])
        for title, lengths in _before_truncation(pairs).items()
    ]
    limits = [Limit(column=len(columns) - 1, length=data.max_seq_length, text="max_seq_length")]
    if data.max_prompt_length is not None:
        limits.insert(0, Limit(column=0, length=data.max_prompt_length, text="max_prompt_length"))
    return Histograms(columns=columns, limits=limits)


def lengths_table(pairs: PairDataset) -> Table:
    """Lengths before truncation in figures, and what truncation takes."""
    table = _table("", "part", "mean", "median", "95%", "longest", "pairs cut", "tokens cut", "left in all")
    for column in table.columns[1:]:
        column.justify = "right"
    before = _before_truncation(pairs)
    lost = dict(zip(COLOURS, pairs.lost.T, strict=True))
    for name, lengths in before.items():
        figures = [lengths.mean(), *np.quantile(lengths, [0.5, 0.95])]
        cut = [""] * 3
        if name in lost:
            share = lost[name].sum() / lengths.sum()
            kept = int(lengths.sum() - lost[name].sum())
            cut = [f"{(lost[name] > 0).sum():,}", f"{lost[name].sum():,} ({share:.1%})", f"{kept:,}"]
        table.add_row(name, *(f"{figure:,.0f}" for figure in figures), f"{lengths.max():,}", *cut)
    return table


def checks_table(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, known: int | None) -> Table:
    """What an expert looks at first; what seldom is meant has a `!`.

    `known`: held-out prompts that the training data have too; None without held-out data.
    """
    table = _table("Checks (! is seldom meant)", "what", *(part.title for part in parts))
    table.show_header = len(parts) > 1
    rows = {
        "prompt begins with BOS": [_bos(part, tokenizer) for part in parts],
        "chosen ends with EOS": [_ending(part, 0) for part in parts],
        "rejected ends with EOS": [_ending(part, 1) for part in parts],
        "prompts": [_prompts(part) for part in parts],
        "pairs like others": [_likeness(part.shared) for part in parts],
        "chosen - rejected": [_difference(part.pairs) for part in parts],
    }
    if any(part.special.unknown.any() for part in parts):
        rows["unknown tokens"] = [
            _flagged((f"{part.special.unknown.sum():,} in {(part.special.unknown > 0).sum():,} pairs", True))
            for part in parts
        ]
    if known is not None:
        held_out = parts[1].shared.prompts
        rows["held-out prompts"] = [Text(), _flagged((f"{known:,} of {held_out:,} are trained on too", known > 0))]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _flagged(*said: tuple[str, bool]) -> Text:
    """What is said, a line each, with a `!` before what is seldom meant."""
    lines = [Text(f"! {line}", style="bold yellow") if odd else Text(line) for line, odd in said]
    return Text("\n").join(lines)


def _bos(part: Part, tokenizer: PreTrainedTokenizerBase) -> Text:
    if tokenizer.bos_token_id is None:
        return Text("the tokenizer has none")
    counts, cut = part.special.leading_bos, part.pairs.lost[:, 0] > 0
    said = [
        (counts == 1, "once", False),
        (counts > 1, "more than once", True),
        ((counts == 0) & cut, "not, in truncated prompts", True),
        ((counts == 0) & ~cut, "not", bool(counts.any())),
        (part.special.inner_bos, "with another one further on", True),
    ]
    return _flagged(*((f"{hits.sum():,} {words}", odd) for hits, words, odd in said if hits.any()))


def _ending(part: Part, side: int) -> Text:
    if part.special.ended(side, "absent") == len(part.pairs):
        return Text("there are none")
    behind = part.special.behind_eos[part.special.endings[:, side] == "followed", side].max(initial=0)
    said: dict[Ending, tuple[str, bool]] = {
        "once": ("once", False),
        "repeated": ("more than once", True),
        "followed": (f"and then at most {behind:,} token{'' if behind == 1 else 's'} of the template", False),
        "cut": ("not, because truncated", False),
        "missing": ("not, though whole", True),
    }
    counts = {ending: part.special.ended(side, ending) for ending in said}
    return _flagged(*((f"{count:,} {said[ending][0]}", said[ending][1]) for ending, count in counts.items() if count))


def _prompts(part: Part) -> Text:
    found = part.shared
    company = f"{found.in_company:,} of {len(part.pairs):,} pairs share theirs, up to {found.most:,} the same one"
    return Text(f"{found.prompts:,} distinct; {company if found.in_company else 'no two pairs share one'}")


def _likeness(found: Shared) -> Text:
    lines = [(f"{found.repeated:,} repeated", True)] if found.repeated else []
    lines += (
        [(f"{found.contradicted:,} contradicted, the responses the other way round", True)]
        if found.contradicted
        else []
    )
    return _flagged(*lines) if lines else Text("none repeated, none contradicted")


def _difference(pairs: PairDataset) -> Text:
    both = pairs.rejected_lengths > 0
    if not both.any():
        return Text("there are no rejected responses")
    apart = (pairs.chosen_lengths - pairs.rejected_lengths)[both]
    return Text(
        f"{apart.mean():+,.1f} tokens on average; chosen is the longer one in {(apart > 0).mean():.0%} of pairs"
    )


def steps_table(
    config: RunConfig, sampler: Sampler, steps: int, ranks: int, plan: EpochPlan, layout: Layout, tokens: int
) -> Table:
    """How the pairs become steps and forward passes of `tokens`, `steps` of the whole run on so many `ranks`."""
    train, table = config.train, _table("Steps", "what", "value")
    batch = (
        f"{train.per_device_train_batch_size} per_device_train_batch_size x {train.gradient_accumulation_steps} "
        f"gradient_accumulation_steps x {ranks} process{'' if ranks == 1 else 'es'}"
    )
    table.add_row("global batch", f"{sampler.global_batch:,} pairs: {batch}")
    table.add_row("steps", f"{sampler.steps_per_epoch:,} an epoch, {steps:,} in all")
    warmup = "" if train.lr_scheduler_type == "constant" else f", rising for {train.warmup(steps):,} steps"
    table.add_row("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}{warmup}")
    auto = train.max_tokens_per_batch == "auto"
    shares = plan.packing.summary()
    over = (
        f", {plan.packing.over_budget:,} of them longer because a pair is not cut" if plan.packing.over_budget else ""
    )
    table.add_row(
        "packs",
        f"{plan.packing.packs:,} in the first epoch, of at most {tokens:,} tokens{over}; "
        f"{shares['fill']:.0%} full; {plan.forward_passes / sampler.steps_per_epoch:,.1f} forward passes a step"
        f"{'; max_tokens_per_batch auto may find another number at the start' if auto else ''}",
    )
    saved = 1 - plan.packing.computed / plan.tokens_otherwise
    table.add_row(
        "prompt sharing",
        f"saves {saved:.1%} of the tokens: {plan.packing.computed:,} to compute instead of {plan.tokens_otherwise:,}; "
        f"{shares['padding_avoided']:.0%} padding avoided",
    )
    asked = (
        "as prompt_sharing: off asks" if layout == "unshared" else "if the check at a run's start finds the model fit"
    )
    table.add_row("layout", f"{layout}, {asked}")
    return table
