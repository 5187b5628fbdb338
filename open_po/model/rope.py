"""Rotary positions that depend on the longest row of a batch."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def rope_limit(config: Any) -> int | None:
    """The longest row whose rotations do not depend on its length; None if no row's do (dynamic and long RoPE do)."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sections = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # by layer type
    limits = [
        section.get("original_max_position_embeddings") or config.max_position_embeddings
        for section in sections
        if section.get("rope_type", section.get("type")) in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def forget_longer_rows(model: PreTrainedModel) -> None:
    """Reset dynamic RoPE, which goes on using the frequencies of the longest row that it has seen."""
    for module in model.modules():
        if not hasattr(module, "max_seq_len_cached"):
            continue
        for name in [name for name in dir(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name in [name for name in dir(module) if name.endswith("original_inv_freq")]:
            # A copy: what is there may be the buffer of the long frequencies itself.
            setattr(module, name.replace("original_inv_freq", "inv_freq"), getattr(module, name).clone())
