"""What weights in bfloat16 come to at a small learning rate, by how they are rounded: the figures of docs/numerics.md.

    python benchmarks/bf16_weights.py [--out benchmarks/results/bf16_weights.md] [--plot docs/numerics.png]

A random Llama is trained on random pairs with DPO, computing in bfloat16, once with float32 weights and AdamW, and
from the same start with bfloat16 weights and each way of rounding them. Compared is how far the weights went, with what
an optimizer keeps of them besides, and what that does to the log-probs of the pairs, computed in float32.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

NAMES = ("adamw_kahan", "adamw_sr", "adamw_8bit", "adamw")
EXACT = "float32"
LABELS = {
    EXACT: "float32 weights",
    "adamw": "bfloat16, to the nearest",
    "adamw_kahan": "bfloat16, compensated (adamw_kahan)",
    "adamw_sr": "bfloat16, by chance (adamw_sr)",
    "adamw_8bit": "bfloat16, by chance, 8-bit moments (adamw_8bit)",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One experiment."""

    hidden: int = 128
    layers: int = 4
    vocabulary: int = 512
    pairs: int = 32
    batch: int = 8
    steps: int = 200
    learning_rate: float = 1e-7
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's end, and the way there."""

    movement: Tensor  # of all weights, from their start: [weights]
    start: Tensor  # of all weights: [weights]
    logps: Tensor  # change of the pairs' log-probs, in float32: [pairs, 2]
    lengths: list[float]  # of the movement, after each step
    along: list[float]  # its part in the direction of the float32 run's end, as a share of that
    fractions: list[float]  # of weights that changed, in each step


@dataclass(frozen=True)
class Comparison:
    """A run beside the one with float32 weights."""

    length: float  # of the movement, as times that of float32
    cosine: float  # between the movements
    along: float  # part of the movement in float32's direction, as times its length
    logps: float  # cosine between the changes of log-probs
    size: float  # of the changes of log-probs, as times those of float32
    fraction: float  # of weights that change in a step


def run(name: str, setting: Setting, folder: Path, exact: Tensor | None) -> Trained:
    """Train from the model in `folder`; `exact` is the movement of the run with float32 weights."""
    from open_po.losses import preference_loss
    from open_po.model.load import load_scorer
    from open_po.model.numerics import Numerics
    from open_po.model_files import ModelSource
    from open_po.optimizers import COMPENSATION, OPTIMIZERS, Settings
    from open_po.packing import pack

    pairs = random_pairs(setting)
    numerics = Numerics(
        compute_dtype=torch.bfloat16,
        weights_dtype=torch.float32 if name == EXACT else torch.bfloat16,
        use_liger=False,
    )
    scorer = load_scorer(ModelSource(name=str(folder)), numerics, torch.device("cpu"))
    weights = list(scorer.parameters())
    optimizer = OPTIMIZERS["adamw" if name == EXACT else name].make(
        weights, Settings(learning_rate=setting.learning_rate, seed=setting.seed, layers=scorer.decoder_layers())
    )

    def values() -> Tensor:
        found = []
        for weight in weights:
            bits = weight.detach().float().view(torch.int32)
            if COMPENSATION in optimizer.state.get(weight, {}):
                bits = bits + optimizer.state[weight][COMPENSATION].to(torch.int32)
            found.append(bits.view(torch.float32).flatten())
        return torch.cat(found)

    batches = [pairs[first : first + setting.batch] for first in range(0, len(pairs), setting.batch)]
    packs = [pack(batch, layout="rows", pad_token_id=2) for batch in batches]
    with scorer.as_reference():
        references = [scorer.score(each).logps for each in packs]
    start = last = values()
    lengths, along, fractions = [], [], []
    for step in range(setting.steps):
        number = step % len(packs)
        policy = scorer.score(packs[number]).logps
        preference_loss("dpo", policy, references[number], beta=0.1).losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now = values()
        fractions.append(float((now != last).float().mean()))
        lengths.append(float((now - start).double().norm()))
        along.append(math.nan if exact is None else share_along(now - start, exact))
        last = now
    change = log_probs(folder, pairs, last) - log_probs(folder, pairs, start)
    return Trained(movement=last - start, start=start, logps=change, lengths=lengths, along=along, fractions=fractions)


def share_along(movement: Tensor, exact: Tensor) -> float:
    return float(movement.double() @ exact.double() / exact.double().square().sum())


def random_pairs(setting: Setting) -> list[Any]:
    from open_po.data import PreferencePair

    random = torch.Generator().manual_seed(setting.seed)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(3, setting.vocabulary, (count,), generator=random).tolist()
        return drawn

    return [PreferencePair(tokens(12), tokens(10), tokens(10)) for _ in range(setting.pairs)]


def make_model(setting: Setting, folder: Path) -> None:
    """A random Llama whose weights bfloat16 holds exactly, so that every run starts from the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(setting.seed)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=2 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).to(torch.float32).save_pretrained(folder)


def log_probs(folder: Path, pairs: list[Any], values: Tensor) -> Tensor:
    """Of each response, by the model with these weights in float32: [pairs, 2]."""
    from open_po.model.load import load_scorer
    from open_po.model.numerics import Numerics
    from open_po.model_files import ModelSource

    exact = Numerics(compute_dtype=torch.float32, weights_dtype=torch.float32, use_liger=False)
    scorer = load_scorer(ModelSource(name=str(folder)), exact, torch.device("cpu")).double()
    weights = list(scorer.parameters())
    with torch.no_grad():
        for weight, part in zip(weights, values.split([weight.numel() for weight in weights]), strict=True):
            weight.copy_(part.view_as(weight))
        found = []
        for pair in pairs:
            for response in (pair.chosen_ids, pair.rejected_ids):
                ids = torch.tensor([pair.prompt_ids + response])
                logps = scorer.base(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                at = torch.arange(len(pair.prompt_ids) - 1, ids.shape[1] - 1)
                found.append(logps[at, torch.tensor(response)].sum())
    return torch.stack(found).view(-1, 2)


def experiment(setting: Setting, names: Sequence[str] = NAMES) -> tuple[dict[str, Trained], dict[str, Comparison]]:
    """Every run, and how it compares with the one in float32."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(setting, folder)
        exact = run(EXACT, setting, folder, None)
        runs = {each: run(each, setting, folder, exact.movement) for each in names}
    return {EXACT: exact, **runs}, {each: compare(trained, exact) for each, trained in runs.items()}


def compare(trained: Trained, exact: Trained) -> Comparison:
    def cosine(one: Tensor, other: Tensor) -> float:
        return float(torch.cosine_similarity(one.double().flatten(), other.double().flatten(), 0))

    mine, theirs = trained.movement.double(), exact.movement.double()
    return Comparison(
        length=float(mine.norm() / theirs.norm()),
        cosine=cosine(mine, theirs),
        along=share_along(mine, theirs),
        logps=cosine(trained.logps, exact.logps),
        size=share_along(trained.logps.flatten(), exact.logps.flatten()),
        fraction=mean(trained.fractions),
    )


def expected_cosine(start: Tensor, movement: Tensor) -> float:
    """That of an exact movement of these weights and its rounding by chance, whose noise no rounding to one of two
    neighbours can be without: sqrt(moved^2 / (moved^2 + noise^2)).
    """
    spacing = torch.exp2(start.double().abs().clamp(min=2.0**-126).log2().floor() - 7)
    moved = movement.double().abs()
    share = (moved / spacing).clamp(max=1)
    noise = (spacing.square() * share * (1 - share)).sum()
    return float((moved.square().sum() / (moved.square().sum() + noise)).sqrt())


def report(setting: Setting, runs: dict[str, Trained], compared: dict[str, Comparison]) -> str:
    lines = [
        f"{setting.steps} steps at a learning rate of {setting.learning_rate:g}, hidden size {setting.hidden}, "
        f"{setting.layers} layers, {setting.pairs} pairs, CPU:",
        "",
        "| weights | movement | its cosine | part along float32's | log-probs: cosine | size | changed in a step |",
        "|---|---|---|---|---|---|---|",
        f"| {LABELS[EXACT]} | 1 | 1 | 1 | 1 | 1 | {mean(runs[EXACT].fractions):.2%} |",
    ]
    for name, found in compared.items():
        figures = (found.length, found.cosine, found.along, found.logps, found.size)
        cells = " | ".join(f"{figure:.3f}" for figure in figures)
        lines.append(f"| {LABELS[name]} | {cells} | {found.fraction:.2%} |")
    bound = expected_cosine(runs[EXACT].start, runs[EXACT].movement)
    lines += [
        "",
        f"The movement of float32 weights, itself rounded by chance to bfloat16, has a cosine of {bound:.3f}.",
    ]
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, Trained], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    styles = {
        EXACT: {"color": "black", "linewidth": 4, "alpha": 0.35},
        "adamw_kahan": {"color": "tab:blue", "linestyle": "--"},
        "adamw_sr": {"color": "tab:green"},
        "adamw_8bit": {"color": "tab:orange"},
        "adamw": {"color": "tab:red"},
    }
    end = float(runs[EXACT].movement.double().norm())
    for name, trained in runs.items():
        steps = range(1, len(trained.lengths) + 1)
        lengths = [length / end for length in trained.lengths]
        # Of float32 itself the whole length: its way is as good as straight.
        left.plot(steps, lengths if name == EXACT else trained.along, label=LABELS[name], **styles[name])
        middle.plot(steps, lengths, **styles[name])
    left.set_title("movement along that of float32 weights")
    left.set_ylabel("share of where float32 ends")
    middle.set_title("length of the movement, with the noise of chance")
    for axes in (left, middle):
        axes.set_xlabel("step")
    changes = runs[EXACT].logps.flatten()
    limit = 1.1 * float(changes.abs().max())
    right.plot([-limit, limit], [-limit, limit], label=LABELS[EXACT], zorder=0, **styles[EXACT])
    for name, trained in runs.items():
        if name != EXACT:
            colour = styles[name]["color"]
            right.scatter(changes, trained.logps.flatten(), s=12, alpha=0.7, color=colour, label=LABELS[name])
    right.set_title("change of the responses' log-probs")
    right.set_xlabel("with float32 weights, nats")
    right.set_ylabel("nats")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    words = parser.parse_args()
    setting = Setting()
    runs, compared = experiment(setting)
    text = report(setting, runs, compared)
    print(text)
    if words.out is not None:
        words.out.write_text(f"# Weights in bfloat16\n\n`python benchmarks/bf16_weights.py`\n\n{text}")
    if words.plot is not None:
        plot(runs, words.plot)


if __name__ == "__main__":
    main()
