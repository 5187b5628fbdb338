"""Reference log-probs: computed once per response and model, kept on disk, found by pair."""

from open_po.reference.ensure import FilledStore, ensure_reference, log_probs_of, open_cache, separate_reference
from open_po.reference.store import ReferenceStore, select_pairs

__all__ = [
    "FilledStore",
    "ReferenceStore",
    "ensure_reference",
    "log_probs_of",
    "open_cache",
    "select_pairs",
    "separate_reference",
]
