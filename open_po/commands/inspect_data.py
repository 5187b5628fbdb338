"""What `python -m open_po inspect` shows."""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from open_po.commands.command_line import refuse_unwritable
from open_po.commands.inspect_rows import Legend, Row
from open_po.commands.inspect_tables import (
    Part,
    checks_table,
    histograms,
    left_out_table,
    lengths_table,
    sources_table,
    steps_table,
    tokenizer_table,
)
from open_po.config import RunConfig
from open_po.data import PairDataset
from open_po.data.examples import choose_examples
from open_po.data.facts import known_prompts, shared, special_tokens
from open_po.data.run_data import Data, load_data
from open_po.distributed.runtime import Runtime
from open_po.model.token_budget import SMALLEST, usual
from open_po.output.files import disk_faults, write_atomically
from open_po.packing import Layout, Planner, Sampler, plan_epoch
from open_po.training.optimizer import total_steps

_PAGE_WIDTH = 140  # characters
_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>open_po inspect</title>
<style>{stylesheet} body {{ color: {foreground}; background-color: {background}; }}
pre {{ font-family: Menlo, 'DejaVu Sans Mono', Consolas, monospace; font-size: 13px; line-height: 1.2; }}</style>
</head>
<body><pre><code style="font-family:inherit">{code}</code></pre></body></html>
"""


def inspect(config: RunConfig, runtime: Runtime, arguments: argparse.Namespace) -> None:
    """Print what there is to see, and write the page if one is asked for."""
    if arguments.out is not None:
        runtime.on_main(refuse_unwritable, arguments.out)
    data = runtime.main_first(load_data, config, runtime.console)

    def show() -> None:
        shown = list(_shown(config, data, arguments, arguments.processes or runtime.world_size))
        for item in shown:
            runtime.console.print(item, markup=False)
        if arguments.out is not None:
            with disk_faults(str(arguments.out), "name another file"):
                write_atomically(arguments.out, lambda path: _write_page(path, shown))
            runtime.say(f"Page: {arguments.out}")

    runtime.on_main(show)


def _write_page(path: Path, shown: Sequence[RenderableType]) -> None:
    page = Console(file=io.StringIO(), record=True, width=_PAGE_WIDTH, color_system="truecolor", force_terminal=True)
    for item in shown:
        page.print(item, markup=False, highlight=False)
    path.write_text(page.export_html(theme=SVG_EXPORT_THEME, code_format=_PAGE), encoding="utf-8")


def _shown(config: RunConfig, data: Data, arguments: argparse.Namespace, ranks: int) -> Iterator[RenderableType]:
    def part(title: str, pairs: PairDataset) -> Part:
        return Part(title=title, pairs=pairs, special=special_tokens(pairs, data.tokenizer), shared=shared(pairs))

    training = part("training", data.train)
    parts, known = [training], None
    if data.held_out is not None:
        parts.append(part("held-out", data.held_out))
        known = known_prompts(data.held_out, data.train)
    yield tokenizer_table(config, data.tokenizer)
    yield sources_table(parts)
    yield left_out_table(parts)
    yield Text()
    for each in parts:
        yield Text(f"Lengths before truncation, {each.title} data", style="bold")
        yield histograms(each.pairs, config.data)
        yield lengths_table(each.pairs)
        yield Text()
    yield checks_table(parts, data.tokenizer, known)
    yield _steps(config, data.train, ranks)
    examples = choose_examples(data.train, training.special, arguments.rows)
    if examples:
        yield Text("\nWhat the model sees", style="bold")
        yield Legend()
    for number, example in enumerate(examples, 1):
        yield Row(
            number=number,
            example=example,
            dataset=data.train,
            tokenizer=data.tokenizer,
            full=arguments.full,
            kept=config.data.truncation,
            unused=frozenset() if config.loss.mix().needs_rejected else frozenset({"rejected"}),
        )


def _steps(config: RunConfig, pairs: PairDataset, ranks: int) -> RenderableType:
    train = config.train
    layout: Layout = "unshared" if config.model.prompt_sharing == "off" else "shared"
    planner = Planner(
        dataset=pairs,
        max_tokens=SMALLEST,
        layout=layout,
        with_rejected=config.loss.mix().needs_rejected,
    )
    sampler = Sampler(
        num_pairs=len(pairs),
        global_batch=train.pairs_of_rank * ranks,
        seed=train.seed,
        prompt_numbers=pairs.prompt_numbers if train.group_pairs_by_prompt else None,
    )
    tokens = train.max_tokens_per_batch
    if tokens == "auto":  # which needs the model and the machine; this is what it is where nothing can be measured
        tokens = usual(math.ceil(planner.pair_tokens().mean()))
    plan = plan_epoch(dataclasses.replace(planner, max_tokens=tokens), sampler, ranks)
    return steps_table(config, sampler, total_steps(train, sampler.steps_per_epoch), ranks, plan, layout, tokens)
