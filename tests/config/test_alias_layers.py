"""Names of other trainers over several files: a later one may change what an earlier one's name means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from open_po.config import RunConfig, load_config

START = "model_name_or_path: m\nmixer_list: [a, 1.0]\n"


def layered(folder: Path, files: Sequence[str], flags: str = "") -> RunConfig:
    paths = [folder / f"{number}.yaml" for number in range(len(files))]
    for path, text in zip(paths, files, strict=True):
        path.write_text(text)
    return load_config([*map(str, paths), *flags.split()])


@pytest.mark.parametrize(
    ("files", "flags", "gamma"),
    [
        (["loss_type: simpo\nbeta: 2\ngamma_beta_ratio: 0.3\n"], "", 0.6),
        (["loss_type: simpo\nbeta: 2\ngamma_beta_ratio: 0.3\n"], "--beta 10", 3.0),
        (["loss_type: simpo\nbeta: 2\ngamma_beta_ratio: 0.3\n"], "--beta 10 --gamma 0.7", 0.7),
        (["loss_type: simpo\nbeta: 2\ngamma_beta_ratio: 0.3\n", "gamma: 0.7\n"], "--beta 10", 0.7),
        (["loss_type: dpo\nbeta: 2\ngamma_beta_ratio: 0.3\n"], "--loss_type simpo", 0.6),
        (["gamma_beta_ratio: 0.3\nbeta: 1\n", "dpo_loss_type: simpo\ndpo_beta: 2\n"], "", 0.6),
    ],
)
def test_gamma_follows_beta_and_the_loss(tmp_path: Path, files: Sequence[str], flags: str, gamma: float) -> None:
    config = layered(tmp_path, [START, *files], flags)
    assert config.loss.gamma == pytest.approx(gamma)
    assert not [line for line in config.notes if "gamma_beta_ratio" in line]


def test_a_data_set_gets_its_configuration_from_the_flags(tmp_path: Path) -> None:
    config = layered(tmp_path, ["model_name_or_path: m\ndataset_name: o/x\n"], "--dataset_config_name c")
    (part,) = config.data.training_mixture
    assert (part.dataset, part.configuration) == ("o/x", "c")


@pytest.mark.parametrize("held_out", ["eval_mixer_list: [b, 1.0]", "eval_mixture: [{dataset: b}]"])
def test_no_evaluation_leaves_held_out_data_behind(tmp_path: Path, held_out: str) -> None:
    below = layered(tmp_path, [f"{START}{held_out}\neval_steps: 5\n"], "--eval_strategy no")
    beside = layered(tmp_path, [f"{START}{held_out}\neval_steps: 5\neval_strategy: 'no'\n"])
    for config in (below, beside):
        assert config.data.held_out_mixture == []
        assert config.train.eval_steps is None
    names = ["eval_steps", held_out.split(":")[0]]
    assert sorted(beside.notes) == sorted(f"{name}: no effect with eval_strategy no" for name in names)


@pytest.mark.parametrize(
    ("file", "flags", "field", "value"),
    [
        ("bf16: true", "--bf16 false", "dtype", "auto"),
        ("bf16: true\n", "--dtype float32 --bf16 false", "dtype", "float32"),
        ("dtype: bfloat16", "--bf16 false", "dtype", "bfloat16"),
        ("use_8bit_optimizer: true", "--use_8bit_optimizer false", "optimizer", "adamw"),
        ("finetuning_type: lora", "--finetuning_type full", "use_lora", False),
        ("optimizer_type: AdamW", "", "optimizer", "adamw"),
        ("optimizer_type: RMSprop", "", "optimizer", "rmsprop"),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", "", "warmup_steps", None),
        ("warmup_steps: 150\nwarmup_ratio: 0.2", "--warmup_steps 0", "warmup_steps", None),
        ("warmup_steps: 150\nwarmup_ratio: 0.2", "", "warmup_steps", 150),
        ("warmup_steps: 0", "", "warmup_steps", 0),
    ],
)
def test_a_switch_that_is_turned_off_takes_back_what_it_had_set(
    tmp_path: Path, file: str, flags: str, field: str, value: Any
) -> None:
    assert layered(tmp_path, [START, f"{file}\n"], flags).flat()[field] == value
