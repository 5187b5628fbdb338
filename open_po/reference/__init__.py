"""Reference log-probs: computed once per response and model, kept on disk, found by pair."""

from open_po.reference.ensure import Reference, ensure_reference, log_probs_of, open_cache, separate_reference
from open_po.reference.store import ReferenceStore, lookup

__all__ = [
    "Reference",
    "ReferenceStore",
    "ensure_reference",
    "log_probs_of",
    "lookup",
    "open_cache",
    "separate_reference",
]
