"""The memory plan against what CUDA's allocator says: within 10% for every setting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from open_po.config import load_config
from open_po.data import PreferencePair
from open_po.model.activations import checkpoint_gradients
from open_po.model.load import load_scorer
from open_po.model.lora import attach_lora
from open_po.model.numerics import policy_numerics
from open_po.model.planning import plan_memory
from open_po.model_files import policy_source
from open_po.packing import pack
from open_po.training.optimizer import make_optimizer
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda", 0)
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 32_000}
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "vocab_size": 128_256}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 4096}
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "small": ("llama", SMALL, ""),
    "large": ("llama", LARGE, ""),
    "small, more tokens": ("llama", SMALL, "--max_tokens_per_batch 24576"),
    "small, checkpointing": ("llama", SMALL, "--gradient_checkpointing"),
    "large, checkpointing": ("llama", LARGE, "--gradient_checkpointing --max_tokens_per_batch 24576"),
    "SGD": ("llama", SMALL, "--optimizer sgd"),
    "LoRA": ("llama", LARGE, "--use_lora --lora_rank 16"),
    "LoRA, checkpointing": ("llama", LARGE, "--use_lora --lora_rank 16 --gradient_checkpointing"),
    "torch's kernels": ("llama", SMALL, "--use_liger_kernel false"),
    "float32": ("llama", SMALL, "--dtype float32"),
    "unshared": ("llama", SMALL, "--prompt_sharing off"),
    "qwen3": ("qwen3", SMALL | {"head_dim": 64}, ""),
    "gemma2": ("gemma2", SMALL | {"head_dim": 64, "attn_logit_softcapping": 50.0}, ""),
    "olmo2": ("olmo2", SMALL, ""),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_predicted_peak_is_the_measured_one(name: str, tmp_path: Path) -> None:
    architecture, settings, flags = SETTINGS[name]
    tiny.make_model(tmp_path, architecture, **HEADS | settings)
    fixed = "--max_seq_length 1024 --max_tokens_per_batch 6144 --per_device_train_batch_size 64"
    words = f"--model_name_or_path {tmp_path} --mixer_list data 1.0 {fixed} {flags}"
    config = load_config(words.split())
    plan = plan_memory(config, "cuda", card=float(torch.cuda.get_device_properties(GPU).total_memory))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    scorer = load_scorer(policy_source(config), policy_numerics(config, GPU), GPU).train()
    if config.model.gradient_checkpointing:
        checkpoint_gradients(scorer)
    if config.model.use_lora:
        attach_lora(scorer, config.model)
    scorer.use_layout(plan.shape.layout)
    if plan.shape.layout != "rows" and plan.shape.short_last_layer:
        scorer.shorten_last_layer(scorer.decoder_layers()[-1])
    tokens = config.train.max_tokens_per_batch
    pairs = [PreferencePair([5 + n] * 512, [3] * 512, [4] * 512) for n in range(tokens // plan.shape.pair_tokens)]
    plan = dataclasses.replace(
        plan, shape=dataclasses.replace(plan.shape, max_tokens=len(pairs) * plan.shape.pair_tokens)
    )
    batch = pack(pairs, layout=plan.shape.layout, pad_token_id=2)
    optimizer = make_optimizer([weight for weight in scorer.parameters() if weight.requires_grad], config.train)
    for _ in range(2):  # steps of two packs; the first makes the optimizer's states and compiles kernels
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            logps = scorer.score(batch).logps
            (logps.chosen - logps.rejected).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert plan.allocated == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
