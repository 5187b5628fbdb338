"""Preference losses: tensors in, tensors out; nothing here imports another part of the project."""

from open_po.losses.catalogue import DIVERGENCES, LOSSES, NOTATION, loss_spec, preference_loss
from open_po.losses.mix import Loss, LossMix, MixedLosses
from open_po.losses.spec import Extra, LossSpec, Value
from open_po.losses.types import Counts, LossOutput, NllTerm, PairLogps, PairLosses

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "NOTATION",
    "Counts",
    "Extra",
    "Loss",
    "LossMix",
    "LossOutput",
    "LossSpec",
    "MixedLosses",
    "NllTerm",
    "PairLogps",
    "PairLosses",
    "Value",
    "loss_spec",
    "preference_loss",
]
