"""LoRA adapters that are trained in place of the weights (arXiv 2106.09685)."""

from __future__ import annotations

from typing import cast

from open_po.config import ModelConfig
from open_po.errors import UserError, first_line
from open_po.model.scorer import Scorer


def attach_lora(scorer: Scorer, config: ModelConfig) -> None:
    """Freeze the scorer's weights and give it new float32 adapters.

    Raises UserError for target modules that do not exist, and for an adapter on the head or on an embedding tied to
    it: the fused log-probs read the head's own weight.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets: list[str] | str | None = config.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=cast(int, config.lora_alpha),  # peft takes fractions too
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model = scorer.base
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    try:
        scorer.model = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {first_line(error)}") from error
    found = [name for name, module in scorer.model.named_modules() if isinstance(module, BaseTunerLayer)]
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise UserError(f"lora_target_modules: the model has no module {target} that can get an adapter")
    embeddings = {"head": model.get_output_embeddings()}
    if tied:
        embeddings["embedding tied to the head"] = model.get_input_embeddings()
    for what, module in embeddings.items():
        if isinstance(module, BaseTunerLayer):
            raise UserError(f"lora_target_modules: an adapter on the {what} is not supported; leave it out of the list")
