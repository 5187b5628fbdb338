"""A rehearsed step against a real one: what autograd saves, what tensors weigh, and the most that is allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from open_po.config import RunConfig, load_config
from open_po.data import PreferencePair
from open_po.errors import UserError
from open_po.model.activations import checkpoint_gradients
from open_po.model.load import load_scorer
from open_po.model.lora import attach_lora
from open_po.model.numerics import policy_numerics
from open_po.model.planning import plan_memory, training_shape
from open_po.model.rehearsal import Rehearsal
from open_po.model.repeated_layers import RepeatedLayers
from open_po.model.scorer import Scorer
from open_po.model_files import policy_source
from open_po.packing import PackedBatch, pack
from open_po.training.optimizer import make_optimizer
from tests import tiny

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "vocab_size": 1000}
# Model type, its settings, and flags of the run
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, ""),
    "larger": ("llama", {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8}, ""),
    "more tokens": ("llama", {}, "--max_tokens_per_batch 1920"),
    "checkpointing": ("llama", {}, "--gradient_checkpointing --max_tokens_per_batch 1920"),
    "bfloat16": ("llama", {}, "--dtype bfloat16"),
    "bfloat16, checkpointing": ("llama", {}, "--dtype bfloat16 --gradient_checkpointing"),
    "LoRA": ("llama", {}, "--use_lora --lora_rank 8"),
    "LoRA, checkpointing": ("llama", {}, "--use_lora --lora_rank 8 --gradient_checkpointing"),
    "LoRA, attention": ("llama", {}, "--use_lora --lora_rank 4 --lora_target_modules q_proj v_proj"),
    "unshared": ("llama", {}, "--prompt_sharing off"),
    "RMSprop": ("llama", {}, "--optimizer rmsprop"),
    "SGD": ("llama", {}, "--optimizer sgd"),
    "qwen3": ("qwen3", {"head_dim": 16}, ""),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "attn_logit_softcapping": 3.0, "sliding_window": 48, "final_logit_softcapping": 5.0},
        "",
    ),
    "olmo2": ("olmo2", {}, ""),
    "gpt_neox": ("gpt_neox", {}, ""),
    "phi": ("phi", {"num_key_value_heads": 4}, ""),
    "mixtral": ("mixtral", {"num_local_experts": 4}, ""),
    "rows": ("bloom", {"n_head": 4, "n_layer": 5}, ""),
}
FAST = {"LoRA, checkpointing"}
EVERY = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SETTINGS]


def make(name: str, folder: Path) -> RunConfig:
    architecture, settings, flags = SETTINGS[name]
    tiny.make_model(folder, architecture, **WIDE | settings)
    words = f"--model_name_or_path {folder} --mixer_list data 1.0 --max_seq_length 160 --max_tokens_per_batch 960"
    return load_config(f"{words} {flags}".split())


def real(config: RunConfig) -> Scorer:
    scorer = load_scorer(policy_source(config), policy_numerics(config, CPU), CPU)
    if config.model.gradient_checkpointing:
        checkpoint_gradients(scorer)
    if config.model.use_lora:
        attach_lora(scorer, config.model)
    return scorer.train()


def pairs(tokens: int, layout: str) -> list[PreferencePair]:
    """As many as fill a pack: prompts of 80 and responses of 80 tokens."""
    each = 240 if layout == "shared" else 320
    assert tokens % each == 0
    return [PreferencePair([5 + number] * 80, [3] * 80, [4] * 80) for number in range(tokens // each)]


def saved_bytes(scorer: Scorer, batch: PackedBatch) -> int:
    """Of all tensors that autograd keeps for the backward pass of the model's body, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*scorer.parameters(), *scorer.buffers())}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no memory is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scorer._hidden_states(batch, batch.last_layer if scorer.last_layer_is_short else None, False)
    return sum(storages.values())


def allocated(body: Any, trace: Path) -> tuple[int, int]:
    """Bytes that `body` leaves allocated, and most that it had at once, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = body()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    total = peak = 0
    for event in events:
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    del kept
    return total, peak


@contextmanager
def laid_out(scorer: Scorer, layout: Any, short: bool) -> Iterator[None]:
    scorer.use_layout(layout)
    if short and layout != "rows":
        scorer.shorten_last_layer(scorer.decoder_layers()[-1])
    yield


@pytest.mark.parametrize("name", EVERY)
def test_what_the_plan_counts_is_there_in_a_step(name: str, tmp_path: Path) -> None:
    config = make(name, tmp_path)
    tokens = config.train.max_tokens_per_batch
    if name in ("unshared", "rows"):
        tokens = 960 // 320 * 320
    plan = plan_memory(config, "cpu")
    scorer = real(config)
    shape = plan.shape
    with laid_out(scorer, shape.layout, shape.short_last_layer):
        batch = pack(pairs(tokens, shape.layout), layout=shape.layout, pad_token_id=2)
        predicted = plan.passes.training(tokens)
        trace = tmp_path / "trace.json"
        last = batch.last_layer if scorer.last_layer_is_short else None
        scorer._hidden_states(batch, last, False)  # what is made once
        left, _ = allocated(lambda: scorer._hidden_states(batch, last, False), trace)
        assert predicted.activations == pytest.approx(left, rel=0.1)
        if not config.model.gradient_checkpointing:  # whose closures hold more than is saved
            assert predicted.activations == pytest.approx(saved_bytes(scorer, batch), rel=0.1)

        trained = [weight for weight in scorer.parameters() if weight.requires_grad]
        for weight in trained:
            weight.grad = torch.zeros_like(weight)  # as there are from the second pack on

        def step() -> None:
            logps = scorer.score(batch).logps
            (logps.chosen - logps.rejected).sum().backward()  # type: ignore[no-untyped-call]

        step()  # what is made once
        assert predicted.peak == pytest.approx(allocated(step, trace)[1], rel=0.1)
        optimizer = make_optimizer(trained, config.train)
        optimizer.step()
        states = [item for state in optimizer.state.values() for item in state.values() if isinstance(item, Tensor)]
    rank = plan.rank
    weights = {id(weight): weight for weight in scorer.parameters()}.values()
    assert rank.weights == sum(weight.nbytes for weight in weights)
    assert rank.gradients == sum(weight.grad.nbytes for weight in trained if weight.grad is not None)
    assert rank.optimizer == pytest.approx(sum(item.nbytes for item in states if item.dim()), rel=1e-3)


def test_adapters_that_are_trained_on_are_planned_by_what_their_folder_says(tmp_path: Path) -> None:
    """Of ranks that differ by module; neither weights nor adapters are needed."""
    base, folder = tmp_path / "base", tmp_path / "adapters"
    tiny.make_model(base, **WIDE)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", rank_pattern={"q_proj": 3}, use_rslora=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(folder)
    adapters = load_file(folder / "adapter_model.safetensors")
    assert {3, 8} <= {adapter.shape[0] for name, adapter in adapters.items() if "lora_A" in name}
    (base / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").unlink()
    words = f"--mixer_list data 1.0 --max_seq_length 64 --use_lora --lora_start continue --model_name_or_path {folder}"
    plan = plan_memory(load_config(words.split()), "cpu")
    assert plan.rank.gradients == sum(adapter.nbytes for adapter in adapters.values())
    assert plan.rank.optimizer == 2 * plan.rank.gradients
    with pytest.raises(UserError, match=f"^lora_start: continue needs a folder of adapters, {base} is a whole model"):
        plan_memory(load_config([*words.split()[:-1], str(base)]), "cpu")


@pytest.mark.parametrize("name", [pytest.param("llama"), pytest.param("mixtral", marks=pytest.mark.slow)])
def test_what_the_reference_pass_holds(name: str, tmp_path: Path) -> None:
    config = make(name, tmp_path)
    plan = plan_memory(config, "cpu")
    scorer = real(config)
    with laid_out(scorer, "shared", True), scorer.as_reference():
        batch = pack(pairs(960, "shared"), layout="shared", pad_token_id=2)
        scorer.token_logprobs(batch)
        _, peak = allocated(lambda: scorer.token_logprobs(batch), tmp_path / "trace.json")
    assert plan.passes.scoring(960) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        pytest.param("llama", {"num_hidden_layers": 9}, marks=pytest.mark.slow),
        pytest.param("gemma2", {"num_hidden_layers": 10, "head_dim": 8}, marks=pytest.mark.slow),
    ],
)
def test_few_layers_stand_for_all(
    architecture: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_model(tmp_path, architecture, **settings)
    words = f"--model_name_or_path {tmp_path} --mixer_list data 1.0 --max_seq_length 64".split()
    config = load_config(words)
    shape = training_shape(config, "cuda")
    few = Rehearsal(tmp_path, config.model, shape)
    whole = Rehearsal(tmp_path, config.model, shape)
    count = settings["num_hidden_layers"]
    assert few._layers.repeats > 0
    whole._layers = RepeatedLayers(count, count, 0)
    for tokens in (256, 768):
        got, expected = few.training(tokens), whole.training(tokens)
        assert got.activations == pytest.approx(expected.activations, rel=1e-6)
        assert got.peak == pytest.approx(expected.peak, rel=1e-6)
