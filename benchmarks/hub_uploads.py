"""Training with checkpoints that are uploaded to a slow Hub, against the same training without uploads, in turns.

    python benchmarks/hub_uploads.py [--seconds 30] [--steps 240] [--every 40] [--rounds 3] [--out FILE.md]

Both sides are the real command line on a CPU, in a fresh process each, with the same pairs, steps and checkpoints. The
Hub is a server on this machine (`tests/hub_server.py`) that takes so many seconds for every large file. Compared are
pairs/s over the training steps, and the wall time from the first step to the end of training, which holds the
checkpoints too and, where they are uploaded, the models and cards that are written beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

PROMPTS, BATCH = 64, 8
SIDES = ("without uploads", "with uploads")


def main() -> int:
    """Run both sides in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="that the Hub takes for a large file")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=40, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from machine import machine

    from tests import tiny

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = tiny.make_model_folder(
            folder / "model", hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
        )
        pairs = tiny.write_jsonl(folder / "pairs.jsonl", tiny.text_rows(PROMPTS))
        rounds = [
            {side: measure(arguments, model, pairs, folder / f"{number}_{side.split()[0]}", side) for side in SIDES}
            for number in range(arguments.rounds)
        ]
    table = report(arguments, rounds, machine("cpu", 1))
    print(table)
    if arguments.out is not None:
        arguments.out.write_text(table + "\n")
    return 0


def measure(arguments: argparse.Namespace, model: Path, pairs: Path, folder: Path, side: str) -> dict[str, float]:
    """One run: pairs/s, seconds of training, commits with a model that arrived before the run's end."""
    from tests.hub_server import TOKEN, Hub, serve

    hub = Hub()
    hub.seconds = arguments.seconds
    stop = serve(hub)
    fields = {
        "model_name_or_path": model,
        "output_dir": folder / "run",
        "reference_cache_dir": folder / "reference",
        "max_seq_length": 128,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_train_steps": arguments.steps,
        "num_epochs": arguments.steps * BATCH // PROMPTS + 1,
        "checkpointing_steps": arguments.every,
        "learning_rate": 1e-5,
        "logging_steps": 10,
    }
    if side == SIDES[1]:
        fields |= {"push_to_hub": "true", "hf_repo_id": "someone/a-model", "hub_strategy": "checkpoint"}
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "dpo_tune_cache.py", *words, "--mixer_list", str(pairs), "1.0"]
    # A thread for each process, so that what runs beside training has a core of its own, as on a machine with a GPU.
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    began = ended = 0.0
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        now = time.monotonic()
        if line.startswith("Reference packing"):
            began = now  # the trainer is made, the first step is next
        elif line.startswith("Training: "):
            ended = now
    if run.wait() != 0:
        raise SystemExit(f"the run failed:\n{''.join(lines)}")
    stop()
    train = json.loads((folder / "run" / "run_summary.json").read_text())["train"]
    commits = hub.repositories.get("someone/a-model", {}).get("dpo_tune_cache", [])
    return {
        "pairs/s": train["pairs"] / train["seconds"],
        "seconds": ended - began,
        "checkpoints": sum("after step" in commit.title for commit in commits),
    }


def report(arguments: argparse.Namespace, rounds: list[dict[str, dict[str, float]]], where: str) -> str:
    """The table of the rounds."""
    lines = [
        "# Training while a slow Hub is uploaded to",
        "",
        f"{where}. {arguments.steps} steps of {BATCH} pairs, a checkpoint every {arguments.every}; the Hub takes "
        f"{arguments.seconds:.0f} s for a large file. `python benchmarks/hub_uploads.py`, {len(rounds)} rounds in "
        "turns, one thread a process.",
        "",
        "| round | "
        + " | ".join(f"pairs/s {side}" for side in SIDES)
        + " | ratio | training s "
        + " | training s ".join(SIDES)
        + " | ratio | checkpoints there before the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, sides in enumerate(rounds, start=1):
        one, other = (sides[side] for side in SIDES)
        lines.append(
            f"| {number} | {one['pairs/s']:.1f} | {other['pairs/s']:.1f} | {other['pairs/s'] / one['pairs/s']:.3f} | "
            f"{one['seconds']:.1f} | {other['seconds']:.1f} | {other['seconds'] / one['seconds']:.3f} | "
            f"{other['checkpoints']:.0f} |"
        )
    for name in ("pairs/s", "seconds"):
        ratios = [sides[SIDES[1]][name] / sides[SIDES[0]][name] for sides in rounds]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        lines += ["", f"{name}, with over without: median {statistics.median(ratios):.3f} ({spread})"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
