"""Models whose answers are known: the next token follows from the last one alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tests import tiny

END = "</s>"
Follows = Mapping[str, str]  # of words that are one token each; END after the last


def make(folder: Path, follows: Follows, **settings: object) -> Path:
    """A folder with a model that says `follows[word]` after a word."""
    tiny.make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = tiny.make_model(None, "llama", tie_word_embeddings=False, **settings)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for layer in model.model.layers:  # which add nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding.copy_(torch.nn.functional.normalize(embedding))
        head.zero_()
        for word, after in follows.items():
            (here,) = tokenizer(f" {word}")["input_ids"]
            (there,) = [tokenizer.eos_token_id] if after == END else tokenizer(f" {after}")["input_ids"]
            head[there] += embedding[here]
    model.save_pretrained(folder)
    return folder


def answer(prompt: str, follows: Follows, longest: int = 99) -> str:
    """What such a model says."""
    words: list[str] = []
    after = follows[prompt.split()[-1]]
    while after != END and len(words) < longest:
        words.append(after)
        after = follows[after]
    return " ".join(words)
