"""What one GPU can train: memory of an 8B model, predicted and measured, beside TRL's; the README's table of cards.

    python benchmarks/memory.py [--write]     8B, by mode; --write: benchmarks/results/memory.md
    python benchmarks/memory.py --table       card x model size x mode that fits, predicted: the README's table

On a GPU every mode runs three steps in a process of its own, and TRL does the same work in another. Without one the
numbers are the memory plan's, and say so. The work: pairs of 1,024 prompt tokens and responses of 1,024, so rows of
2,048 tokens, packs of 4,096; two pairs a step in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_po.config import RunConfig, load_config
from open_po.memory_plan import MemoryPlan, usable
from open_po.model.planning import plan_memory

RESULTS = Path(__file__).parent / "results" / "memory.md"
ROW, TOKENS, PAIRS = 2048, 4096, 2
CARDS = (24, 48, 80, 141)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to train, as fields of the configuration."""

    name: str
    fields: dict[str, Any]
    target: int | None = None  # GB, of 8B
    trl: dict[str, Any] = field(default_factory=dict)


BF16 = {"weights_dtype": "bfloat16", "grad_dtype": "bfloat16"}
LORA = {"use_lora": True, "lora_rank": 64, "gradient_checkpointing": True}
MODES = (
    Mode(
        name="full, float32",
        fields={"optimizer": "adamw", "gradient_checkpointing": True},
        trl={"dtype": "float32"},
    ),
    Mode(
        name="full, bfloat16, adamw_kahan",
        fields=BF16 | {"optimizer": "adamw_kahan", "gradient_checkpointing": True},
        target=90,
        trl={"dtype": "bfloat16"},
    ),
    Mode(
        name="full, bfloat16, adamw_kahan, update in backward",
        fields=BF16
        | {
            "optimizer": "adamw_kahan",
            "gradient_checkpointing": True,
            "optimizer_in_backward": "on",
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 1,
        },
        target=78,
        trl={"dtype": "bfloat16"},
    ),
    Mode(
        name="full, bfloat16, adamw_8bit",
        fields=BF16 | {"optimizer": "adamw_8bit", "gradient_checkpointing": True},
        target=55,
        trl={"dtype": "bfloat16", "optim": "adamw_bnb_8bit"},
    ),
    Mode(
        name="full, bfloat16, adamw_8bit, update in backward",
        fields=BF16
        | {
            "optimizer": "adamw_8bit",
            "gradient_checkpointing": True,
            "optimizer_in_backward": "on",
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 1,
        },
        trl={"dtype": "bfloat16", "optim": "adamw_bnb_8bit"},
    ),
    Mode(name="LoRA, rank 64", fields=LORA, trl={"dtype": "bfloat16", "lora": True}),
    Mode(
        name="QLoRA, rank 64",
        fields=LORA | {"use_qlora": True},
        target=24,
        trl={"dtype": "bfloat16", "lora": True, "four_bit": True},
    ),
)


def llama(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
    } | more


# Shapes of public models
SIZES = {
    "0.5B": llama(896, 24, 14, 2, 4864, 151_936, model_type="qwen2", tie_word_embeddings=True),  # Qwen2.5 0.5B
    "1B": llama(2048, 16, 32, 8, 8192, 128_256, tie_word_embeddings=True),  # Llama 3.2 1B
    "3B": llama(3072, 28, 24, 8, 8192, 128_256, tie_word_embeddings=True),  # Llama 3.2 3B
    "8B": llama(4096, 32, 32, 8, 14_336, 128_256),  # Llama 3.1 8B
    "14B": llama(5120, 48, 40, 8, 13_824, 152_064, model_type="qwen2"),  # Qwen2.5 14B
    "32B": llama(5120, 64, 40, 8, 27_648, 152_064, model_type="qwen2"),  # Qwen2.5 32B
    "70B": llama(8192, 80, 64, 8, 28_672, 128_256),  # Llama 3.1 70B
}


def words(folder: Path, mode: Mode) -> list[str]:
    """The command line of a run in `mode`."""
    values: dict[str, Any] = {
        "model_name_or_path": folder,
        "mixer_list": f"{folder}/pairs.jsonl 1.0",
        "max_seq_length": ROW,
        "max_prompt_length": ROW // 2,
        "max_tokens_per_batch": TOKENS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": PAIRS,
    } | mode.fields
    return [part for name, value in values.items() for part in (f"--{name}", *str(value).split())]


def plan(folder: Path, mode: Mode) -> MemoryPlan:
    config: RunConfig = load_config(words(folder, mode))
    return plan_memory(config, "cuda")


def described(size: str, folder: Path) -> Path:
    """A folder with the configuration of a model of that size, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES[size] | {"architectures": None}))
    return folder


def short(mode: Mode) -> str:
    return mode.name.removeprefix("full, ")


def card_table() -> str:
    """Markdown: for each card and size the first mode, in the order of `MODES`, whose run fits."""
    lines = ["| model | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---|" + "---|" * len(CARDS)]
    with tempfile.TemporaryDirectory() as name:
        for size in SIZES:
            folder = described(size, Path(name) / size)
            plans = [(mode, plan(folder, mode)) for mode in MODES]
            cells = []
            for card in CARDS:
                fitting = [(mode, made) for mode, made in plans if made.fits(usable(card * 1e9))]
                cells.append(f"{short(fitting[0][0])} ({fitting[0][1].peak / 1e9:.0f})" if fitting else "-")
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- measured


def build(folder: Path) -> None:
    """A random 8B model, a tokenizer and pairs; in a process of its own, whose memory is nobody's."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words_of = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 1000)}
    backend = Tokenizer(models.WordLevel(words_of, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    settings = dict(SIZES["8B"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    with open(folder / "pairs.jsonl", "w") as file:
        for number in range(3 * PAIRS):
            text = [" ".join(f"w{3 + (i * k + number) % 997}" for i in range(ROW // 2 - 1)) for k in (1, 3, 7)]
            row = {"prompt": text[0], "chosen": f" {text[1]}", "rejected": f" {text[2]}"}
            file.write(json.dumps(row) + "\n")


def run_open_po(folder: Path, mode: Mode, out: Path) -> int:
    """Three steps; the peak in bytes, as the run's summary says."""
    from open_po.commands.train import main

    more = f"--output_dir {out} --reference_cache_dir {out}/cache --max_train_steps 3 --learning_rate 1e-6"
    code = main([*words(folder, mode), *more.split()])
    if code:
        raise SystemExit(code)
    return int(json.loads((out / "run_summary.json").read_text())["peak_memory_bytes"])


def run_trl(folder: Path, mode: Mode, out: Path) -> int:
    """The same work by TRL's DPOTrainer, batches of one pair, checkpointing."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    settings, more = mode.trl, dict[str, Any]()
    if settings.get("four_bit"):
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa", device_map={"": 0}, **more
    )
    adapters = None
    if settings.get("lora"):
        from peft import LoraConfig

        adapters = LoraConfig(r=64, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    arguments = DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=PAIRS,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=1,
        max_length=None,
        max_steps=3,
        optim=settings.get("optim", "adamw_torch_fused"),
        gradient_checkpointing=True,
        use_liger_kernel=True,
        bf16=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapters,
    )
    trainer.train()
    return torch.cuda.max_memory_allocated()


def child(job: str, folder: Path, mode: Mode) -> str:
    """A side's peak in GB, measured in a process of its own, or why there is none."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--child", job, "--folder", str(folder), "--mode", mode.name, "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode == 0:
        return f"{int(done.stdout.splitlines()[-1]) / 1e9:.1f}"
    said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    return "out of memory" if "out of memory" in (done.stderr + done.stdout).lower() else said[-1][:80]


def rows(cuda: bool) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = described("8B", Path(name))
        if cuda:
            subprocess.run([sys.executable, __file__, "--child", "build", "--folder", name], check=True)
        for mode in MODES:
            made = plan(folder, mode)
            target = f"under {mode.target}" if mode.target else ""
            ours = child("open_po", folder, mode) if cuda else "not measured"
            theirs = child("trl", folder, mode) if cuda else "not measured"
            yield (
                f"| {mode.name} | {made.allocated / 1e9:.1f} | {made.peak / 1e9:.1f} | {target} | {ours} | {theirs} "
                f"| {made.tokens_that_fill(usable(80e9)):,} |"
            )


def report(cuda: bool, where: str) -> str:
    head = (
        "# Memory of an 8B model on one GPU\n\n"
        f"The shape of Llama 3.1 8B, random weights; pairs of {ROW // 2:,} prompt tokens and two responses of as many "
        f"(rows of {ROW:,}), packs of {TOKENS:,} tokens, gradient checkpointing in every mode. {where}\n\n"
        "GB (1e9 bytes). *allocated*: what torch allocates, by the plan, to be compared with the measured peak; "
        "*card*: with CUDA's context and 6% of what comes and goes for fragmentation. *budget*: tokens of a pack that "
        "fill a card of 80 GB, predicted; 0: none does.\n\n"
        "| mode | allocated, predicted | card, predicted | target | open_po, measured | TRL 1.16.0, measured | "
        "budget |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows(cuda)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="benchmarks/results/memory.md")
    parser.add_argument("--table", action="store_true", help="the README's table")
    for name in ("--child", "--folder", "--mode", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "build":
        build(Path(arguments.folder))
    elif arguments.child:
        (mode,) = (mode for mode in MODES if mode.name == arguments.mode)
        run = run_open_po if arguments.child == "open_po" else run_trl
        print(run(Path(arguments.folder), mode, Path(arguments.out)))
    elif arguments.table:
        print(card_table())
    else:
        import torch
        from machine import machine

        cuda = torch.cuda.is_available()
        where = machine("cuda", 1) if cuda else "Predicted by the memory plan: no GPU was at hand, nothing is measured."
        text = report(cuda, where)
        print(text)
        if arguments.write:
            RESULTS.write_text(text)


if __name__ == "__main__":
    main()
