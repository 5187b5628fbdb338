"""The section of the reference model and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_po.config.field import option


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference model and the cache of its log-probs."""

    reference_model_name_or_path: str | None = option(None, "reference model; default: the policy's initial weights")
    reference_model_revision: str | None = option(
        None, "Hub branch, tag or commit of the reference model", needs="reference_model_name_or_path"
    )
    reference_cache_dir: str = option(
        "~/.cache/open_po/reference", "where reference log-probs are kept", shapes_result=False
    )
    reference_cache_read_only: list[str] | None = option(
        None, "more such folders, a team's for example, that are looked into and never written to", shapes_result=False
    )
    reference_cache_level: Literal["auto", "sum", "token"] = option(
        "auto",
        "sum: one log-prob for a response; token: also that of each of its tokens, which ld_alpha needs. auto: token "
        "with ld_alpha, else sum",
        shapes_result=False,
    )
    reference_sharding: Literal["auto", "on", "off"] = option(
        "auto",
        "on: the ranks divide the reference model among them and compute its log-probs in step; off: each has a whole "
        "copy and works by itself, which is faster. auto: whole copies where they fit",
        shapes_result=False,
    )
    verify_reference_rows: int = option(
        4,
        "cached log-probs that are computed once more at the start and compared; 0: none, and a reference model with "
        "everything cached is not loaded",
        not_negative=True,
        shapes_result=False,
    )
    reference_max_tokens_per_batch: int | Literal["auto"] = option(
        "auto",
        "tokens of one forward pass of the reference, which keeps no activations; auto: found as for "
        "max_tokens_per_batch. If memory runs out it is halved and the pass goes on",
        above=0,
        shapes_result=False,
    )
