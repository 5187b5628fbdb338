"""Draw docs/losses.png: every loss against its margin, with the losses' default parameters.

python docs/plot_losses.py [PATH]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from open_po.losses import LOSSES, Loss, LossMix, PairLogps
from open_po.losses.types import Counts

TOKENS = 20


def curve(name: str, margins: torch.Tensor) -> torch.Tensor:
    """The loss of one pair at a time, as a function of beta x (chosen - rejected log-ratio)."""
    spec = LOSSES[name]
    loss = Loss(spec, spec.resolve({}))
    beta = float(loss.parameters.get("beta", 1.0))
    per_token = name in ("dpo_norm", "simpo", "orpo", "sft") or (
        name == "ipo" and loss.parameters["convention"] == "mean"
    )
    scale = TOKENS if per_token else 1
    values = []
    for margin in margins:
        half = margin / beta * scale / 2
        base = torch.tensor([-30.0 * max(1, scale / TOKENS)])
        policy = PairLogps(
            chosen=(base + half).clamp(max=-1e-3) if not spec.takes_reference else base + half,
            rejected=(base - half).clamp(max=-1e-3) if not spec.takes_reference else base - half,
            chosen_tokens=torch.tensor([float(TOKENS)]),
            rejected_tokens=torch.tensor([float(TOKENS)]),
            chosen_log_sum_sq=base,
            rejected_log_sum_sq=base,
        )
        reference = PairLogps(
            chosen=base,
            rejected=base,
            chosen_tokens=policy.chosen_tokens,
            rejected_tokens=policy.rejected_tokens,
        )
        counts = Counts(pairs=1, chosen_tokens=TOKENS)
        values.append(LossMix((loss,))(policy, reference).value(counts))
    return torch.stack(values)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("losses.png")
    margins = torch.linspace(-4, 4, 161)
    columns = 6
    rows = -(-len(LOSSES) // columns)
    figure = Figure(figsize=(16, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns).flat
    for name, panel in zip(LOSSES, axes, strict=False):
        panel.plot(margins, curve(name, margins))
        panel.set_title(name)
        panel.axvline(0, color="grey", linewidth=0.5)
        panel.grid(alpha=0.3)
    for panel in list(axes)[len(LOSSES) :]:
        panel.axis("off")
    figure.supxlabel("beta x margin")
    figure.supylabel("loss")
    FigureCanvasAgg(figure).print_figure(path, dpi=80)


if __name__ == "__main__":
    main()
