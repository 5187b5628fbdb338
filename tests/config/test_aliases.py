"""Flags and files of other trainers: what each name becomes, what is told, what is refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from open_po.commands import train
from open_po.config import FIELDS, RunConfig, load_config
from open_po.config.aliases import ALIASES
from open_po.config.aliases.loss import ALGORITHMS
from open_po.errors import ConfigError
from open_po.losses import LOSSES

REQUIRED = "--model_name_or_path m --mixer_list a.jsonl 1.0"


def parse(flags: str, required: str = REQUIRED) -> RunConfig:
    return load_config(shlex.split(f"{required} {flags}"))


def problem(flags: str, required: str = REQUIRED) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(flags, required)
    return str(caught.value.problems[0])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any], str], str]:
    def write(content: dict[str, Any], name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump({"model_name_or_path": "m", **content}))
        return str(path)

    return write


# Every flag that the launch scripts have which shared/recipes names, with a value, and what is to become of it.
TULU_3 = """
    --exp_name tulu3_8b_dpo --model_name_or_path allenai/Llama-3.1-Tulu-3-8B-SFT --model_revision main
    --tokenizer_name allenai/Llama-3.1-Tulu-3-8B-SFT --tokenizer_revision main --use_slow_tokenizer
    --dataset_mixer_list allenai/llama-3.1-tulu-3-8b-preference-mixture 1.0 --max_seq_length 2048
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --learning_rate 5e-07 --lr_scheduler_type linear
    --warmup_ratio 0.1 --weight_decay 0.0 --num_epochs 1 --dpo_loss_type dpo_norm --dpo_beta 5 --use_flash_attn
    --gradient_checkpointing --logging_steps 1 --seed 8"""
OLMO_2 = """
    --exp_name olmo2_13b_dpo --model_name_or_path allenai/OLMo-2-1124-13B-SFT --model_revision main
    --tokenizer_name allenai/OLMo-2-1124-13B-SFT --tokenizer_revision main --use_slow_tokenizer False --add_bos
    --mixer_list allenai/olmo-2-1124-13b-preference-mix 1.0 --max_seq_length 2048 --per_device_train_batch_size 1
    --gradient_accumulation_steps 4 --learning_rate 8e-7 --lr_scheduler_type linear --warmup_ratio 0.1
    --weight_decay 0.0 --num_epochs 1 --logging_steps 1 --loss_type dpo_norm --beta 5 --gradient_checkpointing
    --seed 8"""


def test_their_launch_scripts_are_the_runs_that_they_describe() -> None:
    tulu, olmo = parse(TULU_3, ""), parse(OLMO_2, "")
    assert (tulu.loss.names, tulu.loss.beta, olmo.loss.names, olmo.loss.beta) == (["dpo_norm"], 5, ["dpo_norm"], 5)
    (part,) = tulu.data.training_mixture
    assert (part.dataset, part.amount, part.split) == ("allenai/llama-3.1-tulu-3-8b-preference-mixture", 1.0, "train")
    assert (tulu.train.learning_rate, tulu.train.gradient_accumulation_steps, tulu.train.seed) == (5e-7, 16, 8)
    assert (olmo.train.learning_rate, olmo.train.gradient_accumulation_steps, olmo.train.seed) == (8e-7, 4, 8)
    assert (tulu.model.use_slow_tokenizer, olmo.model.use_slow_tokenizer, olmo.data.add_bos) == (True, False, True)
    assert (tulu.model.tokenizer_revision, tulu.output.exp_name) == ("main", "tulu3_8b_dpo")
    (note,) = tulu.notes
    assert note.startswith("use_flash_attn true: ")
    assert olmo.notes == ()


NAMED = {  # flags with a value -> our fields, None: no effect
    "--dpo_beta 0.3": {"beta": 0.3},
    "--pref_beta 0.3": {"beta": 0.3},
    "--rl_beta 0.3": {"beta": 0.3},
    "--dpo_label_smoothing 0.2": {"label_smoothing": 0.2},
    "--dpo_loss_type wpo": {"loss_type": "wpo"},
    "--loss_type sigmoid": {"loss_type": "dpo"},
    "--loss_type sigmoid_norm": {"loss_type": "dpo_norm"},
    "--loss_type aot_pair": {"loss_type": "aot_unpaired"},
    "--loss_type sigmoid sft": {"loss_type": ["dpo", "sft"]},
    "--pref_loss sigmoid": {"loss_type": "dpo"},
    "--rl ipo": {"loss_type": "ipo"},
    "--stage dpo --pref_loss simpo --simpo_gamma 0.7": {"loss_type": "simpo", "gamma": 0.7},
    "--dpo_loss_type simpo --dpo_beta 2 --dpo_gamma_beta_ratio 0.3": {"gamma": 0.6, "beta": 2.0},
    "--loss_type simpo --beta 2.5 --gamma_beta_ratio 0.4": {"gamma": 1.0},
    "--num_train_epochs 3": {"num_epochs": 3},
    "--num_train_epochs 3.0": {"num_epochs": 3},
    "--clip_grad_norm 2": {"max_grad_norm": 2.0},
    "--clip_grad_norm -1": {"max_grad_norm": 0.0},
    "--max_grad_norm -1": {"max_grad_norm": 0.0},
    "--optimizer_type rmsprop": {"optimizer": "rmsprop"},
    "--optimizer_type adamw_torch": {"optimizer": "adamw"},
    "--optim RMSprop": {"optimizer": "rmsprop"},
    "--optimizer adamw_torch_fused": {"optimizer": "adamw"},
    "--use_8bit_optimizer false": {"optimizer": "adamw"},
    "--offload_optimizer --offload_param --zero_stage 3": {
        "offload_optimizer": True,
        "offload_param": True,
        "parallel": "zero3",
    },
    "--zero_stage 0": {"parallel": "ddp"},
    "--zero_hpz_partition_size 8": {"zero_hpz_partition_size": 8},
    "--activation_memory_budget 0.5": {"gradient_checkpointing": True},
    "--activation_memory_budget 1": {"gradient_checkpointing": False},
    "--compile_model": {"torch_compile": True},
    "--run_name r": {"exp_name": "r"},
    "--tokenizer_name_or_path t": {"tokenizer_name": "t"},
    "--dataset_mixer_list_splits train[:9%]": {"mixer_list_splits": ["train[:9%]"]},
    "--max_steps 7": {"max_train_steps": 7},
    "--max_steps -1": {"max_train_steps": None},
    "--save_steps 9": {"checkpointing_steps": 9},
    "--save_strategy steps": {"checkpointing_steps": 500},
    "--save_strategy no": {"checkpointing_steps": None},
    "--save_steps 9 --save_strategy no": {"checkpointing_steps": None},
    "--save_total_limit 2": {"keep_last_n_checkpoints": 2},
    "--bf16 true": {"dtype": "bfloat16"},
    "--bf16 true --torch_dtype bfloat16": {"dtype": "bfloat16"},
    "--bf16 true --torch_dtype float32": {"dtype": "bfloat16"},
    "--torch_dtype float32": {"dtype": "float32"},
    "--fp16 false": {"dtype": "auto"},
    "--max_length 99": {"max_seq_length": 99},
    "--cutoff_len 99": {"max_seq_length": 99},
    "--sequence_len 99": {"max_seq_length": 99},
    "--micro_batch_size 3": {"per_device_train_batch_size": 3},
    "--lr_scheduler cosine": {"lr_scheduler_type": "cosine"},
    "--dataset_num_proc 3": {"preprocessing_num_workers": 3},
    "--truncation_side right": {"truncation": "keep_start"},
    "--truncation_mode keep_end": {"truncation": "keep_end"},
    "--use_peft --lora_r 8": {"use_lora": True, "lora_rank": 8},
    "--use_lora --lora_target_modules all": {"lora_target_modules": ["all-linear"]},
    "--finetuning_type lora --lora_target q,v": {"use_lora": True, "lora_target_modules": ["q", "v"]},
    "--adapter lora --lora_target_linear true": {"use_lora": True, "lora_target_modules": ["all-linear"]},
    "--ref_model r": {"reference_model_name_or_path": "r"},
    "--report_to none": {"report_to": None},
    "--push_to_hub --hub_model_id a/b": {"hf_repo_id": "a/b"},
    "--evaluation_strategy no --eval_steps 5": {"eval_steps": None},
    "--eval_mixer_list b 1.0 --eval_strategy steps --eval_steps 5": {"eval_steps": 5},
    "--algorithm dpo-gamma --gamma 0.3": {"loss_type": "dpo_gamma", "gamma": 0.3},
    "--contrast_loss_type sigmoid": {"loss_type": "dpo", "beta": 0.1},
    "--contrast_loss_type sigmoid --average_log_prob true --beta 5": {"loss_type": "dpo_norm", "beta": 5.0},
    "--contrast_loss_type dpo-gamma": {"loss_type": "dpo_gamma", "gamma": 2.0},  # a default of their code
    "--contrast_loss_type hinge --reference_free true --lambda_sft 0.5": {"loss_type": "slic", "lambda_sft": 0.5},
    "--contrast_loss_type sigmoid --reference_free true": {"loss_type": "dpo", "reference_free": True},
    "--contrast_loss_type sigmoid --lambda_contrast 0.5": {"loss_type": "dpo", "loss_weights": [0.5]},
    "--contrast_loss_type sigmoid --lambda_sft 0.2 --sft_type instance": {
        "loss_type": ["dpo", "sft"],
        "loss_weights": [1.0, 0.2],
        "convention": [None, "sequence_sum"],
    },
}


@pytest.mark.parametrize("flags", NAMED)
def test_a_name_becomes_our_field(flags: str) -> None:
    values = parse(flags).flat()
    assert {name: values[name] for name in NAMED[flags]} == NAMED[flags]


def test_their_ways_to_name_data() -> None:
    (part,) = parse("--dataset_name d --dataset_config_name c", "--model_name_or_path m").data.training_mixture
    assert (part.dataset, part.configuration, part.split, part.amount) == ("d", "c", "train", 1.0)
    (part,) = parse("--train_file x.jsonl", "--model_name_or_path m").data.training_mixture
    assert part.dataset == "x.jsonl"
    theirs = "--dataset_mixer '{a: 0.5, b: 1.0}' --dataset_configs x y --dataset_splits train_prefs test_prefs"
    data = parse(theirs, "--model_name_or_path m").data
    found = [(part.dataset, part.amount, part.split, part.configuration) for part in data.training_mixture]
    assert found == [("a", 0.5, "train_prefs", "x"), ("b", 1.0, "train_prefs", "y")]
    held_out = [(part.dataset, part.amount, part.split, part.configuration) for part in data.held_out_mixture]
    assert held_out == [("a", 1.0, "test_prefs", "x"), ("b", 1.0, "test_prefs", "y")]


NO_EFFECT = """
    --packing --use_flash_attn --concatenated_forward --fused_optimizer --do_not_randomize_output_dir
    --try_launch_beaker_eval_jobs --oe_eval_tasks x --oe_eval_max_length 4096 --gs_bucket_path gs://b
    --attn_implementation flash_attention_2 --do_eval true --per_device_eval_batch_size 4 --log_level info
    --logging_strategy steps --overwrite_output_dir true --remove_unused_columns true --precompute_ref_log_probs
    --gamma_beta_ratio 0.3 --cache_dataset_only false"""


def test_what_has_no_effect_is_told_in_a_line_each_and_changes_nothing() -> None:
    config = parse(NO_EFFECT)
    assert config == parse("")
    assert parse("").notes == ()
    names = re.findall(r"--(\w+)", NO_EFFECT)
    assert [note.split(" ")[0].rstrip(":") for note in config.notes] == names
    assert all(len(note.split(": ", 1)[1]) > 10 and "\n" not in note for note in config.notes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cache_logprobs_only", "cache_logprobs_only: `python -m open_po cache build` does that"),
        ("--cache_dataset_only", "cache_dataset_only: `python -m open_po inspect` tokenises and keeps what it did"),
        (
            "--config_name c",
            "config_name: a model's configuration is that of its folder; set model_name_or_path to one",
        ),
        ("--fp16 true", "fp16: float16 is not offered; use bf16 or dtype bfloat16"),
        ("--torch_dtype float16", "torch_dtype: float16 is not offered; use dtype bfloat16 or float32"),
        ("--rpo_alpha 1", "rpo_alpha: set loss_type to [dpo, sft] and loss_weights to [1, rpo_alpha]"),
        ("--adam_beta2 0.95", "adam_beta2: is 0.999, PyTorch's; leave it out"),
        ("--report_to all", "report_to: all is not offered; name them: wandb, tensorboard, trackio, mlflow"),
        ("--save_strategy epoch", "save_strategy: epoch is not offered; say steps, and checkpointing_steps"),
        ("--checkpointing_steps epoch", "checkpointing_steps: epoch is not offered; give a number of steps"),
        ("--evaluation_strategy epoch", "evaluation_strategy: epoch is not offered; say steps, and eval_steps"),
        ("--zero_stage 4", "zero_stage: expects 0, 1, 2 or 3, got 4"),
        ("--activation_memory_budget 2", "activation_memory_budget: must lie in [0, 1], got 2"),
        ("--dpo_beta much", "dpo_beta: expects a number or a list with a number for each loss, got 'much'"),
        ("--num_train_epochs 1.5", "num_train_epochs: expects a whole number, got '1.5'"),
        ("--loss_type simpo --gamma_beta_ratio 0.3", "gamma_beta_ratio: needs beta beside it"),
        ("--lambda_contrast 2", "lambda_contrast: needs contrast_loss_type beside it; or say loss_type"),
        ("--algorithm ppo", "algorithm: expects one of dpo, dpo-gamma, slic-dpo, cpo, simpo, slic, sft, got ppo"),
        (
            "--contrast_loss_type foo",
            "contrast_loss_type foo, reference_free false, lambda_contrast 1, lambda_sft 0: is no",
        ),
        ("--task_name qa", "task_name: expects mt or sum, got qa; of other data format and prompt_template say it"),
        ("--dataset_splits train test", "dataset_splits: belongs to dataset_mixer; otherwise say mixture"),
        # Both a name and another of the same field, with values that differ:
        ("--dpo_beta 1 --beta 2", "dpo_beta: says beta, which is given too, with another value; leave one of them out"),
        ("--beta 2 --dpo_beta 1", "dpo_beta: says beta, which is given too, with another value; leave one of them out"),
        ("--dpo_beta 1 --pref_beta 2", "pref_beta: says beta, which dpo_beta says too, with another value; leave one"),
        (
            "--dpo_loss_type dpo --loss_type ipo",
            "dpo_loss_type: says loss_type, which is given too, with another value",
        ),
        ("--loss_type dpo --algorithm dpo", "algorithm: says the loss, as loss_type does; leave one of them out"),
        (
            "--algorithm dpo --contrast_loss_type hinge",
            "algorithm: dpo contradicts contrast_loss_type hinge, reference_",
        ),
        ("--dataset_mixer_list b 1.0", "dataset_mixer_list: says mixer_list, which is given too, with another value"),
    ],
)
def test_what_is_refused_says_what_does_it(flags: str, message: str) -> None:
    assert problem(flags).startswith(message)


def test_the_same_value_twice_is_no_conflict() -> None:
    assert parse("--dpo_beta 0.3 --beta 0.3").loss.beta == 0.3
    assert parse("--run_name r --exp_name e").output.exp_name == "e"
    assert parse("--run_name r --exp_name e").notes == ("run_name r: no effect beside exp_name",)


def test_later_places_win_whichever_name_they_use(write: Callable[..., str]) -> None:
    theirs = write({"dpo_beta": 0.2, "num_train_epochs": 3, "dataset_mixer": {"a": 1.0}, "run_name": "r"})
    assert load_config([theirs, "--beta", "0.4"]).loss.beta == 0.4
    assert load_config([theirs, "--num_epochs", "1", "--exp_name", "e"]).train.num_epochs == 1
    ours = write({"beta": 0.2, "mixture": [{"dataset": "a"}], "max_train_steps": 9}, "ours.yaml")
    assert load_config([ours, "--dpo_beta", "0.4"]).loss.beta == 0.4
    assert load_config([ours, "--max_steps", "-1"]).train.max_train_steps is None
    assert [part.dataset for part in load_config([ours, "--dataset_mixer_list", "b", "7"]).data.training_mixture] == [
        "b"
    ]


def test_a_loss_in_their_words_is_changed_in_their_words(write: Callable[..., str]) -> None:
    """A flag changes one of the names that say a loss together; the file's others still hold."""
    mixer = {"mixture": [{"dataset": "a"}]}
    theirs = write({**mixer, "contrast_loss_type": "dpo-gamma", "gamma": 0.5, "beta": 0.3, "reference_free": False})
    assert load_config([theirs]).loss.names == ["dpo_gamma"]
    hinge = load_config([theirs, "--contrast_loss_type", "hinge"]).loss
    assert (hinge.names, hinge.beta, hinge.gamma) == (["slic_dpo"], 0.3, None)
    assert load_config([theirs, "--gamma", "0.7"]).loss.gamma == 0.7


def test_aliases_are_of_fields_that_there_are() -> None:
    assert set(ALGORITHMS.values()) <= set(LOSSES)
    for alias in ALIASES.values():
        assert set(alias.fields) <= set(FIELDS), alias.name
        assert alias.name not in FIELDS or alias.fields == (alias.name,), alias.name


def test_a_dry_run_prints_a_configuration_and_what_is_to_be_told(
    write: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    theirs = write({"dataset_mixer": {"a": 1.0}, "pref_beta": 0.3, "log_level": "info"})
    assert train.main([theirs, "--dry-run", "--num_train_epochs", "2"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    config = load_config([str(tmp_path / "again.yaml")])
    assert config == load_config([theirs, "--num_train_epochs", "2"])
    assert (config.loss.beta, config.train.num_epochs) == (0.3, 2)
    assert "# log_level info: what a run says is not by level\n" in text
    assert train.main([theirs, "--dry-run", "--dpo_beta", "x"]) == 2


def test_the_notes_are_told_once_when_a_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a real start, which then fails for want of the model."""
    words = ["--model_name_or_path", str(tmp_path / "m"), "--mixer_list", "a.jsonl", "1.0", "--packing"]
    assert train.main([*words, "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.count("packing true: pairs are always packed") == 1
