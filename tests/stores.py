"""Reference stores, and the log-probs that must be in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_po.data.tokenization import response_key

Rows = dict[bytes, tuple[float, int]]


def stores(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def stored(cache: Path) -> Rows:
    """All rows of a cache's only store."""
    (store,) = stores(cache)
    rows: Rows = {}
    for path in store.glob("rows-*.safetensors"):
        found = rows_in(path)
        assert rows.keys().isdisjoint(found), "a response was stored twice"
        rows |= found
    return rows


def rows_in(path: Path) -> Rows:
    """The rows of one file of a store, read as its documentation says."""
    with safe_open(path, framework="np") as file:
        keys, logps, tokens = (file.get_tensor(name) for name in ("keys", "logps", "tokens"))
    found = zip(logps.tolist(), tokens.tolist(), strict=True)
    return {key.tobytes(): row for key, row in zip(keys, found, strict=True)}


def expected_rows(model_folder: Path, rows: list[dict[str, str]]) -> Rows:
    """What transformers gives for each response, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    found: Rows = {}
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            response = [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            found[response_key(prompt, response)] = (float(logp), len(response))
    return found


def assert_same(got: Rows, expected: Rows) -> None:
    assert got.keys() == expected.keys()
    for key, (logp, tokens) in expected.items():
        assert got[key] == (pytest.approx(logp, rel=1e-5), tokens)
