"""Runs that publish themselves: what arrives at a Hub on this machine, and that it can be used from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from open_po.hub.background import HubUploader
from tests import cli
from tests.hub_server import TOKEN, Hub

FIELDS: dict[str, Any] = {
    "push_to_hub": True,
    "hf_repo_id": "someone/a-model",
    "exp_name": "a run",
    "max_train_steps": 2,
    "checkpointing_steps": 1,
}


def published(folder: Path) -> dict[str, bytes]:
    """The files of a run's folder that belong on the Hub."""
    private = ("checkpoints/", "wandb/", ".", "progress.json")
    return {name: (folder / name).read_bytes() for name in cli.files(folder) if not name.startswith(private)}


def assert_whole(hub: Hub, folder: Path, branch: str = "a-run") -> None:
    """The branch holds the run's files, byte for byte, and nothing else of it."""
    there = {name: content for name, content in hub.branch(branch).files.items() if name != ".gitattributes"}
    assert set(there) == set(published(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json", "run_summary.json"} <= set(there)
    assert there == published(folder)


def test_every_checkpoint_and_the_model_are_published(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = FIELDS | {"hub_strategy": "all_checkpoints", "with_tracking": True}
    output = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "Uploaded to the Hub: someone/a-model, branch a-run" in shown.out
    assert list(output.glob("wandb/*"))
    assert_whole(hub, output)
    commits = hub.repositories["someone/a-model"]["a-run"][1:]
    assert [commit.title for commit in commits] == [
        *("Training begins", "The model after step 1", "The model after step 2", "The trained model")
    ]
    (created,) = hub.created
    assert (created.get("organization"), created["name"]) == ("someone", "a-model")
    assert created.get("private", created.get("visibility")) in (True, "private")
    for step in (1, 2):
        checkpoint = output / "checkpoints" / f"step_{step:06d}"
        there = hub.branch(f"a-run-{checkpoint.name}").files
        state = {f"last-checkpoint/{name}" for name in cli.files(checkpoint) if not name.startswith("model/")}
        assert set(there) == cli.files(checkpoint / "model") | state | {".gitattributes"}
        assert all((checkpoint / name.replace("last-checkpoint/", "")).read_bytes() == there[name] for name in state)
        model = AutoModelForCausalLM.from_pretrained(
            "someone/a-model", revision=f"a-run-{checkpoint.name}", cache_dir=tmp_path / "hub"
        )
        written = cli.weights(checkpoint / "model")
        assert cli.equal(dict(model.state_dict()), written | {"lm_head.weight": model.lm_head.weight})
        records = [json.loads(line) for line in there["metrics.jsonl"].decode().splitlines()]
        assert [record["training_step"] for record in records] == list(range(1, step + 1))
    assert cli.equal(written, cli.weights(output))  # the last step's model is the final one
    assert hub.tokens == {f"Bearer {TOKEN}"}
    on_disk = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    branches = [hub.branch(branch).files.values() for branch in hub.repositories["someone/a-model"]]
    assert not any(TOKEN.encode() in content for content in [*on_disk, *chain(*branches), shown.out.encode()])


@pytest.mark.parametrize(
    "merged", [pytest.param(False, id="adapter"), pytest.param(True, id="merged", marks=pytest.mark.slow)]
)
def test_of_a_lora_run_the_adapter_is_published_or_the_merged_model(
    merged: bool, hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    fields = FIELDS | {"use_lora": True, "hf_merged": merged, "hub_strategy": "all_checkpoints", "max_train_steps": 1}
    output = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    if merged:
        assert_whole(hub, output)
        assert "adapter/adapter_model.safetensors" in hub.branch("a-run").files
        assert "model.safetensors" in hub.branch("a-run-step_000001").files
        return
    for branch in ("a-run", "a-run-step_000001"):
        there = hub.branch(branch).files
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "metrics.jsonl"} <= set(there)
        assert not {"model.safetensors", "config.json", "generation_config.json"} & set(there)
        adapter = output / "adapter" / "adapter_model.safetensors"
        assert there["adapter_model.safetensors"] == adapter.read_bytes()
    model = AutoModelForCausalLM.from_pretrained("someone/a-model", revision="a-run", cache_dir=tmp_path / "hub")
    merged_weights = cli.weights(output)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    layer.merge()
    assert torch.allclose(layer.base_layer.weight, merged_weights[f"{name}.weight"], atol=1e-6)


def test_names_that_nobody_has_given(hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    fields = FIELDS | {"hf_repo_id": None, "hf_private": False, "hf_entity": "a-team", "hub_strategy": "end"}
    output = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    (created,) = hub.created
    assert (created.get("organization"), created["name"]) == ("a-team", "a-run")
    assert created.get("private", created.get("visibility")) in (False, "public")
    assert set(hub.repositories["a-team/a-run"]) == {"main", "a-run"}
    there = hub.branch("a-run", "a-team/a-run").files
    assert there["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert not list(output.glob("checkpoints/*/model"))


@pytest.mark.slow
def test_the_newest_checkpoint_goes_next_and_none_is_removed_under_way(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """With uploads that take as long as many steps do."""
    hub.seconds = 1.0
    fields = FIELDS | {"max_train_steps": 12, "num_epochs": 2, "keep_last_n_checkpoints": 1}
    output = cli.train(llama, pairs_file, tmp_path / "run", **fields)
    titles = [commit.title for commit in hub.repositories["someone/a-model"]["a-run"]]
    assert titles[1:3] == ["Training begins", "The model after step 1"]
    assert titles[-1] == "The trained model"
    assert 4 <= len(titles) < 8
    assert_whole(hub, output)


def test_a_run_whose_machine_is_gone_goes_on_from_the_hub(
    hub: Hub, llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    plain = {"max_train_steps": 6, "checkpointing_steps": 2, "eval_mixer_list": [pairs_file, "5"]}
    whole = cli.train(llama, pairs_file, tmp_path / "whole", **plain)
    fields = FIELDS | plain | {"hub_strategy": "checkpoint"}
    words = cli.arguments(llama, pairs_file, tmp_path / "first", **fields)
    assert cli.forked(words, lambda: killed_after(4)) == -signal.SIGKILL
    assert hub.branch("a-run").title == "The model after step 4"
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "reference")
    again = cli.train(llama, pairs_file, tmp_path / "again", **fields, resume_from_checkpoint="hub")
    assert cli.equal(cli.weights(again), cli.weights(whole))
    assert cli.without_perf(cli.metrics(again)) == cli.without_perf(cli.metrics(whole))
    assert_whole(hub, again)
    assert not [name for name in hub.branch("a-run").files if name.startswith("last-checkpoint/")]


def killed_after(step: int) -> None:
    """Have this process kill itself once the checkpoint of a step is on the Hub."""
    written = HubUploader.checkpoint_written

    def then_killed(self: HubUploader, checkpoint: Path) -> None:
        while self.needs(checkpoint.with_name(f"step_{step - 2:06d}")):
            self.metrics_written({})
            time.sleep(0.05)
        written(self, checkpoint)
        while checkpoint.name == f"step_{step:06d}" and self.needs(checkpoint):
            self.metrics_written({})
            time.sleep(0.05)
        if checkpoint.name == f"step_{step:06d}":
            os.kill(os.getpid(), signal.SIGKILL)

    HubUploader.checkpoint_written = then_killed  # type: ignore[method-assign]
