"""The loss as the DPO-gamma work's files say it: by the form of a contrast, its reference, and two weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_po.config.aliases.alias import number, truth

# Names that say a loss together; any of these four means that the others are meant so as well.
_MARKS = ("algorithm", "contrast_loss_type", "lambda_contrast", "average_log_prob")
_SHARED = ("beta", "gamma", "label_smoothing", "lambda_sft", "sft_type", "reference_free")  # fields of ours by name
_OURS = ("loss_type", "loss_weights", "convention")  # what the names together become, besides
_THEIR_DEFAULTS = {"beta": "0.1", "gamma": "2", "sft_type": "token"}
ALGORITHMS = {
    "dpo": "dpo",
    "dpo-gamma": "dpo_gamma",
    "slic-dpo": "slic_dpo",
    "cpo": "cpo",
    "simpo": "simpo",
    "slic": "slic",
    "sft": "sft",
}
# By the contrast, whether it goes without a reference, and whether it takes log-probs per token. Their code has one
# formula for simpo and dpo-gamma.
_CONTRASTS = {
    ("sigmoid", False, False): "dpo",
    ("sigmoid", False, True): "dpo_norm",
    ("sigmoid", True, False): "cpo",
    ("hinge", False, False): "slic_dpo",
    ("hinge", True, False): "slic",
    ("dpo-gamma", False, False): "dpo_gamma",
    ("simpo", False, False): "dpo_gamma",
    ("dpo-gamma", True, True): "simpo",
    ("simpo", True, True): "simpo",
}
_TAKEN_BY = {  # which of `_SHARED` each takes
    "dpo": ("beta", "label_smoothing"),
    "dpo_norm": ("beta", "label_smoothing"),
    "dpo_gamma": ("beta", "gamma", "label_smoothing"),
    "slic_dpo": ("beta",),
    "cpo": ("beta", "label_smoothing", "lambda_sft", "sft_type"),
    "slic": ("beta", "lambda_sft", "sft_type"),
    "simpo": ("beta", "gamma", "label_smoothing"),
    "sft": (),
}
AS_RUN = (
    "optimizer_type, warmup_ratio and the prompt's length: taken as the file says them; the code that read such files "
    "did otherwise, which configs/readings/dpo_gamma_as_run.yaml behind this file repeats"
)

Group = tuple[set[str], dict[str, Any], list[str]]
LOSS_NAMES = {*_MARKS, *_SHARED}


def take_loss(layer: Mapping[str, Any], known: Mapping[str, Any]) -> Group:
    """The names of a layer that say a loss together, our fields for them, and lines for people. Raises ValueError."""
    marks = [name for name in _MARKS if layer.get(name) is not None]
    if not marks:
        return set(), {}, []
    for name in _OURS:
        if layer.get(name) is not None:
            raise ValueError(f"{marks[0]}: says the loss, as {name} does; leave one of them out")
    algorithm = known.get("algorithm")
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expects one of {', '.join(ALGORITHMS)}, got {algorithm}")
    if known.get("contrast_loss_type") is None:
        if algorithm is None or len(marks) > 1:
            raise ValueError(f"{marks[-1]}: needs contrast_loss_type beside it; or say loss_type")
        return {"algorithm"}, {"loss_type": ALGORITHMS[algorithm]}, []
    fields, said = _loss_of(known)
    names = fields["loss_type"] if isinstance(fields["loss_type"], list) else [fields["loss_type"]]
    if algorithm is not None and ALGORITHMS[algorithm] not in names:
        raise ValueError(f"algorithm: {algorithm} contradicts {said}, which is loss_type {' and '.join(names)}")
    unread = [name for name in _SHARED if layer.get(name) is not None and fields.get(name) is None]
    unread = [name for name in unread if name not in ("lambda_sft", "reference_free")]  # which decided on the loss
    notes = [f"{said}: is loss_type {' and '.join(names)}"]
    notes += [f"{', '.join(unread)}: no effect with loss_type {' and '.join(names)}"] if unread else []
    notes += [AS_RUN] if known.get("optimizer_type") is not None else []
    reset = {name: None for name in (*_SHARED, *_OURS) if name in known}
    return LOSS_NAMES, reset | fields, notes


def _loss_of(known: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Our fields of the loss, and in words what they were said by."""
    contrast, free = known["contrast_loss_type"], truth(known.get("reference_free") or False)
    mean = truth(known.get("average_log_prob") or False)
    weight, sft_weight = number(known.get("lambda_contrast") or 1), number(known.get("lambda_sft") or 0)
    said = f"contrast_loss_type {contrast}, reference_free {str(free).lower()}"
    said += ", average_log_prob true" if mean else ""
    said += f", lambda_contrast {weight:g}, lambda_sft {sft_weight:g}"
    convention = "token_mean" if known.get("sft_type", "token") == "token" else "sequence_sum"
    if weight == 0 and sft_weight > 0:
        return {"loss_type": "sft"} | ({} if convention == "token_mean" else {"convention": convention}), said
    if (contrast, free, mean) not in _CONTRASTS:
        known_ones = ", ".join(dict.fromkeys(name for name, _, _ in _CONTRASTS))
        raise ValueError(f"{said}: is no loss that is known; contrasts are {known_ones}, other losses by loss_type")
    name = _CONTRASTS[contrast, free, mean]
    if name == "cpo" and (sft_weight == 0 or weight != 1):  # its own form has a weight on the likelihood alone
        fields = _parameters("dpo", known) | {"loss_type": "dpo", "reference_free": True}
    else:
        fields = _parameters(name, known) | {"loss_type": name}
    if "lambda_sft" in _TAKEN_BY[fields["loss_type"]]:
        own = sft_weight if weight == 1 else 0.0
        fields["lambda_sft"], sft_weight = str(own), sft_weight - own
    if sft_weight == 0:
        return fields | ({} if weight == 1 else {"loss_weights": [str(weight)]}), said
    mixed = {"loss_type": [fields["loss_type"], "sft"], "loss_weights": [str(weight), str(sft_weight)]}
    return fields | mixed | {"convention": convention}, said


def _parameters(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: known[key] for key in _TAKEN_BY[name] if known.get(key) is not None}
    return {key: value for key, value in _THEIR_DEFAULTS.items() if key in _TAKEN_BY[name]} | given
