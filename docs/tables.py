"""The tables of docs/aliases.md and docs/recipes.md, from the code and the configurations that they are about.

python docs/tables.py          writes them
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from open_po.config import RunConfig, load_config
from open_po.config.aliases import Alias
from open_po.config.aliases.table import TRAINERS

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Recipe:
    """A published run: overlays by name, and on how many GPUs its batch was reached."""

    run: str  # as its authors call it
    model: str
    task: str
    loss: str = ""  # an SFT stage's task has it
    more: str = ""  # readings and flags
    devices: int = 4

    @property
    def words(self) -> list[str]:
        """The words behind `dpo_tune_cache.py`."""
        named = [("models", self.model), ("tasks", self.task), ("losses", self.loss)]
        overlays = [f"configs/{folder}/{name}.yaml" for folder, name in named if name]
        return [*overlays, *self.more.split()]

    def config(self) -> RunConfig:
        """What it resolves to."""
        paths = [str(REPOSITORY / word) if word.endswith(".yaml") else word for word in self.words]
        return load_config(paths)


def _dpo_gamma() -> Iterator[Recipe]:
    """All 35; of Gemma 2 and TinyLlama the losses that keep a reference, and simpo, start from their SFT for mt."""
    runs = [
        *(("eurollm-1.7b", "eurollm-1.7b-it-mt", "mt"), ("gemma-2-2b", "gemma-2-2b-it-mt", "mt")),
        *(("gemma-2-2b", "gemma-2-2b-it-sum", "sum"), ("tinyllama-1.1b", "tinyllama-1.1b-mt", "mt")),
        ("tinyllama-1.1b", "tinyllama-1.1b-sum", "sum"),
    ]
    for (model, run, task), loss in itertools.product(
        runs, ("sft", "dpo", "dpo_gamma", "slic_dpo", "cpo", "simpo", "slic")
    ):
        from_sft = loss in ("dpo", "dpo_gamma", "slic_dpo", "simpo") and model != "eurollm-1.7b"
        name = f"{run}-{loss.replace('_', '-')}"
        if loss == "sft":
            more = "--gradient_accumulation_steps 32" if name == "gemma-2-2b-it-sum-sft" else ""
            yield Recipe(name, model, f"{task}_sft", more=more)
        else:
            yield Recipe(name, f"{model}-mt-sft" if from_sft else model, task, loss)


def _dpo_paper() -> Iterator[Recipe]:
    for size, task in itertools.product(("2.8b", "6.9b"), ("hh", "shp", "se")):
        model = f"pythia-{size}"
        yield Recipe(f"{model}, {task}, stage 1", model, f"{task}_sft")
        start = f"--model_name_or_path output/{model}_{task}_sft"
        yield Recipe(f"{model}, {task}, stage 2", model, task, "dpo", start)
    reading = "configs/readings/dpo_paper_6.9b_as_run.yaml --model_name_or_path output/pythia-6.9b_hh_sft"
    yield Recipe("pythia-6.9b, hh, stage 2, as run", "pythia-6.9b", "hh", "dpo", reading)


_AS_RUN = "configs/readings/dpo_gamma_as_run.yaml"
PUBLICATIONS: dict[str, list[Recipe]] = {
    "dpo_gamma": list(_dpo_gamma()),
    "dpo_gamma_as_run": [
        Recipe("gemma-2-2b-it-sum-dpo-gamma", "gemma-2-2b-mt-sft", "sum", "dpo_gamma", _AS_RUN),
        Recipe("gemma-2-2b-it-mt-sft", "gemma-2-2b", "mt_sft", "", _AS_RUN),
    ],
    "dpo_paper": list(_dpo_paper()),
    "open_instruct": [
        Recipe("Tulu 3 8B", "llama-3.1-tulu-3-8b", "tulu3", "dpo_norm", devices=32),
        Recipe(
            "Tulu 3 8B, its script",
            "llama-3.1-tulu-3-8b",
            "tulu3",
            "dpo_norm",
            "configs/readings/tulu3_batch_512.yaml",
            devices=32,
        ),
        Recipe("OLMo 2 7B", "olmo-2-7b", "olmo2", "dpo_norm", devices=32),
        Recipe("OLMo 2 13B", "olmo-2-13b", "olmo2_13b", "dpo_norm", devices=32),
    ],
    "others": [
        Recipe("stack_llama_2 (TRL)", "", "se_lora", "dpo", "--model_name_or_path output/se_sft", devices=1),
        Recipe(
            "Zephyr 7B (alignment-handbook)",
            "",
            "ultrafeedback",
            "dpo",
            "--model_name_or_path alignment-handbook/zephyr-7b-sft-full --beta 0.01",
            devices=8,
        ),
    ],
}
RECIPE_COLUMNS = (
    "run",
    "models/",
    "tasks/",
    "losses/",
    "and",
    "starts from",
    "loss",
    "optimizer",
    "rate",
    "schedule, warm-up",
    "decay",
    "epochs",
    "tokens (prompt)",
    "a step",
)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(columns)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def alias_rows(aliases: Iterable[Alias]) -> Iterator[list[str]]:
    """What docs/aliases.md says of names: a row for neighbours of which it says the same."""

    def said(alias: Alias) -> tuple[str, str]:
        becomes = {"none": "no effect", "refused": "refused"}.get(alias.kind)
        return becomes or ", ".join(f"`{field}`" for field in alias.fields), alias.says

    for cells, names in itertools.groupby(aliases, said):
        yield [", ".join(f"`{alias.name}`" for alias in names), *cells]


def recipe_row(recipe: Recipe) -> list[str]:
    """What docs/recipes.md says of a run."""
    config = recipe.config()
    train, data, loss = config.train, config.data, config.loss
    names = ("beta", "gamma", "delta", "lambda_sft")
    values = {name: getattr(loss, name) for name in names if getattr(loss, name) is not None}
    ratio = "" if train.lr_scheduler_type == "constant" else f", {train.warmup_ratio:g}"
    warmup = ratio if train.warmup_steps is None else f", {train.warmup_steps} steps"
    per_device, accumulated = train.per_device_train_batch_size, train.gradient_accumulation_steps
    batch = per_device * accumulated * recipe.devices
    steps = "" if train.max_train_steps is None else f", {train.max_train_steps} steps"
    return [
        recipe.run,
        recipe.model,
        recipe.task,
        recipe.loss,
        f"`{recipe.more}`" if recipe.more else "",
        config.model.model_name_or_path.rpartition("/")[2],
        ", ".join([*loss.names, *(f"{name} {value:g}" for name, value in values.items())]),
        train.optimizer,
        f"{train.learning_rate:g}",
        f"{train.lr_scheduler_type}{warmup}",
        f"{train.weight_decay:g}",
        f"{train.num_epochs}{steps}",
        f"{data.max_seq_length}" + (f" ({data.max_prompt_length})" if data.max_prompt_length else ""),
        f"{per_device} x {accumulated} x {recipe.devices} = {batch}",
    ]


def tables() -> dict[str, dict[str, str]]:
    """By page and mark, each table."""
    aliases = {trainer: table(("name", "here", ""), alias_rows(entries)) for trainer, entries in TRAINERS.items()}
    recipes = {name: table(RECIPE_COLUMNS, map(recipe_row, runs)) for name, runs in PUBLICATIONS.items()}
    return {"aliases.md": aliases, "recipes.md": recipes}


def page(text: str, tables_of_page: dict[str, str]) -> str:
    """`text` with its tables as they come out now."""
    for name, content in tables_of_page.items():
        before, after = text.split(f"<!-- table: {name} -->\n")
        rest = ("\n" + after)[("\n" + after).index("\n\n") :]  # up to a blank line it is old
        text = f"{before}<!-- table: {name} -->\n{content}{rest}"
    return text


if __name__ == "__main__":
    for file, content in tables().items():
        path = REPOSITORY / "docs" / file
        path.write_text(page(path.read_text(), content))
