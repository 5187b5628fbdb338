"""Preference data: from files or the Hub to token ids."""

from open_po.data.dataset import PairDataset, load_pairs
from open_po.data.tokenization import PreferencePair

__all__ = ["PairDataset", "PreferencePair", "load_pairs"]
