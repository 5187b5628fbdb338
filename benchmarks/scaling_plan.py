"""Bytes and FLOPs of one optimizer step on many GPUs, worked out on paper: the tables of docs/scaling.md and its plot.

    python benchmarks/scaling_plan.py [--write]     prints the page; with --write it goes to docs/, with the plot

Nothing is measured and no GPU is needed. The constants are the assumptions, ENGINES are the rows of the tables; the
page's text between the tables is kept as it stands.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from workloads import Ids, Shape, useful_flops

from open_po.memory_plan import EngineName, ModelBytes, TrainingShape, WeightBytes, rank_bytes
from open_po.memory_plan.states import ZERO_BUCKET, ZERO_HOST

DOCS = Path(__file__).parent.parent / "docs"
GB = 1e9
PAIR: Ids = ([0] * 500, [0] * 250, [0] * 250)  # the tokens of a prompt and its two responses
TOKENS = sum(map(len, PAIR))
BATCH, BUDGET = 128, 8192  # pairs in a step, tokens in a pack
MOST = BUDGET // TOKENS  # pairs in a pack
NODE, DEVICES = 8, (8, 32, 256)
ROOM = 75 * GB
RATE = 0.4 * 989e12  # FLOP/s
NVLINK, NETWORK, PCIE, HBM, HOST = 450 * GB, 50 * GB, 50 * GB, 2700 * GB, 300 * GB  # bytes/s
HOP = 4.7e-6  # seconds of latency in a step of a ring
OVERLAP = 0.8
PASSES, UPDATE, HOST_BYTES = 30, 28, ZERO_HOST  # for a parameter; docs/scaling.md says of what, as of all constants
TILE, BUCKET, RANK = 128 * 2**20, ZERO_BUCKET, 64

Hidden = Literal["backward of the last pack", "backward", "all", "nothing"]


@dataclass(frozen=True)
class Model:
    name: str
    shape: Shape

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer."""
        return (self.shape.body_parameters - self.shape.hidden) // self.shape.layers

    @property
    def parameters(self) -> int:
        return self.shape.body_parameters + 2 * self.shape.head_parameters

    @property
    def adapters(self) -> int:
        return self.shape.layers * RANK * sum(map(sum, self.shape.linears().values()))

    def pair_flops(self, *, lora: bool) -> float:
        """Computed for a pair, the second forward pass of gradient checkpointing included."""
        head = 2.0 * self.shape.head_parameters * len(PAIR[1] + PAIR[2])
        body = useful_flops(self.shape, [PAIR], backward=False) - head
        return 3 * body + 2 * head + 8.0 * self.adapters * TOKENS if lora else 4 * body + 3 * head


@dataclass(frozen=True)
class Engine:
    name: str
    splits: Literal["nothing", "adam", "gradients", "weights", "layers"]  # over ranks, with all before it
    once: bool = False  # gradients stay whole until the step's last pack, and are reduced then
    offload: bool = False
    hpz: bool = False
    lora: bool = False


MODELS = tuple(
    Model(name, Shape(layers=n, hidden=h, heads=a, kv_heads=8, intermediate=i, vocabulary=128_256))
    for name, n, h, a, i in (("8B", 32, 4096, 32, 14_336), ("70B", 80, 8192, 64, 28_672))
)
FSDP2 = Engine("FSDP2, every pack", "weights")
ENGINES = (
    Engine("DDP", "nothing"),
    Engine("ZeRO-1", "adam"),
    Engine("ZeRO-2, once a step", "gradients", once=True),
    Engine("ZeRO-2, every pack", "gradients"),
    Engine("ZeRO-3", "weights"),
    Engine("ZeRO-3, offload", "weights", offload=True),
    Engine("ZeRO-3, hpz 8", "weights", hpz=True),
    Engine("FSDP2, once a step", "weights", once=True),
    FSDP2,
    Engine("layers", "layers"),
    Engine("LoRA, DDP", "nothing", lora=True),
    Engine("LoRA, FSDP2", "weights", lora=True),
)


# What stays on a rank under each of them; of `layers` a plan holds one GPU's part already.
KINDS: dict[str, EngineName] = {
    "nothing": "ddp",
    "adam": "zero1",
    "gradients": "zero2",
    "weights": "zero3",
    "layers": "single",
}


class Traffic(NamedTuple):
    """What a rank sends in a step for collectives of one kind, and beside which compute."""

    inside: float
    between: float
    seconds: float
    beside: Hidden


def ring(size: float, ranks: int, beside: Hidden, collectives: int = 0) -> Traffic:
    """All-gathers or reduce-scatters of `size` bytes together; an all-reduce is one of each."""
    sent = size * (ranks - 1) / ranks
    between = sent / NODE if ranks > NODE else 0.0
    seconds = max((sent - between) / NVLINK, between / NETWORK) + collectives * (ranks - 1) * HOP
    return Traffic(sent - between, between, seconds, beside)


class Plan:
    """A step of the rank that has the most to do."""

    def __init__(self, model: Model, engine: Engine, ranks: int, batch: int = BATCH, most: int = MOST) -> None:
        self.model, self.engine, self.ranks, self.batch = model, engine, ranks, batch
        self.in_turn = engine.splits == "layers"  # every pair goes through all GPUs of one node, one after the other
        self.own = batch if self.in_turn else -(-batch // ranks)  # pairs
        self.packs = -(-self.own // most)
        self.pairs = -(-self.own // self.packs)  # in the largest pack; packs are balanced
        shape = model.shape
        self.layers = -(-shape.layers // NODE) if self.in_turn else shape.layers
        # Parameters that the rank works on, those of them that train, and those that it updates.
        self.held = self.layers * model.layer + shape.head_parameters if self.in_turn else model.parameters
        self.trained = model.adapters if engine.lora else self.held
        self.owned = self.trained / (1 if engine.splits in ("nothing", "layers") else ranks)
        self.memory = self._memory()
        self.total = sum(self.memory.values())
        self.fits = self.total <= ROOM
        self.host = HOST_BYTES * self.owned * NODE if engine.offload else 0.0  # bytes of a node's memory
        self.traffic = self._traffic()
        self.sent = sum(part.inside for part in self.traffic), sum(part.between for part in self.traffic)
        cast = 0 if engine.lora else PASSES * model.parameters * self.packs
        self.passes = (cast + (0.0 if engine.offload else UPDATE * self.owned)) / HBM  # seconds, as all below
        pair = model.pair_flops(lora=engine.lora) / RATE
        self.compute = self.own * pair + self.passes
        self.waits = self._waits()
        self.step = self.compute + self.waits
        self.efficiency = batch * pair / ranks / self.step  # 1: all GPUs do nothing but products, at the compute rate

    def _memory(self) -> dict[str, float]:
        """Bytes on the GPU."""
        engine, shape = self.engine, self.model.shape
        weights = 2.0 * self.held + 4 * self.model.adapters if engine.lora else 4.0 * self.held
        model = WeightBytes(parameters=self.held, trained=self.trained, size=weights, trained_size=4.0 * self.trained)
        kept = rank_bytes(
            ModelBytes(layers=(), around=model),
            TrainingShape(
                device="cuda",
                engine=KINDS[engine.splits],
                ranks=self.ranks,
                optimizer=0.0 if engine.offload else 8.0,
                gradient=0.0 if engine.offload else 4.0,
                gradient_alone=0.0 if engine.offload else 4.0,
            ),
        )
        gradients = kept.gradients
        if engine.once and engine.splits == "weights" and self.packs > 1:
            gradients = 4.0 * self.trained
        elif engine.splits == "gradients" and not engine.once:
            gradients = 4.0 * self.owned
        checkpoints = self.layers * shape.hidden * (2 if engine.lora else 4)
        working = 34 * shape.hidden + 6 * shape.kv_heads * shape.head_dim + 12 * shape.intermediate
        return {
            "weights": kept.weights + (weights / NODE if engine.hpz else 0.0),
            "gradients": gradients,
            "Adam": kept.optimizer,
            "in flight": self._in_flight(),
            "activations": float(self.pairs * TOKENS * (checkpoints + working)),
            "tile": float(TILE),
        }

    def _in_flight(self) -> float:
        """Gathered weights, gradients on their way, the head's copy in bfloat16."""
        head, layer = self.model.shape.head_parameters, self.model.layer
        if self.engine.lora:
            return 4.0 * (head + layer) if self.engine.splits == "weights" else 0.0
        if self.engine.splits == "weights":
            return float(max(14 * head + 16 * layer, 24 * head))
        return 6 * head + (BUCKET if self.engine.splits in ("adam", "gradients") else 0)

    def _traffic(self) -> list[Traffic]:
        engine, n, k = self.engine, self.ranks, self.packs
        gradients = 4.0 * self.trained
        weights = 2.0 * self.held + gradients if engine.lora else gradients
        units = self.model.shape.layers + 1
        if self.in_turn:
            sent = 2.0 * 4 * self.own * TOKENS * self.model.shape.hidden
            return [Traffic(sent, 0.0, (NODE - 1) * sent / NVLINK, "nothing")]
        if engine.splits == "nothing":
            return [ring(2 * gradients, n, "backward of the last pack")]
        if engine.splits == "adam" or (engine.splits == "gradients" and engine.once):
            return [ring(gradients + weights, n, "nothing")]
        if engine.splits == "gradients":
            return [ring(k * gradients, n, "backward"), ring(weights, n, "nothing")]
        reduces = ring(k * gradients, n, "backward", k * units)
        if engine.once:
            reduces = ring(gradients, n, "backward of the last pack", units)
        if engine.hpz:  # the first gather after an update fills the node's own shards
            inner = 2 * k - 1
            return [ring(weights, n, "all", units), ring(inner * weights, NODE, "all", inner * units), reduces]
        return [ring(2 * k * weights, n, "all", 2 * k * units), reduces]

    def _waits(self) -> float:
        """Seconds of communication that no compute hides, and of the host's update."""
        shares: dict[Hidden, float] = {"backward of the last pack": 0.75 / self.packs, "backward": 0.75, "all": 1.0}
        begun = waits = 0.0
        for beside, share in shares.items():  # each lies inside the next
            begun += sum(part.seconds for part in self.traffic if part.beside == beside)
            waits = max(waits, begun - OVERLAP * share * self.compute)
        waits += sum(part.seconds for part in self.traffic if part.beside == "nothing")
        return waits + (self.owned * (8 / PCIE + UPDATE * NODE / HOST) if self.engine.offload else 0.0)

    def breaks_first(self) -> str:
        if not self.fits:
            largest = sorted(self.memory.items(), key=lambda part: -part[1])[:2]
            return "memory: " + " and ".join(f"{name} {size / GB:.0f} GB" for name, size in largest)
        busy = 1 if self.in_turn else min(self.ranks, self.batch)
        idle = "one GPU works at a time" if self.in_turn else "too few packs"
        link = "host and PCIe" if self.engine.offload else "network" if self.ranks > NODE else "NVLink"
        causes = [
            (1 - busy / self.ranks, f"{idle}: {self.ranks - busy} of {self.ranks} GPUs idle"),
            (self.waits / self.step, f"{link}: {self.waits / self.step:.0%} of the step waited"),
            (self.passes / self.step, f"small packs: {self.passes / self.step:.0%} of the step in passes over weights"),
        ]
        words = [text for share, text in sorted(causes, reverse=True) if share >= 0.1][:2]
        if self.pairs < min(MOST, self.own):
            words.insert(0, f"memory: packs of {self.pairs} pairs, not {min(MOST, self.own)}")
        elif self.total > 0.9 * ROOM:
            words.append(f"memory: {(ROOM - self.total) / GB:.1f} GB left")
        return "; ".join(words) or "nothing yet"


def make_plan(model: Model, engine: Engine, ranks: int, batch: int = BATCH) -> Plan:
    """With the largest packs that fit, if any do, else with those of the token budget."""
    found = (Plan(model, engine, ranks, batch, most) for most in range(MOST, 0, -1))
    return next((plan for plan in found if plan.fits), Plan(model, engine, ranks, batch))


def plans(model: Model, ranks: int, batch: int = BATCH) -> Iterator[tuple[str, Plan]]:
    """All engines by name, but for those that would only repeat another one's row."""
    single = make_plan(model, FSDP2, ranks, batch).packs == 1  # then reducing once is reducing at every pack
    for engine in ENGINES:
        double = (engine.hpz and ranks <= NODE) or (engine.once and engine.splits == "weights" and single)
        if not double:
            name = "FSDP2" if engine == FSDP2 and single else engine.name
            yield name, make_plan(model, engine, ranks, batch)


def lines(head: str, rows: Iterable[str]) -> str:
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {row} |" for row in rows)])


def model_table(model: Model) -> str:
    head = "engine | GPUs | packs x pairs | weights | gradients | Adam | in flight | activations | **total** | "
    head += "sent inside | sent between | compute s | waits s | efficiency | what breaks first"
    rows = []
    for name, plan in (row for ranks in DEVICES for row in plans(model, ranks)):
        *parts, activations, tile = plan.memory.values()
        cells = [f"{size / GB:.1f}" for size in (*parts, activations + tile)]
        cells.append(f"**{plan.total / GB:.1f}**" + ("" if plan.fits else " does not fit"))
        cells += [f"{size / GB:.1f}" for size in plan.sent] + [f"{plan.compute:.2f}", f"{plan.waits:.2f}"]
        cells.append(f"{plan.efficiency:.0%}" if plan.fits else "-")
        host = f"; host memory {plan.host / GB:,.0f} GB a node" if plan.host else ""
        row = [name, str(plan.ranks), f"{plan.packs} x {plan.pairs}", *cells, plan.breaks_first() + host]
        rows.append(" | ".join(row))
    return lines(head, rows)


def which_table() -> str:
    """The engines that fit; on the most GPUs also with a global batch of a full pack for each."""
    rows = []
    for model in MODELS:
        for ranks, batch in (*((n, BATCH) for n in DEVICES), (DEVICES[-1], MOST * DEVICES[-1])):
            fitting = sorted((plan.step, name, plan) for name, plan in plans(model, ranks, batch) if plan.fits)
            row = f"{model.name} | {ranks} | {batch:,}"
            for lora in (False, True):
                best = [f"{n} {s:.2f} s ({p.efficiency:.0%})" for s, n, p in fitting if p.engine.lora == lora][:3]
                row += " | " + ("; ".join(best) or "none")
            rows.append(row)
    return lines("model | GPUs | pairs a step | whole model, fastest first | LoRA", rows)


def levers_table() -> str:
    rows = []
    for model in MODELS:
        head, layer, plan = model.shape.head_parameters, model.layer, make_plan(model, FSDP2, 32)
        apart = max(16 * layer, 14 * head + 4 * layer)
        cells = [2 * model.parameters, plan.memory["in flight"], apart, sum(plan.sent), sum(plan.sent) * 2 / 3]
        rows.append(f"{model.name} | " + " | ".join(f"{size / GB:.1f}" for size in cells))
    return lines("GB on a GPU | cache of casts | in flight | the same apart | sent | sent, gathers in bfloat16", rows)


def assumptions_table() -> str:
    rows = {
        "a pair": f"{len(PAIR[0])} prompt tokens, computed once, two responses of {len(PAIR[1])}: {TOKENS:,} tokens",
        "a step": f"{BATCH} pairs; packs of up to {BUDGET:,} tokens, so {MOST} pairs; a rank's packs are balanced",
        "GPU": f"{ROOM / GB:.0f} of 80 GB to plan with; CUDA, NCCL and fragmentation have the rest",
        "compute rate": f"{RATE / 1e12:.1f} TFLOP/s, 40% of an H100's 989 in bfloat16, whatever the size of a pack",
        "GPU memory": f"{HBM / GB:,.0f} GB/s, of 3,350",
        "inside a node": f"{NODE} GPUs; NVLink, {NVLINK / GB:.0f} GB/s from each GPU",
        "between nodes": f"a network card for each GPU, {NETWORK / GB:.0f} GB/s (400 Gbit/s)",
        "latency": f"{HOP * 1e6:.1f} us for a step of a ring: 7 of 8 over NVLink (3.4), 1 over the network (14)",
        "overlap": f"communication hides behind {OVERLAP:.0%} of the compute that it may run beside",
        "passes over weights": f"{PASSES} bytes a parameter and pack, none with LoRA; {UPDATE} for an update by AdamW",
        "host": f"PCIe {PCIE / GB:.0f} GB/s a GPU; AdamW on the processors moves {HOST / GB:.0f} GB/s a node",
        "LoRA": f"rank {RANK}, on all matrices of the layers; adapters in float32, the rest frozen in bfloat16",
    }
    return lines("what | assumed", (f"{what} | {value}" for what, value in rows.items()))


def page(text: str) -> str:
    """`text` with its tables as they come out now."""
    tables = {model.name: model_table(model) for model in MODELS}
    tables |= {"which": which_table(), "levers": levers_table()}
    tables["assumptions"] = assumptions_table()
    for name, table in tables.items():
        mark = f"<!-- table: {name} -->\n"
        before, after = text.split(mark)
        text = before + mark + table + ("\n" + after)[("\n" + after).index("\n\n") :]  # up to a blank line it is old
    return text


def plot(path: Path) -> None:
    """Bytes on a GPU, by engine."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    for model, axes in zip(MODELS, figure.subplots(1, 2, sharey=True), strict=True):
        for column, ranks in enumerate(DEVICES):
            sizes = [make_plan(model, engine, ranks).total / GB for engine in ENGINES]
            places = [place + 0.27 * (column - 1) for place in range(len(ENGINES))]
            axes.bar(places, sizes, width=0.25, label=f"{ranks} GPUs")
        axes.axhline(ROOM / GB, color="black", linewidth=1, label=f"{ROOM / GB:.0f} GB")
        axes.set_yscale("log")
        axes.set_xticks(range(len(ENGINES)), [engine.name for engine in ENGINES], rotation=40, ha="right")
        axes.set_title(f"{model.name}, on paper")
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("GB on a GPU")
    figure.axes[0].legend()
    FigureCanvasAgg(figure).print_figure(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="docs/scaling.md and docs/scaling.png")
    arguments = parser.parse_args()
    text = page((DOCS / "scaling.md").read_text())
    if arguments.write:
        (DOCS / "scaling.md").write_text(text)
        plot(DOCS / "scaling.png")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
