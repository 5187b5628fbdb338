"""The model as of a checkpoint, loaded to be looked at rather than trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from open_po.config import ModelConfig
from open_po.distributed.single import WEIGHTS
from open_po.errors import UserError, first_line
from open_po.model.load import load_scorer
from open_po.model.lora import attach_lora
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource
from open_po.training.checkpoint import SavedState

_WHOLE = ("single", "ddp")  # the engines whose checkpoints hold whole weights


def refuse_divided(checkpoint: Path) -> None:
    """Raises UserError for a checkpoint that is damaged, or whose weights ranks have divided."""
    try:
        kind = SavedState.read(checkpoint).kind
    except UserError as error:
        raise UserError(f"{checkpoint}: is no whole checkpoint; evaluate another one") from error
    if kind not in _WHOLE:
        raise UserError(
            f"{checkpoint}: was written under parallel {kind}, in parts that only such a run reads; evaluate the run's "
            "own folder, or push_to_hub, which writes the model of each checkpoint"
        )


def checkpoint_weights(checkpoint: Path) -> Path:
    """The file of a checkpoint's weights, or adapters."""
    return checkpoint / WEIGHTS


def checkpoint_scorer(
    checkpoint: Path, source: ModelSource, config: ModelConfig, numerics: Numerics, device: torch.device
) -> Scorer:
    """The model that a run started from, with the weights, or the adapters, that a checkpoint of it holds.

    `config` is that run's. Raises UserError if they do not belong together.
    """
    scorer = load_scorer(source, numerics, device)
    if config.use_lora and config.lora_start == "new":
        attach_lora(scorer, config)
    own = dict(scorer.named_parameters())
    path = checkpoint_weights(checkpoint)
    try:
        weights = load_file(path)
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
    except Exception as error:  # of safetensors, of a name or a shape that the model does not have
        raise UserError(f"{path}: are no weights for {source.name} ({first_line(error)})") from error
    return scorer.to(device)
