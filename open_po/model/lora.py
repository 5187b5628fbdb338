"""LoRA adapters that are trained in place of the weights (arXiv 2106.09685), new ones or those of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel

from open_po.config import ModelConfig, RunConfig
from open_po.distributed.parallelism import Parallelism
from open_po.errors import UserError, first_line
from open_po.model.scorer import Scorer
from open_po.model_files import ModelSource, adapter_base, adapter_settings, policy_source

if TYPE_CHECKING:
    from peft import LoraConfig


def refuse_wrong_start(config: RunConfig, parallelism: Parallelism) -> None:
    """Raises UserError, before anything takes long, if adapters cannot start from the policy as they are asked to."""
    model, source = config.model, policy_source(config)
    if not model.use_lora:
        return
    folder = source.folder()
    has_dora = model.use_dora
    holds_adapters = adapter_base(folder, source.trust_remote_code) is not None
    if model.lora_start == "continue":
        if not holds_adapters:
            raise no_adapters(source)
        has_dora = bool(_trainable_settings(folder).get("use_dora"))
    elif holds_adapters and model.use_qlora:
        raise UserError(
            f"use_qlora: {source.name} is a folder of adapters, which are not merged into 4-bit weights; use "
            "lora_start continue, or a model that they are merged into"
        )
    elif holds_adapters and not config.output.merge_on_save:
        raise UserError(
            f"merge_on_save: adapters on top of those of {source.name} are on no model that a folder holds; leave it "
            "out, or use lora_start continue"
        )
    if has_dora and parallelism.divides_weights:
        raise UserError(
            f"use_dora: needs whole weights, which parallel {parallelism.kind} divides; use ddp, or leave it out"
        )


def no_adapters(source: ModelSource) -> UserError:
    """The error where `lora_start` continue finds a whole model."""
    return UserError(f"lora_start: continue needs a folder of adapters, {source.name} is a whole model; use new")


def _trainable_settings(folder: Path) -> dict[str, Any]:
    """What peft is told of the adapters in `folder`.

    Raises UserError for adapters that are not LoRA's, or train more than low-rank factors.
    """
    settings = adapter_settings(folder)
    kind = settings.get("peft_type")
    more = [name for name in ("modules_to_save", "trainable_token_indices", "lora_bias") if settings.get(name)]
    more += ["bias"] if settings.get("bias", "none") != "none" else []
    if kind != "LORA":
        raise UserError(f"lora_start: continue trains LoRA adapters, those in {folder} are {kind}; use new")
    if more:
        raise UserError(f"lora_start: continue does not know {more[0]} of the adapters in {folder}; use new")
    return settings


def add_adapters(model: PreTrainedModel, folder: Path) -> Any:
    """`model` with the adapters of a folder on its layers, in float32 and ready to train.

    They take no random numbers: a model that is loaded only where the cache lacks its log-probs must not change what
    is drawn after it. Raises UserError for an adapter on the head.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True, low_cpu_mem_usage=True)
    _refuse_on_head(model, f"{folder}")
    return adapted


def attach_lora(scorer: Scorer, config: ModelConfig) -> None:
    """Freeze the scorer's weights and give it new float32 adapters.

    Raises UserError for target modules that do not exist, and for an adapter on the head or on an embedding tied to
    it: the fused log-probs read the head's own weight.
    """
    from peft import LoraConfig

    targets: list[str] | str | None = config.lora_target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=cast(int, config.lora_alpha),  # peft takes fractions too
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    _attach(scorer, lora, targets if isinstance(targets, list) else [])


def attach_like(scorer: Scorer, folder: Path) -> None:
    """Freeze the scorer's weights and give it float32 adapters of the shape of those in `folder`, without their values.

    `folder` need hold no more than their description. Raises UserError if it is none that `lora_start` continue takes.
    """
    from peft import LoraConfig

    _trainable_settings(folder)
    lora = LoraConfig.from_pretrained(str(folder))
    lora.inference_mode = False
    _attach(scorer, cast(LoraConfig, lora), [])


def _attach(scorer: Scorer, lora: LoraConfig, targets: Sequence[str]) -> None:
    """Adapters, of which each of `targets` must have got one."""
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = scorer.base
    try:
        scorer.model = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {first_line(error)}") from error
    found = [name for name, module in scorer.model.named_modules() if isinstance(module, BaseTunerLayer)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise UserError(f"lora_target_modules: the model has no module {target} that can get an adapter")
    _refuse_on_head(model, "lora_target_modules")


def _refuse_on_head(model: PreTrainedModel, where: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    embeddings = {"head": head}
    if head.weight is embedding.weight:
        embeddings["embedding tied to the head"] = embedding
    for what, module in embeddings.items():
        if isinstance(module, BaseTunerLayer):
            raise UserError(f"{where}: an adapter on the {what} is not supported; leave it out of the list")
