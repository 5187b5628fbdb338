"""Answers on a GPU: those that a CPU gives, by transformers and by vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from open_po.commands import evaluate
from tests import tiny
from tests.evaluation import bigrams
from tests.evaluation.test_evaluate import GOOD, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_answers_are_what_the_model_says(engine: str, tmp_path: Path) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    # vLLM's kernels take heads of 64 numbers and more
    size = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    models = [bigrams.make(tmp_path / name, GOOD, **size) for name in ("one", "two")]  # the second after the first
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows())
    words = ["--model", *map(str, models), "--task", "exact", "--data", str(data), "--out", str(tmp_path / "out")]
    assert evaluate.main([*words, "--engine", engine, "--reference_cache_dir", str(tmp_path / "cache")]) == 0
    for name in ("one", "two"):
        lines = (tmp_path / "out" / "answers" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["answer"] for line in lines] == [bigrams.answer(row["prompt"], GOOD) for row in rows()]
