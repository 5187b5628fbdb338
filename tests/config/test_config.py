"""The configuration: reading, checking, resolving, and that every field and every shipped use of one is real."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from open_po.commands import train
from open_po.config import FIELDS, LossConfig, RunConfig, load_config, parse_mixture
from open_po.config.aliases import ALIASES
from open_po.config.loss import LOSS_PARAMETERS
from open_po.distributed.runtime import Runtime
from open_po.errors import ConfigError
from open_po.losses import LOSSES
from open_po.optimizers import OPTIMIZERS

DPO = "beta, label_smoothing, reference_free, f_divergence_type, f_alpha_divergence_coef"  # what loss_type dpo takes

REPOSITORY = Path(__file__).parents[2]
REQUIRED = ["--model_name_or_path", "m", "--mixer_list", "a.jsonl", "1.0"]


def parse(*flags: str) -> RunConfig:
    return load_config([*REQUIRED, *flags])


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    return list(caught.value.problems)


def problem(*flags: str) -> str:
    """The only problem of a command line that gives what is required, and `flags`."""
    (line,) = problems(*REQUIRED, *flags)
    return line


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(content: str | bytes, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


# ----------------------------------------------------------------------------------------------------------- reading


def test_later_files_win_and_flags_win_over_files(write: Callable[..., str]) -> None:
    first = write("model_name_or_path: m\nmixer_list: [a, 1.0]\nseed: 1\nbeta: 0.3\nnum_epochs: 2\n", "first.yaml")
    second = write("seed: 2\nbeta: 0.4\n", "second.yaml")
    config = load_config([first, second, "--seed", "3"])
    assert (config.train.seed, config.loss.beta, config.train.num_epochs) == (3, 0.4, 2)
    config = load_config([second, first])
    assert (config.train.seed, config.loss.beta) == (1, 0.3)


def test_lists_are_replaced_not_joined(write: Callable[..., str]) -> None:
    path = write("model_name_or_path: m\nmixer_list: [a, 0.5, b, 10]\n")
    assert load_config([path]).data.mixer_list == ["a", "0.5", "b", "10"]
    assert load_config([path, "--mixer_list", "c", "7"]).data.mixer_list == ["c", "7"]


def test_null_in_a_later_place_takes_a_value_back(write: Callable[..., str]) -> None:
    path = write("model_name_or_path: m\nmixer_list: [a, 1.0]\nmax_train_steps: 5\neval_mixer_list: [b, 1.0]\n")
    assert load_config([path]).train.max_train_steps == 5
    assert load_config([path, "--max_train_steps", "null"]).train.max_train_steps is None
    assert load_config([path, "--eval_mixer_list", "null"]).data.eval_mixer_list is None
    assert load_config([path, write("max_train_steps:\n", "more.yaml")]).train.max_train_steps is None
    changed = load_config([path, "--mixer_list", "null", "--dataset_mixer", '{"c": 7}'])
    assert changed.data.mixer_list == ["c", "7"]


@pytest.mark.parametrize("form", ["flag", "equals", "yaml"])
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-7", 1e-7),
        ("learning_rate", "5E-7", 5e-7),
        ("learning_rate", "1", 1.0),
        ("num_epochs", "1_000", 1000),
        ("seed", "007", 7),
        ("exp_name", "007", "007"),
        ("exp_name", "1.10", "1.10"),
        ("exp_name", "2024-01-01", "2024-01-01"),
        ("exp_name", "2024-13-45", "2024-13-45"),
        ("model_revision", "0123456", "0123456"),
        ("use_lora", "true", True),
        ("use_lora", "FALSE", False),
        ("use_lora", "no", False),
        ("use_liger_kernel", "false", False),
        ("dtype", "bfloat16", "bfloat16"),
        ("max_train_steps", "null", None),
        ("lora_target_modules", "null", None),
    ],
)
def test_a_value_means_the_same_in_yaml_and_on_the_command_line(
    form: str, name: str, text: str, value: Any, write: Callable[..., str]
) -> None:
    arguments = {
        "flag": [*REQUIRED, f"--{name}", text],
        "equals": [*REQUIRED, f"--{name}={text}"],
        "yaml": [write(f"{name}: {text}\n"), *REQUIRED],
    }
    got = load_config(arguments[form]).flat()[name]
    assert (got, type(got)) == (value, type(value))


def test_flags_without_a_value_are_true_and_end_at_the_next_flag() -> None:
    config = parse("--use_lora", "--gradient_checkpointing", "--seed", "3", "--push_to_hub")
    assert config.model.use_lora
    assert config.model.gradient_checkpointing
    assert config.output.push_to_hub
    assert config.train.seed == 3


def test_lists_on_the_command_line() -> None:
    assert parse("--use_lora", "--lora_target_modules", "q_proj", "v_proj").model.lora_target_modules == [
        "q_proj",
        "v_proj",
    ]
    assert parse("--use_lora", "--lora_target_modules=q_proj").model.lora_target_modules == ["q_proj"]
    assert parse("--mixer_list", "a b.jsonl", "2").data.mixer_list == ["a b.jsonl", "2"]  # a path may hold a space


def test_a_list_may_be_one_line_of_words_in_yaml(write: Callable[..., str]) -> None:
    path = write("model_name_or_path: m\nmixer_list: a 0.5  b 10\nmixer_list_splits: train[:90%]\n")
    data = load_config([path]).data
    assert data.mixer_list == ["a", "0.5", "b", "10"]
    assert data.mixer_list_splits == ["train[:90%]"]


def test_a_negative_number_is_a_value_and_not_a_flag() -> None:
    assert problem("--learning_rate", "-1") == "learning_rate: must be above 0, got -1.0"
    assert problem("--weight_decay=-0.5") == "weight_decay: must not be negative, got -0.5"


def test_a_value_that_starts_with_dashes_follows_an_equals_sign() -> None:
    assert parse("--exp_name=--odd=name").output.exp_name == "--odd=name"


def test_of_a_repeated_flag_the_last_wins() -> None:
    assert parse("--seed", "1", "--seed", "2").train.seed == 2


def test_several_files_give_a_run_its_name(write: Callable[..., str]) -> None:
    """As overlays do; one file, or a name that is given, does not."""
    first, second = write("seed: 1\n", "gemma-2-2b.yaml"), write("seed: 2\n", "sum.yaml")
    output = load_config([first, second, *REQUIRED]).output
    assert (output.exp_name, output.output_dir) == ("gemma-2-2b_sum", "output/gemma-2-2b_sum")
    assert load_config([first, *REQUIRED]).output.exp_name == "dpo_tune_cache"
    assert load_config([first, second, *REQUIRED, "--exp_name", "mine"]).output.exp_name == "mine"
    assert load_config([write("exp_name: its\n", "third.yaml"), second, *REQUIRED]).output.exp_name == "its"


def test_a_file_changes_those_that_it_is_based_on(write: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write("seed: 1\nbeta: 0.2\nmixer_list: [a, 1.0]\nnum_epochs: 4\n", "deep/first.yaml")
    write("based_on: first.yaml\nseed: 2\n", "deep/second.yaml")  # seen from its own folder
    write("seed: 3\nwarmup_ratio: 0.3\n", "third.yaml")
    path = write("based_on: [deep/second.yaml, third.yaml]\nbeta: 0.4\nmixture: [{dataset: b}]\n")
    config = load_config([path, "--model_name_or_path", "m", "--num_epochs", "5"])
    assert (config.train.seed, config.train.warmup_ratio, config.loss.beta, config.train.num_epochs) == (3, 0.3, 0.4, 5)
    assert [part.dataset for part in config.data.training_mixture] == ["b"]
    assert load_config([str(tmp_path / "deep" / "second.yaml"), "--model_name_or_path", "m"]).train.seed == 2


def test_bases_that_cannot_be(write: Callable[..., str], tmp_path: Path) -> None:
    write("based_on: two.yaml\n", "one.yaml")
    two = write("based_on: one.yaml\n", "two.yaml")
    (line,) = problems(two, *REQUIRED)
    assert line == f"{tmp_path}/one.yaml: based_on {tmp_path}/two.yaml goes round in a circle; leave it out"
    odd = write("based_on: {a: b}\n", "odd.yaml")
    assert problems(odd, *REQUIRED) == [f"{odd}: based_on must name a file, or a list of files"]
    (line,) = problems(write("based_on: no.yaml\n"), *REQUIRED)
    assert line.startswith(f"{tmp_path}/no.yaml: cannot be read (No such file or directory)")


def test_empty_yaml_and_comments_are_nothing(write: Callable[..., str]) -> None:
    assert load_config([write("# nothing\n"), *REQUIRED]) == parse()


# -------------------------------------------------------------------------------------------------------- bad reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [b\n", ", line 2: is not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("seed: 1\n beta: 2\n", ", line 2: is not valid YAML (mapping values are not allowed here)"),
        ("seed: 1\nbeta: 2\nseed: 3\n", ", line 3: is not valid YAML (seed is given twice)"),
        ("dataset_mixer: {a: 1, a: 2}\n", ", line 1: is not valid YAML (a is given twice)"),
        ("seed: !!int x\n", ": is not valid YAML (invalid literal for int() with base 10: 'x')"),
        ("- seed\n", ": must be a mapping of field names to values"),
        ("just text\n", ": must be a mapping of field names to values"),
        ("true: 1\n", ": must be a mapping of field names to values"),
    ],
)
def test_unreadable_yaml(content: str, message: str, write: Callable[..., str]) -> None:
    path = write(content)
    assert problems(path, *REQUIRED) == [path + message]


def test_yaml_that_is_not_utf8(write: Callable[..., str]) -> None:
    path = write("exp_name: caf\xe9\n".encode("latin-1"))
    (line,) = problems(path, *REQUIRED)
    assert line.startswith(f"{path}: is not valid YAML ('utf-8' codec can't decode")
    assert "\n" not in line


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    advice = "configuration files come before the --flags"
    missing = f"{tmp_path}/no.yaml"
    assert problems(missing, *REQUIRED) == [f"{missing}: cannot be read (No such file or directory); {advice}"]
    (tmp_path / "nos.yaml").touch()
    assert problems(missing, *REQUIRED) == [
        f"{missing}: cannot be read (No such file or directory); did you mean {tmp_path}/nos.yaml?"
    ]
    assert problems(str(tmp_path), *REQUIRED) == [f"{tmp_path}: is a folder; name a YAML file"]
    (tmp_path / "config.yaml").touch()
    assert problems(str(tmp_path), *REQUIRED) == [
        f"{tmp_path}: is a folder; is it {tmp_path}/config.yaml that you mean?"
    ]


@pytest.mark.parametrize(
    ("unknown", "closest"),
    [
        ("learnig_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("dpo_betta", "dpo_beta"),
        ("num_train_epoch", "num_train_epochs"),
        ("max_seq_len", "max_seq_length"),
        ("lora_ran", "lora_rank"),
        ("mixer_lists", "mixer_list"),
    ],
)
def test_an_unknown_field_gets_the_closest_name(unknown: str, closest: str, write: Callable[..., str]) -> None:
    expected = f"{unknown}: unknown field; did you mean {closest}?"
    assert problem(f"--{unknown}", "1", "2") == expected
    assert problems(write(f"{unknown}: [1, 2]\n"), *REQUIRED) == [expected]


def test_an_unknown_field_like_no_other() -> None:
    assert problem("--zzz") == "zzz: unknown field; --help lists all fields"


@pytest.mark.parametrize(
    ("yaml_line", "message"),
    [
        ("num_epochs: 1.5", "num_epochs: expects a whole number, got '1.5'"),
        ("num_epochs: one", "num_epochs: expects a whole number, got 'one'"),
        ("num_epochs: true", "num_epochs: expects a whole number, got True"),
        ("num_epochs:", "num_epochs: expects a whole number, got None"),
        ("num_epochs: [1]", "num_epochs: expects a whole number, got ['1']"),
        ("learning_rate: fast", "learning_rate: expects a number, got 'fast'"),
        ("learning_rate: yes", "learning_rate: expects a number, got 'yes'"),
        ("use_lora: maybe", "use_lora: expects true or false, got 'maybe'"),
        ("use_lora: 1", "use_lora: expects true or false, got '1'"),
        ("use_lora:", "use_lora: expects true or false, got None"),
        ("exp_name: [a]", "exp_name: expects text, got ['a']"),
        ("exp_name: true", "exp_name: expects text, got True"),
        ("exp_name: ''", "exp_name: expects text, got ''"),
        ("dtype: float16", "dtype: expects one of auto, float32, bfloat16, got 'float16'"),
        ("optimizer: lion", f"optimizer: expects one of {', '.join(OPTIMIZERS)}, got 'lion'"),
        ("eval_mixer_list: {a: 1}", "eval_mixer_list: expects a list of words, got {'a': '1'}"),
        ("eval_mixer_list: []", "eval_mixer_list: expects a list of words, got []"),
        ("eval_mixer_list: [a, true]", "eval_mixer_list: expects a list of words, got ['a', True]"),
        ("eval_mixer_list: [a, [1]]", "eval_mixer_list: expects a list of words, got ['a', ['1']]"),
    ],
)
def test_wrong_types_in_yaml(yaml_line: str, message: str, write: Callable[..., str]) -> None:
    assert problems(write(yaml_line), *REQUIRED) == [message]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_epochs"], "num_epochs: no value follows the flag"),
        (["--lora_target_modules"], "lora_target_modules: no value follows the flag"),
        (["--num_epochs", "1", "2"], "num_epochs: takes one value, got 1 2"),
        (["--use_lora", "run.yaml"], "use_lora: expects true or false, got 'run.yaml'"),
        (["--use_lora", "!!int x"], "use_lora: expects true or false, got '!!int x'"),
        (["--use_lora="], "use_lora: expects true or false, got None"),
        (["--exp_name="], "exp_name: expects text, got ''"),
        (["--exp_name", "null"], "exp_name: expects text, got None"),
        (["--dataset_mixer", "{a"], "dataset_mixer: expects a mapping of names to numbers, got '{a'"),
    ],
)
def test_wrong_types_on_the_command_line(flags: list[str], message: str) -> None:
    assert problem(*flags) == message


# ---------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset_mixer '{a: 1}'", "dataset_mixer: contradicts mixer_list; give the training data once"),
        ("--max_seq_length 1", "max_seq_length: must be at least 2, a token of the prompt and one of the response"),
        ("--max_seq_length 0", "max_seq_length: must be above 0, got 0"),
        (
            "--max_prompt_length 2048",
            "max_prompt_length: 2048 leaves no room for a response in max_seq_length 2048",
        ),
        ("--mixer_list a", "mixer_list: needs NAME AMOUNT pairs, got a"),
        (
            "--mixer_list a b",
            "mixer_list: amount 'b' of a is neither a fraction (0.5) nor a count (1000)",
        ),
        (
            "--mixer_list a 1000.0",
            "mixer_list: fraction 1000.0 of a must lie in (0, 100], above 1 rows are repeated; a count of rows has no "
            "decimal point",
        ),
        (
            "--mixer_list a -3",
            "mixer_list: amount -3 of a must be above 0",
        ),
        ("--mixer_list a 0", "mixer_list: amount 0 of a takes no rows"),
        (
            "--mixer_list_splits train test",
            "mixer_list_splits: gives 2 splits for 1 datasets; give one, or one for each",
        ),
        (
            "--eval_mixer_list a 1 b 2 c 3 --eval_mixer_list_splits x y",
            "eval_mixer_list_splits: gives 2 splits for 3 datasets; give one, or one for each",
        ),
        (
            "--eval_mixer_list a",
            "eval_mixer_list: needs NAME AMOUNT pairs, got a",
        ),
        ("--eval_mixer_list_splits test", "eval_mixer_list_splits: needs eval_mixer_list"),
        ("--eval_steps 5", "eval_steps: needs eval_mixer_list or eval_mixture, the held-out data"),
        ("--loss_type dpp", "loss_type 'dpp' is unknown; did you mean dpo?"),
        ("--loss_type zzz", f"loss_type 'zzz' is unknown; known: {', '.join(LOSSES)}"),
        ("--gamma 1", f"loss_type dpo takes no gamma; it takes {DPO}"),
        ("--loss_type sft --beta 1", "loss_type sft takes no beta; it takes convention"),
        ("--beta 0", "loss_type dpo: beta is 0 but must lie in (0, inf)"),
        (
            "--loss_type exo_pair --label_smoothing 0",
            "loss_type exo_pair: label_smoothing is 0 but must lie in (0, 0.5]",
        ),
        (
            "--loss_type robust --label_smoothing 0.5",
            "loss_type robust: label_smoothing is 0.5 but must lie in [0, 0.5)",
        ),
        ("--loss_type ipo --convention men", "loss_type ipo: convention is 'men' but must be one of mean, sum"),
        ("--loss_type dpo sft --loss_weights 1", "loss_weights: gives 1 weights for 2 losses"),
        ("--loss_type dpo sft --loss_weights 1 -1", "loss_weights: -1 is not above 0"),
        ("--loss_type dpo sft --beta 1 2 3", "beta: gives 3 values for 2 losses; null leaves one out"),
        ("--loss_type dpo sft --beta 1 2", "loss_type sft takes no beta; it takes convention"),
        ("--loss_type dpo sft --delta 1", f"loss_type dpo takes no delta; it takes {DPO}"),
        ("--loss_parameters '{width: 1}'", "loss_parameters: width belongs to no loss of your own (MODULE:FUNCTION)"),
        (
            "--loss_type no_such_module:f",
            "loss_type no_such_module:f: cannot be imported (No module named 'no_such_module')",
        ),
        (
            "--loss_type simpo --reference_model_name_or_path r",
            "reference_model_name_or_path: loss_type simpo uses no reference model",
        ),
        (
            "--loss_type dpo --reference_free --reference_model_name_or_path r",
            "reference_model_name_or_path: loss_type dpo uses no reference model",
        ),
        ("--label_smoothing 0.6", "loss_type dpo: label_smoothing is 0.6 but must lie in [0, 0.5]"),
        (
            "--loss_type sft --reference_model_name_or_path r",
            "reference_model_name_or_path: loss_type sft uses no reference model",
        ),
        ("--reference_model_revision r", "reference_model_revision: needs reference_model_name_or_path"),
        ("--lora_rank 8", "lora_rank: needs use_lora"),
        ("--lora_dropout 0", "lora_dropout: needs use_lora"),
        ("--use_lora --lora_dropout 1", "lora_dropout: must be below 1, got 1.0"),
        ("--use_lora --lora_rank 0", "lora_rank: must be above 0, got 0"),
        ("--use_dora", "use_dora: needs use_lora"),
        ("--lora_start continue", "lora_start: needs use_lora"),
        (
            "--use_lora --lora_start continue --lora_dropout 0",
            "lora_dropout: comes with the adapters that lora_start continue trains on; leave it out",
        ),
        (
            "--use_qlora --lora_start continue --use_rslora",
            "use_rslora: comes with the adapters that lora_start continue trains on; leave it out",
        ),
        (
            "--merge_on_save false",
            "merge_on_save: false needs use_lora; a model without adapters has nothing to merge",
        ),
        (
            "--use_lora --merge_on_save false --push_to_hub --hf_merged",
            "hf_merged: contradicts merge_on_save false, which leaves no merged model; leave one of them out",
        ),
        (
            "--lr_scheduler_type constant --warmup_ratio 0.2",
            "warmup_ratio: lr_scheduler_type constant has no warm-up; use constant_with_warmup",
        ),
        (
            "--lr_scheduler_type constant --warmup_steps 5",
            "warmup_steps: lr_scheduler_type constant has no warm-up; use constant_with_warmup",
        ),
        (
            "--optimizer rmsprop --weight_decay 0.1",
            "weight_decay: is not applied by optimizer rmsprop; set it to 0 or use adamw",
        ),
        (
            "--weights_dtype bfloat16 --use_lora",
            "weights_dtype: bfloat16 contradicts use_lora, whose adapters train in float32; leave it out",
        ),
        (
            "--weights_dtype bfloat16 --dtype float32",
            "weights_dtype: bfloat16 contradicts dtype float32; set dtype to bfloat16 or auto",
        ),
        ("--warmup_ratio 1", "warmup_ratio: must be below 1, got 1.0"),
        ("--learning_rate nan", "learning_rate: must be above 0, got nan"),
        ("--learning_rate inf", "learning_rate: must be above 0, got inf"),
        ("--max_grad_norm nan", "max_grad_norm: must not be negative, got nan"),
        ("--seed -1", "seed: must not be negative, got -1"),
        ("--seed 4294967296", "seed: must be below 4294967296, got 4294967296"),
        ("--wandb_entity me", "wandb_entity: needs wandb among report_to"),
        ("--hf_private false", "hf_private: needs push_to_hub"),
        (
            "--push_to_hub --hf_repo_revision a..b",
            "hf_repo_revision: 'a..b' is no name that git allows a branch; use letters, digits, '.', '_', '-' and '/'",
        ),
    ],
)
def test_contradictions(flags: str, message: str) -> None:
    assert problem(*shlex.split(flags)) == message


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.hint in (int, int | None)])
def test_no_whole_number_may_be_negative(name: str) -> None:
    assert any(line.startswith(f"{name}: must ") for line in problems(*REQUIRED, f"--{name}", "-1"))


def test_words_that_yaml_1_1_takes_for_booleans(write: Callable[..., str]) -> None:
    """They are booleans for a field that is one, and words for others: prompt_sharing is on, off or auto."""
    path = write("prompt_sharing: off\nuse_lora: Yes\nload_balancing_loss: off\nexp_name: on\n")
    config = load_config([path, *REQUIRED])
    assert (config.model.prompt_sharing, config.output.exp_name) == ("off", "on")
    assert (config.model.use_lora, config.loss.load_balancing_loss) == (True, False)
    again = write(config.to_yaml(), "again.yaml")
    assert load_config([again]) == config
    assert parse("--use_lora", "yes").model.use_lora


def test_a_file_that_cannot_be_read_is_not_also_blamed_for_what_is_missing(write: Callable[..., str]) -> None:
    (line,) = problems(write("model_name_or_path: ["))
    assert "is not valid YAML" in line


def test_everything_is_reported_at_once(write: Callable[..., str]) -> None:
    broken = write("seed: [", "broken.yaml")
    path = write("num_epochs: many\nlearnig_rate: 1\nmax_prompt_length: 9000\nloss_type: sft\ngamma: 1\n")
    lines = problems(broken, path, f"{path}.missing", "--use_lora", "maybe", "--eval_steps", "1", "--seed", "-1")
    starts = [line.split(" ")[0] for line in lines]
    assert starts == [
        f"{broken},",
        f"{path}.missing:",
        "num_epochs:",
        "learnig_rate:",
        "use_lora:",
        "seed:",
        "max_prompt_length:",
        "loss_type",
        "eval_steps:",
    ]
    assert len(set(lines)) == len(lines)


def test_two_loss_problems_and_a_reference_problem_are_all_reported() -> None:
    lines = problems(*REQUIRED, "--gamma", "1", "--beta", "-1", "--reference_model_revision", "x")
    assert lines == [
        "reference_model_revision: needs reference_model_name_or_path",
        f"loss_type dpo takes no gamma; it takes {DPO}",
        "loss_type dpo: beta is -1 but must lie in (0, inf)",
    ]


@pytest.mark.parametrize(
    ("flags", "mistyped"),
    [
        ("--use_lora maybe --lora_rank 8", ["use_lora"]),
        ("--max_seq_length long --max_prompt_length 9000", ["max_seq_length"]),
        ("--mixer_list null --dataset_mixer a", ["dataset_mixer"]),
        ("--loss_type --gamma 1", ["loss_type"]),
        ("--push_to_hub perhaps --hf_repo_id a/b", ["push_to_hub"]),
        ("--eval_mixer_list= --eval_steps 1 --eval_mixer_list_splits test", ["eval_mixer_list"]),
        ("--beta much --gamma 1", ["beta", f"loss_type dpo takes no gamma; it takes {DPO}"]),
    ],
)
def test_a_mistyped_field_causes_no_second_complaint(flags: str, mistyped: list[str]) -> None:
    """The value that was meant is not known, so nothing is said about what it would contradict."""
    assert [line.split(":")[0] for line in problems(*REQUIRED, *flags.split(" "))] == mistyped


# ------------------------------------------------------------------------------------------------------------ mixture


def test_mixture_tells_fractions_from_counts() -> None:
    parts = parse_mixture(["a", "0.5", "b", "1000", "c", "1", "d", "1.0", "e", "1e-3"], ["train"])
    assert [(part.dataset, part.amount) for part in parts] == [
        ("a", 0.5),
        ("b", 1000),
        ("c", 1),
        ("d", 1.0),
        ("e", 0.001),
    ]
    assert [type(part.amount) for part in parts] == [float, int, int, float, float]


def test_dataset_mixer_is_mixer_list_in_another_form(write: Callable[..., str]) -> None:
    path = write("model_name_or_path: m\ndataset_mixer:\n  a/b.jsonl: 0.5\n  c: 1000\n  d: 1.0\n  e: 1e-3\n")
    data = load_config([path]).data
    assert data.mixer_list == ["a/b.jsonl", "0.5", "c", "1000", "d", "1.0", "e", "1e-3"]
    assert data.dataset_mixer is None
    amounts = {part.dataset: part.amount for part in data.training_mixture}
    assert amounts == {"a/b.jsonl": 0.5, "c": 1000, "d": 1.0, "e": 0.001}


def test_a_typed_mixture_says_more_of_each_part(write: Callable[..., str]) -> None:
    path = write(
        "model_name_or_path: m\nmixture:\n  - {dataset: ~/a.jsonl, amount: 0.5}\n"
        "  - {dataset: o/x, configuration: c, split: 'train[:9]', format: hh, prompt_template: 'q {text}', amount: 7}\n"
        "eval_mixture: [{dataset: b}]\neval_steps: 5\n"
    )
    config = load_config([path])
    first, second = config.data.training_mixture
    assert (first.dataset, first.amount, first.split) == (str(Path("~/a.jsonl").expanduser()), 0.5, "train")
    assert (second.configuration, second.split, second.format) == ("c", "train[:9]", "hh")
    assert (second.prompt_template, second.amount) == ("q {text}", 7)
    assert [part.dataset for part in config.data.held_out_mixture] == ["b"]
    assert load_config([write(config.to_yaml(), "again.yaml")]) == config
    replaced = load_config([path, "--mixer_list", "c", "1", "--eval_mixer_list", "d", "1.0"]).data
    assert [part.dataset for part in (*replaced.training_mixture, *replaced.held_out_mixture)] == ["c", "d"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[{dataset: a, amont: 2}]", "mixture: entry 1 has the unknown key amont; did you mean amount?"),
        ("[{dataset: a}, {amount: 2}]", "mixture: entry 2 has no dataset, a file or a Hub name"),
        ("[{dataset: a, amount: half}]", "mixture: amount 'half' of a is neither a fraction (0.5) nor a count (1000)"),
        ("[a]", "mixture: expects a list of mappings {dataset: NAME, amount: 1.0, ...}, got ['a']"),
        ("[{dataset: a}]\nmixer_list: [b, 1]", "mixture: contradicts mixer_list; give the training data once"),
        (
            "[{dataset: a}]\nmixer_list_splits: [test]",
            "mixer_list_splits: belongs to mixer_list; in mixture each entry has its own",
        ),
    ],
)
def test_mistakes_in_a_typed_mixture(write: Callable[..., str], text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([write(f"model_name_or_path: m\nmixture: {text}\n")])
    assert list(error.value.problems) == [problem]


# ---------------------------------------------------------------------------------------------------------- resolving


@pytest.mark.parametrize("loss_type", LOSSES)
def test_defaults_by_loss(loss_type: str) -> None:
    loss = parse("--loss_type", loss_type).loss
    defaults = {name: parameter.default for name, parameter in LOSSES[loss_type].parameters.items()}
    assert {name: getattr(loss, name) for name in defaults} == defaults
    unset = {f.name for f in dataclasses.fields(LossConfig)} - set(defaults) - {"loss_type"}
    assert all(getattr(loss, name) in (None, False) for name in unset)
    (part,) = loss.mix().parts
    assert (part.spec, part.weight, dict(part.parameters)) == (LOSSES[loss_type], 1.0, defaults)


def test_a_given_parameter_keeps_the_others_at_their_defaults() -> None:
    loss = parse("--loss_type", "dpo_gamma", "--gamma", "2").loss
    assert (loss.beta, loss.gamma, loss.label_smoothing) == (0.1, 2.0, 0.0)


def test_a_mix_gives_each_part_its_own_parameters(write: Callable[..., str]) -> None:
    path = write(
        "model_name_or_path: m\nmixer_list: a 1\nloss_type: [dpo_norm, dpo_gamma, sft]\nloss_weights: [1, 0.5, 0.1]\n"
        "beta: [10, null, null]\ngamma: 2\nlabel_smoothing: 0.1\n"
    )
    config = load_config([path])
    first, second, third = config.loss.mix().parts
    assert [part.weight for part in (first, second, third)] == [1.0, 0.5, 0.1]
    assert first.parameters == {"beta": 10.0, "label_smoothing": 0.1}
    assert {"beta": 0.1, "gamma": 2.0, "label_smoothing": 0.1}.items() <= second.parameters.items()
    assert third.parameters == {"convention": "token_mean"}
    assert config.loss.beta == [10.0, 0.1, None]
    assert load_config([write(config.to_yaml())]) == config
    flags = "--loss_type dpo_norm dpo_gamma sft --loss_weights 1 0.5 0.1 --beta 10 null null --gamma 2"
    assert parse(*flags.split(), "--label_smoothing", "0.1").loss == config.loss


def test_trackers_by_their_new_name_and_the_old(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse().output.report_to is None
    assert parse("--with_tracking").output.report_to == ["wandb"]
    assert parse("--with_tracking", "--report_to", "mlflow", "wandb").output.report_to == ["mlflow", "wandb"]
    assert parse("--report_to", "wandb", "wandb", "--wandb_entity", "me").output.report_to == ["wandb"]
    old = parse("--with_tracking", "--wandb_project_name", "p")
    assert load_config([write(old.to_yaml())]) == old == parse("--report_to", "wandb", "--wandb_project_name", "p")
    (problem,) = problems(*REQUIRED, "--report_to", "comet")
    assert problem == "report_to: expects a list of wandb, tensorboard, trackio, mlflow, got ['comet']"
    for name, package in (("mlflow", "mlflow-skinny"), ("trackio", "trackio")):
        monkeypatch.setitem(sys.modules, name, None)  # as if it was not installed
        (problem,) = problems(*REQUIRED, "--report_to", name, "tensorboard")
        assert problem == f"report_to: {name} is not installed; pip install {package}, or leave it out"


def test_defaults_that_depend_on_other_fields() -> None:
    config = parse("--per_device_train_batch_size", "3", "--max_seq_length", "100", "--exp_name", "x")
    assert config.train.max_tokens_per_batch == config.reference.reference_max_tokens_per_batch == "auto"
    assert (config.model.prompt_sharing, config.train.group_pairs_by_prompt) == ("auto", False)
    assert config.output.output_dir == "output/x"
    assert config.model.lora_rank is config.model.lora_alpha is config.model.lora_target_modules is None
    lora = parse("--use_lora", "--lora_rank", "8").model
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout) == (8, 16.0, 0.0)
    assert lora.lora_target_modules == ["all-linear"]
    four_bit = parse("--use_qlora", "--lora_rank", "8", "--lora_dropout", "0.05").model
    assert (four_bit.use_lora, four_bit.lora_rank, four_bit.lora_alpha, four_bit.lora_dropout) == (True, 8, 16.0, 0.05)
    continued = parse("--use_lora", "--lora_start", "continue").model
    assert continued.lora_rank is continued.lora_alpha is continued.lora_target_modules is None
    assert parse("--max_tokens_per_batch", "7", "--output_dir", "d").train.max_tokens_per_batch == 7


_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: not text.startswith("~/")  # which becomes the home folder
)
_positive = st.integers(1, 10**6)
_rate = st.floats(1e-12, 1e3)
_fields = st.fixed_dictionaries(
    {"model_name_or_path": _text, "mixer_list": st.lists(st.tuples(_text, st.just("0.5")), min_size=1, max_size=3)},
    optional={
        "exp_name": _text,
        "output_dir": _text,
        "model_revision": _text,
        "chat_template_name": _text,
        "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
        "use_lora": st.booleans(),
        "use_liger_kernel": st.none() | st.booleans(),
        "eval_mixer_list": st.just(["b", "3", "c", "1e-2"]),
        "max_train_samples": st.none() | _positive,
        "max_seq_length": st.integers(2, 10**6),
        "max_tokens_per_batch": st.just("auto") | _positive,
        "reference_max_tokens_per_batch": st.just("auto") | _positive,
        "prompt_sharing": st.sampled_from(["auto", "on", "off"]),
        "group_pairs_by_prompt": st.booleans(),
        "loss_type": st.sampled_from(sorted(LOSSES)),
        "learning_rate": _rate,
        "weight_decay": _rate,
        "warmup_ratio": st.floats(0, 0.99),
        "max_grad_norm": st.floats(0, 1e6),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@given(_fields)
def test_to_yaml_round_trips(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    fields["mixer_list"] = [word for part in fields["mixer_list"] for word in part]
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    config = load_config([str(path)])
    assert {name: config.flat()[name] for name in fields if fields[name] is not None} == {
        name: value for name, value in fields.items() if value is not None
    }
    path.write_text(config.to_yaml())
    assert load_config([str(path)]) == config


def test_a_resolved_configuration_with_everything_set_round_trips(write: Callable[..., str]) -> None:
    flags = (
        "--use_lora --lora_target_modules q v --loss_type dpo_gamma --label_smoothing 0.1 --with_tracking "
        "--wandb_entity e --push_to_hub --hf_repo_id a/b --hf_private false --eval_mixer_list b 2 --eval_steps 3 "
        "--reference_model_name_or_path r --reference_model_revision 0123 --max_prompt_length 9 "
        "--resume_from_checkpoint auto --checkpointing_steps 4 --tokenizer_name null"
    )
    config = parse(*shlex.split(flags))
    assert load_config([write(config.to_yaml())]) == config


NOT_SHAPING = {
    "gradient_checkpointing",
    "gradient_checkpointing_every",
    "offload_activations",
    "mlp_tile_tokens",
    "prompt_sharing",
    "max_tokens_per_batch",
    "optimizer_in_backward",
    "eval_mixer_list",
    "eval_mixer_list_configs",
    "eval_mixture",
    "eval_mixer_list_splits",
    "preprocessing_num_workers",
    "reference_cache_dir",
    "reference_cache_level",
    "reference_cache_read_only",
    "reference_max_tokens_per_batch",
    "verify_reference_rows",
    "reference_sharding",
    "parallel",
    "offload_optimizer",
    "offload_param",
    "zero_hpz_partition_size",
    "max_run_time",
    "async_checkpointing",
    "eval_steps",
    "logging_steps",
    "exp_name",
    "hub_strategy",
    "hf_entity",
    "hf_merged",
    "merge_on_save",
    "output_dir",
    "checkpointing_steps",
    "keep_last_n_checkpoints",
    "resume_from_checkpoint",
    "save_dtype",
    "report_to",
    "with_tracking",
    "sample_during_eval",
    "sample_max_new_tokens",
    "wandb_project_name",
    "wandb_entity",
    "push_to_hub",
    "hf_repo_id",
    "hf_repo_revision",
    "hf_private",
}


@pytest.mark.parametrize("name", FIELDS)
def test_the_digest_changes_with_what_shapes_the_result(name: str) -> None:
    config = parse()
    section = FIELDS[name].section
    changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: "other"})})
    assert (changed.result_fields() == config.result_fields()) == (name in NOT_SHAPING)
    assert (name in config.result_fields()) == (name not in NOT_SHAPING)


def test_the_digest_is_of_values_not_of_how_they_were_given(write: Callable[..., str]) -> None:
    path = write("model_name_or_path: m\ndataset_mixer: {a.jsonl: 1.0}\nbeta: 0.10\nloss_type: dpo\n")
    assert load_config([path]).result_fields() == parse().result_fields()


# ---------------------------------------------------------------------------------------------------- the command line


def test_configuration_errors_end_the_run_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*positional: object, **named: object) -> None:
        raise AssertionError("the run started")

    monkeypatch.setattr(Runtime, "start", start)
    assert train.main(["--learnig_rate", "1", "--num_epochs", "many", "--mixer_list", "a"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "config error: learnig_rate: unknown field; did you mean learning_rate?",
        "config error: num_epochs: expects a whole number, got 'many'",
        "config error: model_name_or_path: is required, a local folder or a Hub name",
        "config error: mixer_list: needs NAME AMOUNT pairs, got a",
    ]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run.yaml", "--seed", "1", "--help"]])
def test_help_lists_every_field(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, field in FIELDS.items():
        (position,) = [i for i, line in enumerate(lines) if line.startswith(f"  --{name}: ")]
        assert lines[position + 1].strip() == field.about.text
        assert field.about.text


# --------------------------------------------------------------------------------------------------- use of the fields


def _config_reads(sources: Iterable[Path]) -> set[str]:
    """Attributes read from something that is named as a configuration or one of its sections is."""
    owners = {"config", *(field.section for field in FIELDS.values())}
    names = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            owner: ast.AST | None = None
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner, name = node.value, node.attr
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                owner, wanted = node.args[0], node.args[1]
                name = wanted.value if isinstance(wanted, ast.Constant) else ""
            if isinstance(owner, ast.Attribute | ast.Name):
                last = owner.attr if isinstance(owner, ast.Attribute) else owner.id
                if last in owners:
                    names.add(name)
    return names


def test_every_field_is_read_outside_the_configuration() -> None:
    reads = _config_reads(path for path in (REPOSITORY / "open_po").rglob("*.py") if path.parent.name != "config")
    assert "loss" in reads  # config.loss.mix(): how the loss's fields are read, see the next test
    parameters = {f.name for f in dataclasses.fields(LossConfig)}
    resolved = {"dataset_mixer"}  # becomes mixer_list, see test_dataset_mixer_is_mixer_list_in_another_form
    assert {"training_mixture", "held_out_mixture"} <= reads  # what the next ones become, parsed
    resolved |= {"with_tracking"}  # becomes report_to
    forms = ("mixer_list", "mixer_list_splits", "mixer_list_configs", "mixture")
    resolved |= {f"{held_out}{form}" for held_out in ("", "eval_") for form in forms}
    resolved |= {"format", "prompt_template"}  # of the parts that have none of their own
    resolved |= {"format", "prompt_template"}  # of each part, see test_parts_are_read_as_the_run_says
    assert set(FIELDS) - reads - parameters - resolved == set()


def test_loss_parameters_are_those_that_some_loss_takes() -> None:
    assert set(LOSS_PARAMETERS) == {name for spec in LOSSES.values() for name in spec.parameters}


# --------------------------------------------------------------------------------------------------------- shipped use


def _shipped_yaml() -> list[Path]:
    """Those of runs; configs/accelerate is for accelerate, and tested with it."""
    of_others = ("accelerate", "evaluate")  # `TASK/evaluate.yaml` has flags of that command
    paths = (REPOSITORY / "configs").rglob("*.yaml")
    return sorted(path for path in paths if path.parent.name not in of_others and path.stem not in of_others)


def test_there_are_shipped_configurations() -> None:
    assert not (REPOSITORY / "configs").exists() or _shipped_yaml()


@pytest.mark.parametrize("path", _shipped_yaml(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_shipped_configurations_parse(path: Path) -> None:
    """Each by itself, an overlay with what it lacks."""
    # Beside a task lies what a loss needs on it.
    overlay = path.parent.name in ("models", "losses", "publications", "readings") or path.parents[1].name == "tasks"
    flags = [*REQUIRED[2:], "--eval_mixer_list", "b.jsonl", "1.0"] if overlay else []
    flags += ["--model_name_or_path", "m"] if overlay or path.parent.name == "tasks" else []
    load_config([str(path), *flags])


def _commands(text: str) -> Iterator[str]:
    """What follows `dpo_tune_cache.py`, or a training script that hands its flags on, in each command of `text`."""
    words = r"((?:[^;&|#\"']|\"[^\"]*\"|'[^']*')*)"
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.lstrip().startswith("#"):
            yield from re.findall(r"(?:dpo_tune_cache\.py|scripts/train/[\w/]+\.sh)" + words, line)


def _pages() -> list[Path]:
    return [path for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))] if path.exists()]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def _shipped_commands() -> list[tuple[str, str]]:
    texts = [(path, path.read_text()) for path in sorted((REPOSITORY / "scripts").rglob("*.sh"))]
    texts += [(page, block) for page in _pages() for block in _blocks(page, r"\w*")]
    return [(str(path.relative_to(REPOSITORY)), command) for path, text in texts for command in _commands(text)]


_LAUNCHER = {"dry-run", "restarts", "pairs"}  # flags of its own, which scripts/train/launch.sh hands on
_PIPELINE = {"restart", "skip-sft"}  # those of scripts/train/pipeline.sh, beside --sft.FIELD


@pytest.mark.parametrize(("where", "command"), _shipped_commands())
def test_shipped_commands_parse(where: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are fields; where no variable or placeholder hides a value, the whole is a configuration.

    A page's block that opens with `# NAME.yaml` or `# NAME.py` is that file of its commands.
    """
    words = shlex.split(command)
    flags = {word[2:].split("=")[0].removeprefix("sft.") for word in words if word.startswith("--")}
    assert flags - {"help", *_LAUNCHER, *_PIPELINE} <= {*FIELDS, *ALIASES}, where
    files = [word for word in words if word.endswith(".yaml")]
    if not files or re.search(r"\$|[A-Z]+\.yaml|\.\.\.|[\[<]", command):
        return
    words = [word for word in words if word[2:] not in _LAUNCHER]
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for block in _blocks(REPOSITORY / where, "(?:yaml|python)") if where.endswith(".md") else []:
        if name := re.match(r"# (\S+\.(?:yaml|py))\n", block):
            (tmp_path / name[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    load_config(words)


def test_commands_are_found_and_cut() -> None:
    text = "a --x 1\naccelerate launch --n 2 dpo_tune_cache.py c.yaml \\\n  --seed 3 'a;b' \"$@\" && b --y\n"
    assert list(_commands(text)) == [" c.yaml    --seed 3 'a;b' \"$@\" "]
    assert list(_commands("# dpo_tune_cache.py --x\nA=1 bash scripts/train/a/b.sh --seed 1  # it\n")) == [" --seed 1  "]
