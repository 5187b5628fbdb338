"""What glibc's allocator settings change in CPU training speed and memory.

    python benchmarks/allocator.py [--rounds 3] [--out benchmarks/results/allocator.md]

Both sides train the same pairs (6 layers x 384, vocabulary 16k, float32, random pairs of about 125 + 45 tokens) in
fresh processes, alternating; a side's log-probs must agree with the other's before its time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
PAIRS, VOCABULARY = 48, 16_384


def build(folder: Path) -> None:
    """A random model, a tokenizer of numbered words and a file of random pairs."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    rng = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(f"w{rng.randrange(2, VOCABULARY)}" for _ in range(rng.randint(mean // 2, mean * 3 // 2)))

    rows = [{"prompt": text(125), "chosen": " " + text(45), "rejected": " " + text(45)} for _ in range(PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: Path, tuned: bool) -> dict[str, Any]:
    """Train one epoch in a fresh process; its run summary and its steps' chosen log-probs."""
    with tempfile.TemporaryDirectory() as output:
        arguments = f"""--model_name_or_path {folder} --mixer_list {folder}/pairs.jsonl 1.0
            --output_dir {output}/run --reference_cache_dir {folder}/cache --per_device_train_batch_size 4
            --gradient_accumulation_steps 2 --max_seq_length 512 --max_tokens_per_batch 2048""".split()
        environment = os.environ | (SETTINGS if tuned else {})
        command = [sys.executable, "dpo_tune_cache.py", *arguments]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        summary: dict[str, Any] = json.loads(Path(output, "run", "run_summary.json").read_text())
        lines = Path(output, "run", "metrics.jsonl").read_text().splitlines()
        summary["logps"] = [json.loads(line)["logps/chosen"] for line in lines]
        return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rates: dict[bool, list[float]] = {True: [], False: []}
    memory: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        expected = train(folder, tuned=True)["logps"]  # also fills the reference cache
        for _ in range(arguments.rounds):
            for side in (True, False):
                summary = train(folder, side)
                assert all(abs(a - b) < 1e-2 for a, b in zip(summary["logps"], expected, strict=True))
                rates[side].append(summary["train"]["pairs"] / summary["train"]["seconds"])
                memory[side].append(summary["peak_memory_bytes"] / 1e9)
    ratios = [mine / other for mine, other in zip(rates[True], rates[False], strict=True)]
    lines = ["| allocator | pairs/s, median (min to max) | peak memory, GB |", "|---|---|---|"]
    for side, label in ((True, "keeps freed memory"), (False, "glibc's defaults")):
        low, high = min(rates[side]), max(rates[side])
        rate = f"{statistics.median(rates[side]):.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {label} | {rate} | {statistics.median(memory[side]):.2f} |")
    lines.append(f"\nRatio per round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
