"""Models from files: weights, adapters merged into them or beside them, dropout off, kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from open_po.errors import UserError, first_line
from open_po.model import four_bit
from open_po.model.lora import add_adapters
from open_po.model.numerics import Numerics
from open_po.model.scorer import Scorer, StartingAdapters
from open_po.model_files import ModelSource, adapter_base


def load_scorer(source: ModelSource, numerics: Numerics, device: torch.device, mesh: Any = None) -> Scorer:
    """A causal language model on `device`, dropout off, its weights in `numerics.weights_dtype`.

    A folder of adapters gives their base model with the adapters merged into it, or, as `numerics` says, beside it.
    Dropout would make the policy differ from the reference it starts from. With a `mesh` of ranks each loads its part
    of every layer, as the plan for tensor parallelism of a model without adapters says. Raises UserError if the model
    cannot be loaded.
    """
    folder = source.folder()
    base = adapter_base(folder, source.trust_remote_code)
    try:
        whole = folder if base is None else base.folder()
        model, dropout = _load(whole, source.trust_remote_code, numerics, device, mesh)
        # Adapters that are trained on it name it as their base: not by the folder of this machine's Hub cache.
        model.name_or_path = model.config._name_or_path = source.name
        scored: Any = model
        if base is not None:
            scored = add_adapters(model, folder)
            if not numerics.adapters_apart:
                scored = scored.merge_and_unload().requires_grad_(True)  # peft had frozen what is under the adapters
        if numerics.four_bit:
            four_bit.make_ready(scored, numerics.compute_dtype, source.name)
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever a bad folder makes it
        raise UserError(f"{source.name}: no causal language model can be loaded ({first_line(error)})") from error
    if numerics.use_liger:
        apply_liger(model)
    return Scorer(scored.to(device), numerics, dropout, started_with=starting_adapters(base, numerics))


def starting_adapters(base: ModelSource | None, numerics: Numerics) -> StartingAdapters:
    """What becomes of the adapters of a folder, if it holds some, which are then for the model `base`."""
    if base is None:
        return "none"
    return "apart" if numerics.adapters_apart else "merged"


def _load(
    folder: Path, trust_remote_code: bool, numerics: Numerics, device: torch.device, mesh: Any
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The model of a folder without adapters, and the dropout rates that were switched off."""
    settings, dropout = model_settings(folder, trust_remote_code, numerics)
    if numerics.four_bit:
        settings |= four_bit.loading_settings(numerics.compute_dtype, device)
    if mesh is not None:
        settings |= {"tp_plan": "auto", "device_mesh": mesh}
    return AutoModelForCausalLM.from_pretrained(folder, **settings), dropout


def model_settings(
    folder: Path, trust_remote_code: bool, numerics: Numerics
) -> tuple[dict[str, Any], dict[str, float]]:
    """What a folder's model is made with, and the dropout rates that are switched off in it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    quantised = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if quantised == "bitsandbytes" and not numerics.four_bit:
        raise UserError(
            f"{folder}: its weights are in 4 or 8 bits, which do not train; set use_qlora, or name whole ones"
        )
    dropout = _switch_off_dropout(config)
    # PyTorch's attention, the default, cannot cap scores; transformers 5.17 uses it for Gemma 2 all the same.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    settings = {
        "config": config,
        "attn_implementation": "eager" if capped else None,
        "dtype": numerics.weights_dtype,
        "trust_remote_code": trust_remote_code,
    }
    return settings, dropout


def _switch_off_dropout(config: Any) -> dict[str, float]:
    """Set every dropout rate of a model's configuration to 0; returns the old rates, which are saved with the model."""
    rates = {
        name: value
        for name, value in config.to_dict().items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0
    }
    for name in rates:
        setattr(config, name, 0.0)
    return rates


def apply_liger(model: PreTrainedModel) -> None:
    """Liger's RMSNorm, RoPE and gated MLPs, for the model types it knows; the head is fused by `logprobs`."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    kernels = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True, "layer_norm": True}
    _apply_liger_kernel_to_instance(model, **kernels, cross_entropy=False, fused_linear_cross_entropy=False)
