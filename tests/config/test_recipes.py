"""Recipes as overlays: that all combinations resolve, and that the published ones resolve to what was published."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from open_po.config import RunConfig, load_config, raw
from open_po.config.aliases import ALIASES
from open_po.losses import LOSSES

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
OVERLAYS = ("models", "tasks", "losses", "publications", "readings")
# The configuration files of the DPO-gamma work, field by field as they were published.
GAMMA = json.loads((Path(__file__).parents[1] / "goldens" / "dpo_gamma_slm.json").read_text())
# What their files have besides the fields in GAMMA.
REST = """
preprocessing_num_workers: 12
do_eval: true
max_steps: -1
gradient_checkpointing_kwargs:
  use_reentrant: False
log_level: info
logging_strategy: steps
overwrite_output_dir: true
remove_unused_columns: true
report_to:
- wandb
"""
PROMPT = (
    "<|im_start|>user\nSUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR: <|im_end|> <|im_start|>assistant "
)


_read_yaml = raw.read_yaml


@functools.cache
def _content(path: Path) -> dict[str, Any]:
    problems: list[str] = []
    content = _read_yaml(path, problems)
    assert problems == []
    return content


@pytest.fixture(autouse=True)
def _each_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "read_yaml", lambda path, problems: dict(_content(path)))


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    """docs/tables.py, which has the published runs as compositions."""
    spec = importlib.util.spec_from_file_location("docs_tables", REPOSITORY / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def composed(*overlays: str, flags: str = "") -> RunConfig:
    """Overlays by folder and name, as tasks/mt."""
    return load_config([*(str(CONFIGS / f"{name}.yaml") for name in overlays), *flags.split()])


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("task", names("tasks"))
def test_every_combination_resolves(task: str) -> None:
    """With each model and each loss; an SFT stage's task has its loss."""
    for model in names("models"):
        for loss in [None] if task.endswith("_sft") else names("losses"):
            config = composed(f"models/{model}", f"tasks/{task}", *([f"losses/{loss}"] if loss else []))
            assert config.loss.names == [loss or "sft"]
            assert config.model.model_name_or_path == _content(CONFIGS / f"models/{model}.yaml")["model_name_or_path"]
            assert config.output.exp_name == "_".join([model, task, *([loss] if loss else [])])


def test_there_is_an_overlay_for_each_of_what_is_promised() -> None:
    assert names("losses") == sorted(LOSSES)
    models = "eurollm-1.7b gemma-2-2b tinyllama-1.1b pythia-2.8b pythia-6.9b phi-2 llama-3.1-tulu-3-8b olmo-2-7b "
    assert set((models + "olmo-2-13b qwen3-0.6b").split()) <= set(names("models"))
    tasks = {"mt", "sum", "hh", "shp", "se", "ultrafeedback", "truthy", "tulu3", "olmo2"}
    assert tasks | {f"{task}_sft" for task in ("mt", "sum", "hh", "shp", "se")} <= set(names("tasks"))


OVERLAY_FILES = [path for folder in OVERLAYS for path in sorted((CONFIGS / folder).glob("*.yaml"))]


@pytest.mark.parametrize("path", OVERLAY_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_overlay_opens_with_what_it_is_for_and_a_command_that_parses(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = path.read_text().splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert all(f"\n# {word}: " in header for word in ("Before", "Launch", "Change"))
    assert re.match(r"# \w.*[.;:,a-z]\n", header)
    assert not [line for line in lines if len(line) > 120 and not line.startswith("prompt_template")]
    text = re.sub(r" \\\n# *", " ", header)
    commands = re.findall(r"(?:dpo_tune_cache\.py|train/launch\.sh)((?: (?:configs/\S+|--\w+ [^-\s]\S*))+)", text)
    monkeypatch.chdir(REPOSITORY)
    for model, task, loss in re.findall(r"train/pipeline\.sh ([\w.-]+) (\w+) (\w+)", text):
        commands.append(f" configs/models/{model}.yaml configs/tasks/{task}.yaml configs/losses/{loss}.yaml")
    assert commands
    for command in commands:
        load_config(shlex.split(command.rstrip(".,;")))


def test_each_format_that_an_overlay_names_is_known() -> None:
    formats = importlib.import_module("open_po.data.formats")
    for task in names("tasks"):
        data = composed("models/qwen3-0.6b", f"tasks/{task}").data
        formats.row_reader(data.format, data.prompt_template)


# --------------------------------------------------------------------------------------------- the DPO-gamma work


def published(recipe: dict[str, Any]) -> dict[str, Any]:
    return GAMMA["common_to_all"] | recipe


RECIPES = {Path(recipe["file"]).stem: published(recipe) for recipe in GAMMA["recipes"]}
OPTIMIZERS = {"rmsprop": "rmsprop", "adamw_torch": "adamw"}
# What each of their algorithms is here, but for beta and gamma, whose numbers the files have.
LOSS = {
    "sft": {"loss_type": "sft", "convention": "token_mean"},
    "dpo": {"loss_type": "dpo", "reference_free": False, "label_smoothing": 0.0},
    "dpo-gamma": {"loss_type": "dpo_gamma", "label_smoothing": 0.0},
    "slic-dpo": {"loss_type": "slic_dpo", "delta": 1.0},
    "slic": {"loss_type": "slic", "delta": 1.0, "lambda_sft": 1.0, "sft_type": "token"},
    "cpo": {"loss_type": "cpo", "lambda_sft": 1.0, "sft_type": "token", "label_smoothing": 0.0},
    "simpo": {"loss_type": "simpo", "label_smoothing": 0.0},
}


def assert_as_published(config: RunConfig, recipe: dict[str, Any]) -> None:
    """Each field against the file's own words."""
    values = config.flat()
    same = (
        *("model_name_or_path", "model_revision", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler_type", "warmup_ratio", "seed", "max_seq_length", "logging_steps"),
        "gradient_checkpointing",
    )
    assert {name: values[name] for name in same} == {name: recipe[name] for name in same}
    assert values["num_epochs"] == recipe["num_train_epochs"]
    assert values["optimizer"] == OPTIMIZERS[recipe["optimizer_type"]]
    assert values["checkpointing_steps"] == recipe["save_steps"]
    assert values["keep_last_n_checkpoints"] == recipe["save_total_limit"]
    assert values["dtype"] == recipe["torch_dtype"]
    assert (values["weight_decay"], values["warmup_steps"], values["max_prompt_length"]) == (0.0, None, None)
    assert values["truncation"] == "keep_end"
    # The loss
    wanted = LOSS[recipe["algorithm"]] | ({} if recipe["algorithm"] == "sft" else {"beta": recipe["beta"]})
    wanted |= {"gamma": recipe["gamma"]} if "gamma" in recipe else {}
    assert {name: values[name] for name in wanted} == wanted
    assert ("gamma" in recipe) == (values["gamma"] is not None)
    assert config.loss.mix().needs_reference == (recipe["algorithm"] in ("dpo", "dpo-gamma", "slic-dpo"))
    # The data
    (name,) = recipe["dataset_mixer"]
    configuration = recipe.get("dataset_configs", [None])[0]
    (part,) = config.data.training_mixture
    assert (part.dataset, part.amount, part.split, part.configuration) == (name, 1.0, "train", configuration)
    held_out = [(p.dataset, p.amount, p.split, p.configuration) for p in config.data.held_out_mixture]
    if recipe["evaluation_strategy"] == "no":
        assert (held_out, values["eval_steps"]) == ([], None)
    else:
        assert held_out == [(name, recipe.get("eval_split_size", 1.0), "validation", configuration)]
        assert values["eval_steps"] == recipe["eval_steps"]
    layout = "tldr_sft" if recipe["algorithm"] == "sft" else "tldr_comparisons"
    wanted_rows = {"mt": (None, None), "sum": (layout, PROMPT)}[recipe["task_name"]]
    assert (values["format"], values["prompt_template"]) == wanted_rows


def test_all_35_are_there(tables: ModuleType) -> None:
    assert len(RECIPES) == 35
    assert sorted(recipe.run for recipe in tables.PUBLICATIONS["dpo_gamma"]) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_overlays_are_the_published_run(name: str, tables: ModuleType) -> None:
    (recipe,) = (recipe for recipe in tables.PUBLICATIONS["dpo_gamma"] if recipe.run == name)
    assert_as_published(recipe.config(), RECIPES[name])
    accumulation = RECIPES[name]["gradient_accumulation_steps"]
    assert tables.recipe_row(recipe)[-1] == f"1 x {accumulation} x 4 = {accumulation * 4}"


NOT_COMPARED = {"exp_name", "output_dir", "report_to", "preprocessing_num_workers", "mixture", "eval_mixture"}


@pytest.mark.parametrize("name", RECIPES)
def test_their_file_unchanged_is_the_same_run(name: str, tables: ModuleType, tmp_path: Path) -> None:
    fields = {key: value for key, value in RECIPES[name].items() if key != "file"}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(fields) + REST)
    theirs = load_config([str(path)])
    assert_as_published(theirs, RECIPES[name])
    assert (theirs.output.exp_name, theirs.output.output_dir) == (fields["run_name"], fields["output_dir"])
    assert theirs.output.report_to == ["wandb"]
    (recipe,) = (recipe for recipe in tables.PUBLICATIONS["dpo_gamma"] if recipe.run == name)
    ours = recipe.config()
    assert {key: value for key, value in theirs.flat().items() if key not in NOT_COMPARED} == {
        key: value for key, value in ours.flat().items() if key not in NOT_COMPARED
    }
    assert theirs.data.training_mixture == ours.data.training_mixture
    assert theirs.data.held_out_mixture == ours.data.held_out_mixture
    told = {note.split(" ")[0].rstrip(":") for note in theirs.notes}
    no_effect = {"attn_implementation", "per_device_eval_batch_size", "do_eval", "gradient_checkpointing_kwargs"}
    assert no_effect | {"log_level", "logging_strategy", "overwrite_output_dir", "remove_unused_columns"} <= told


def test_the_prompt_of_summarisation_to_the_letter() -> None:
    template = composed("tasks/sum", flags="--model_name_or_path m").data.prompt_template
    assert template is not None
    post = template.format(subreddit="aww", title="A dog", post="It barked.")
    assert post == (
        "<|im_start|>user\nSUBREDDIT: r/aww\nTITLE: A dog\nPOST: It barked.\nTL;DR: <|im_end|> <|im_start|>assistant "
    )


@pytest.mark.parametrize("task", ["mt", "sum", "mt_sft", "sum_sft"])
def test_the_reading_of_what_their_code_ran(task: str) -> None:
    reading = composed("models/gemma-2-2b", f"tasks/{task}", "readings/dpo_gamma_as_run")
    files = composed("models/gemma-2-2b", f"tasks/{task}")
    assert (reading.train.optimizer, reading.train.warmup_steps, reading.train.weight_decay) == ("adamw", 150, 0.05)
    assert (reading.data.max_prompt_length, reading.data.truncation) == (256, "keep_end")
    changed = {name for name, value in reading.flat().items() if value != files.flat()[name]}
    own = {"exp_name", "output_dir", "warmup_steps", "weight_decay", "max_prompt_length"}
    assert changed == own | (set() if task.endswith("_sft") else {"optimizer"})


# --------------------------------------------------------------------------------------------- the other publications


@pytest.mark.parametrize(("model", "size"), [("pythia-2.8b", "2.8b"), ("pythia-6.9b", "6.9b")])
@pytest.mark.parametrize(
    ("task", "dataset", "end", "ratio"),
    [
        ("hh", "Anthropic/hh-rlhf", "keep_end", None),
        ("shp", "stanfordnlp/SHP", "keep_start", 2.0),
        ("se", "HuggingFaceH4/stack-exchange-preferences", "keep_start", None),
    ],
)
def test_both_stages_of_the_dpo_paper(
    model: str, size: str, task: str, dataset: str, end: str, ratio: float | None
) -> None:
    first = composed(f"models/{model}", f"tasks/{task}_sft")
    second = composed(f"models/{model}", f"tasks/{task}", "losses/dpo")
    assert (first.loss.names, first.loss.convention) == (["sft"], "sequence_sum")
    assert (second.loss.names, second.loss.beta) == (["dpo"], 0.1)
    for config in (first, second):
        train, data = config.train, config.data
        assert config.model.model_name_or_path == f"EleutherAI/pythia-{size}"
        assert (train.optimizer, train.learning_rate, train.max_grad_norm) == ("rmsprop", 5e-7, 10)
        assert (train.lr_scheduler_type, train.warmup_steps) == ("constant_with_warmup", 150)
        assert (train.num_epochs, train.seed, config.model.dtype) == (1, 0, "float32")
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps * 4 == 64
        assert (data.max_seq_length, data.max_prompt_length, data.truncation) == (512, 256, end)
        assert data.min_score_ratio == ratio
        assert {part.dataset for part in [*data.training_mixture, *data.held_out_mixture]} == {dataset}
        assert [part.amount for part in data.held_out_mixture] == [256]
        assert train.eval_steps == 20_000 // 64
        assert train.sample_during_eval > 0


def test_the_batch_of_6_9b_as_run() -> None:
    train = composed("models/pythia-6.9b", "tasks/hh", "losses/dpo", "readings/dpo_paper_6.9b_as_run").train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps * 4 == 32
    assert train.eval_steps == 20_000 // 32


@pytest.mark.parametrize(
    ("overlays", "start", "data", "rate", "seed", "accumulation"),
    [
        (
            ("models/llama-3.1-tulu-3-8b", "tasks/tulu3"),
            "allenai/Llama-3.1-Tulu-3-8B-SFT",
            "allenai/llama-3.1-tulu-3-8b-preference-mixture",
            *(5e-7, 8, 4),
        ),
        (
            ("models/llama-3.1-tulu-3-8b", "tasks/tulu3", "readings/tulu3_batch_512"),
            "allenai/Llama-3.1-Tulu-3-8B-SFT",
            "allenai/llama-3.1-tulu-3-8b-preference-mixture",
            *(5e-7, 8, 16),
        ),
        (
            ("models/olmo-2-7b", "tasks/olmo2"),
            "allenai/OLMo-2-1124-7B-SFT",
            "allenai/olmo-2-1124-7b-preference-mix",
            *(1e-6, 42, 4),
        ),
        (
            ("models/olmo-2-13b", "tasks/olmo2_13b"),
            "allenai/OLMo-2-1124-13B-SFT",
            "allenai/olmo-2-1124-13b-preference-mix",
            *(8e-7, 8, 4),
        ),
    ],
    ids=["tulu3", "tulu3-512", "olmo2-7b", "olmo2-13b"],
)
def test_tulu_3_and_olmo_2(
    overlays: tuple[str, ...], start: str, data: str, rate: float, seed: int, accumulation: int
) -> None:
    config = composed(*overlays[:2], "losses/dpo_norm", *overlays[2:])
    train = config.train
    assert (config.model.model_name_or_path, config.model.model_revision) == (start, "main")
    assert [(part.dataset, part.amount, part.split) for part in config.data.training_mixture] == [(data, 1.0, "train")]
    assert (train.learning_rate, train.seed, train.lr_scheduler_type, train.warmup_ratio) == (rate, seed, "linear", 0.1)
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (1, accumulation)
    assert (train.optimizer, train.weight_decay, train.num_epochs, train.logging_steps) == ("adamw", 0.0, 1, 1)
    assert (config.loss.names, config.loss.beta, config.data.max_seq_length) == (["dpo_norm"], 5, 2048)
    assert (config.data.scored_turns, config.model.gradient_checkpointing) == ("all", True)
    assert config.data.add_bos == ("olmo2" in overlays[1])


def test_the_lora_run_on_stack_exchange() -> None:
    config = composed("tasks/se_lora", "losses/dpo", flags="--model_name_or_path m")
    model, train = config.model, config.train
    assert (model.use_lora, model.lora_rank, model.lora_alpha, model.lora_dropout) == (True, 8, 16, 0.05)
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_steps) == (5e-4, "cosine", 100)
    assert (train.max_train_steps, config.data.max_seq_length, config.loss.beta) == (1000, 1024, 0.1)
    assert (config.data.format, config.data.prompt_template) == (
        "stack_exchange_paired",
        "Question: {question}\n\nAnswer: ",
    )


def test_a_task_that_says_beta_says_it_for_simpo_too() -> None:
    """As the DPO-gamma work ran it; elsewhere SimPO has its own scale."""
    assert composed("models/gemma-2-2b", "tasks/mt", "losses/simpo").loss.beta == 0.1
    assert composed("models/qwen3-0.6b", "tasks/ultrafeedback", "losses/simpo").loss.beta == 2.0
    assert composed("models/gemma-2-2b", "tasks/mt", "losses/dpo_norm").loss.beta == 5.0


# ------------------------------------------------------------------------------------------------------- the pages


def test_the_pages_have_the_tables_that_the_code_makes(tables: ModuleType) -> None:
    for file, content in tables.tables().items():
        text = (REPOSITORY / "docs" / file).read_text()
        assert tables.page(text, content) == text, "python docs/tables.py"
        assert text.count("<!-- table: ") == len(content)
        without = re.sub(r"(<!-- table: .* -->\n)(\|.*\n)+", r"\1", text)
        assert len(without) < len(text) / 2
        assert tables.page(without, content) == text


def test_a_row_of_aliases_says_what_becomes_of_a_name(tables: ModuleType) -> None:
    text = (REPOSITORY / "docs" / "aliases.md").read_text()
    assert "| `dpo_beta` | `beta` |  |\n" in text
    assert "| `attn_implementation` | no effect | the attention that a model allows" in text
    assert "| `cache_logprobs_only` | refused | `python -m open_po cache build` does that |\n" in text
    assert "| `loss_type` | `loss_type` | `sigmoid`: dpo; " in text
    assert all(f"`{name}`" in text for name in ALIASES)
