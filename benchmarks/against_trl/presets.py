"""What `benchmarks/against_trl` can run: presets of workloads, numbers of steps, and settings to search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comparison_report import Targets
from open_po_side import OpenPoSettings
from trl_side import TrlSettings
from workloads import Shape, Workload, around, chat_lengths, long_answer_lengths

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "keep": {  # glibc keeps freed memory: large tiles are not mapped and faulted in anew each time
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "68719476736",
        "MALLOC_TOP_PAD_": "268435456",
    },
}
Settings = TrlSettings | OpenPoSettings
Stage = dict[str, Sequence[Any]]  # values to try, of fields that change together; each keeps its best


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A machine's worth of work."""

    device: str
    workloads: list[Workload]
    extra_workloads: list[Workload] = field(default_factory=list)  # only run if named
    global_batch: int  # pairs
    steps: int
    search_steps: int
    repeats: int
    attempts: int = 1  # at a measurement that other work on the machine disturbs
    trl_stages: list[Stage]
    patched_stages: list[Stage] | None
    open_po_stages: Callable[[Workload], list[Stage]]
    tolerance: float  # of a reference log-prob or loss x: tolerance x max(1, |x|)
    loss_tolerance: float
    targets: dict[str, Targets] = field(default_factory=dict)  # by workload


def cpu_preset() -> Preset:
    """A CPU, float32, a Llama of 6 layers x 384."""
    shape = Shape(hidden=384, layers=6, heads=6, kv_heads=6, intermediate=1024, vocabulary=16_384)
    short = around(125, 45)

    def stages(workload: Workload) -> list[Stage]:
        budgets = [1024, 2048, 4096]
        return [{"tokens": budgets, "reference_tokens": budgets}, {"allocator": ["keep", "default"]}]

    return Preset(
        device="cpu",
        workloads=[
            Workload(
                name="chat",
                about="multi-turn conversations up to 1024 tokens",
                shape=shape,
                lengths=chat_lengths,
                pairs=48,
                longest=1024,
            ),
            Workload(
                name="long_prompts",
                about="prompts of 420, answers of 40 tokens",
                shape=shape,
                lengths=around(420, 40),
                pairs=48,
                longest=1024,
            ),
            Workload(
                name="short_pairs",
                about="prompts of 125, answers of 45 tokens",
                shape=shape,
                lengths=short,
                pairs=96,  # a reference pass of 64 takes 2 s, too short to time
                longest=512,
            ),
            Workload(
                name="vocab_65k",
                about="the lengths of short_pairs at a vocabulary of 65,536: the head is most of the work",
                shape=replace(shape, vocabulary=65_536),
                lengths=short,
                pairs=64,
                longest=512,
            ),
        ],
        extra_workloads=[
            Workload(
                name="long_answers",
                about="short prompts and long answers: the least there is to share",
                shape=shape,
                lengths=long_answer_lengths,
                pairs=48,
                longest=1024,
            )
        ],
        global_batch=16,
        steps=7,
        search_steps=3,
        repeats=3,
        attempts=3,
        # Found slower by every search so far, and left out of it to keep it short: `eager` attention (0.9 of sdpa),
        # TRL's tiles in the patched head, packs of 512 tokens.
        trl_stages=[{"batch": [1, 2, 4], "reference_batch": [1, 2, 4]}, {"allocator": ["keep", "default"]}],
        patched_stages=[{"batch": [1, 2, 4, 8], "reference_batch": [1, 2, 4, 8]}, {"allocator": ["keep", "default"]}],
        open_po_stages=stages,
        tolerance=1e-4,
        loss_tolerance=1e-4,
        targets={
            name: Targets(stock=stock, patched=patched, memory=0.7, share=0.6)
            for name, stock, patched in (
                ("chat", 2.0, 1.4),
                ("long_prompts", 3.0, 1.8),
                ("short_pairs", 2.5, 1.7),
                ("vocab_65k", 3.5, 1.6),
            )
        },
    )


def tiny_preset() -> Preset:
    """All of it on a CPU within a minute: a test of the benchmark, not a benchmark."""
    shape = Shape(hidden=64, layers=2, heads=2, kv_heads=2, intermediate=128, vocabulary=512)
    cpu = cpu_preset()
    small = [
        replace(w, about=f"{w.about}, all lengths divided by four", shape=shape, scale=0.25, pairs=8, longest=256)
        for w in cpu.workloads + cpu.extra_workloads
    ]
    return replace(
        cpu,
        workloads=[w for w in small if w.name == "short_pairs"],
        extra_workloads=[w for w in small if w.name != "short_pairs"],
        global_batch=4,
        steps=3,
        search_steps=2,
        repeats=1,
        attempts=1,
        targets={},
        trl_stages=[],
        patched_stages=[],
        open_po_stages=lambda workload: [{"tokens": [256], "reference_tokens": [512]}],
    )


def cuda_preset() -> Preset:
    """One GPU: a Llama of the shape of Llama 3.2 1B (embeddings tied to the head, as there), bfloat16 over float32."""
    shape = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128_256, tied=True)

    def stages(workload: Workload) -> list[Stage]:
        budgets = [8192, 16_384, 32_768, 65_536]
        return [{"tokens": budgets, "reference_tokens": budgets}, {"checkpointing": [False, True]}]

    return Preset(
        device="cuda",
        workloads=[
            Workload(
                name="chat",
                about="multi-turn conversations up to 2048 tokens",
                shape=shape,
                lengths=chat_lengths,
                pairs=192,
                longest=2048,
                scale=2.0,
            ),
            Workload(
                name="long_prompts",
                about="prompts of 1260, answers of 120 tokens",
                shape=shape,
                lengths=around(420, 40),
                pairs=192,
                longest=2048,
                scale=3.0,
            ),
        ],
        global_batch=64,
        steps=7,
        search_steps=3,
        repeats=3,
        trl_stages=[
            {"batch": [1, 2, 4, 8, 16], "reference_batch": [2, 4, 8, 16, 32]},
            {"attention": ["sdpa", "flash_attention_2"]},  # fails, and is passed over, without that package
            {"liger": [False, True]},
            {"checkpointing": [False, True]},
        ],
        patched_stages=None,
        open_po_stages=stages,
        # Logits rounded to bfloat16 are off by up to 2^-8 of themselves a token, in both trainers: over the tokens of a
        # response that is 5e-3 of its log-prob; a loss is of beta x the difference of four of these.
        tolerance=5e-3,
        loss_tolerance=5e-2,
        targets={
            name: Targets(stock=stock, patched=None, memory=None, share=0.5)
            for name, stock in (("chat", 1.4), ("long_prompts", 1.7))
        },
    )


PRESETS = {"cpu": cpu_preset, "tiny": tiny_preset, "cuda": cuda_preset}


@dataclass(frozen=True, kw_only=True)
class Side:
    """A trainer and what is searched for it."""

    name: str
    start: Settings
    stages: list[Stage]


def sides_of(preset: Preset, workload: Workload, *, defaults: bool = False) -> list[Side]:
    """The trainers that are compared; with `defaults` stock TRL at its fastest and open_po with nothing set."""
    start = TrlSettings(allocator="keep" if preset.device == "cpu" else "default")
    sides = [Side(name="trl", start=start, stages=preset.trl_stages)]
    if defaults:
        return [*sides, Side(name="open_po", start=OpenPoSettings.defaults(), stages=[])]
    if preset.patched_stages is not None:
        sides.append(Side(name="trl-patched", start=replace(start, head="logits"), stages=preset.patched_stages))
    stages = preset.open_po_stages(workload)
    ours = OpenPoSettings(
        tokens=stages[0]["tokens"][0], reference_tokens=stages[0]["reference_tokens"][0], allocator=start.allocator
    )
    return [*sides, Side(name="open_po", start=ours, stages=stages)]
