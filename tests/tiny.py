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
    config = AutoConfig.for_model(architecture, **(_SMALL | ARCHITECTURES[architecture] | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
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
