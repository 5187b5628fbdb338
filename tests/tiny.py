"""Small models, tokenizers and data that the tests make for themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "small",
    "large",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "sleeps",
    "eats",
    "sees",
    "under",
    "over",
    "and",
    "but",
    "quickly",
    "slowly",
]
VOCABULARY = 320

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# transformers model type -> settings on top of _SMALL
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 64},
    "olmo2": {},
    "phi": {"num_key_value_heads": 4},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}
_TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
# What takes shared prompts, with settings that make attention hard; `model_type` where it is not the name.
SHARING: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_yarn": {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, **_ROPE}},
    "llama3_rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **_ROPE,
        },
    },
    "llama_dynamic_short": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {
        "head_dim": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 5,
        **_TWO_KINDS,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 5, **_TWO_KINDS},
    "olmo2": {},
    "olmo3": _TWO_KINDS,
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **_TWO_KINDS},
    "deepseek_v3": {  # keys have more dimensions than values
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}
# What runs in rows, with its own attention or none.
ROWS_ONLY: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "qwen3_next": {
        "head_dim": 8,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {},
    "mpt": {"n_heads": 4, "n_layers": 2, "d_model": 32, "max_seq_len": 256},
    "stablelm": {},
    "llama_dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
}


def make_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCABULARY tokens, saved in `folder`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS), " ".join(reversed(WORDS))], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | settings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in special.items() if v is not None})
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(
    folder: Path | None = None, architecture: str = "llama", seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A small random model with weights large enough for log-probs that differ, saved in `folder`."""
    torch.manual_seed(seed)
    settings = _SMALL | ARCHITECTURES.get(architecture, {}) | settings
    config = AutoConfig.for_model(settings.pop("model_type", architecture), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.2)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias, std=0.5)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def make_model_folder(folder: Path, architecture: str = "llama", seed: int = 0, **settings: Any) -> Path:
    """A folder with a tiny model and its tokenizer."""
    make_tokenizer(folder)
    make_model(folder, architecture, seed, **settings)
    return folder


def text_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct preference rows of text, of varied lengths."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    return [
        {"prompt": f"{number} {words(1, 12)}", "chosen": f" {words(1, 10)} yes", "rejected": f" {words(1, 10)} no"}
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_model(folder: Path) -> PreTrainedModel:
    """In eager attention: PyTorch's, the default, drops Gemma 2's soft-capping in transformers 5.17."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()
