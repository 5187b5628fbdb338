"""The section of what a run leaves behind, and where it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_po.config.field import option

Tracker = Literal["wandb", "tensorboard", "trackio", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    exp_name: str = option("dpo_tune_cache", "name of the run", shapes_result=False)
    output_dir: str = option(
        None, "folder of the model, metrics and checkpoints; default output/EXP_NAME", derived=True, shapes_result=False
    )
    checkpointing_steps: int | None = option(
        None, "write a checkpoint every so many steps", above=0, shapes_result=False
    )
    async_checkpointing: bool = option(
        False,
        "write checkpoints while training goes on, from a copy in the host's memory; not with DeepSpeed",
        needs="checkpointing_steps",
        shapes_result=False,
    )
    keep_last_n_checkpoints: int = option(3, "older checkpoints are removed", above=0, shapes_result=False)
    resume_from_checkpoint: str | None = option(
        None,
        "auto: continue from output_dir's last checkpoint, if any; hub: as auto, or from the one on the Hub if that is "
        "newer (hub_strategy checkpoint or all_checkpoints); or a checkpoint's folder",
        shapes_result=False,
    )
    save_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "precision of the saved model; auto: that of dtype. Checkpoints are always exact", shapes_result=False
    )
    merge_on_save: bool = option(
        True,
        "with use_lora: save the model with its adapters merged into it, and these by themselves in adapter/; false: "
        "the adapters alone",
        shapes_result=False,
    )
    report_to: list[Tracker] | None = option(
        None,
        "trackers that get metrics, samples and the configuration besides metrics.jsonl: wandb, tensorboard, trackio, "
        "mlflow",
        shapes_result=False,
    )
    with_tracking: bool = option(False, "an older name for report_to wandb", shapes_result=False)
    wandb_project_name: str | None = option(None, "W&B project; default open_po", shapes_result=False)
    wandb_entity: str | None = option(None, "W&B team or user", shapes_result=False)
    push_to_hub: bool = option(False, "upload to the Hugging Face Hub, see hub_strategy", shapes_result=False)
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save",
        "end: the final model; every_save: also the model as of each checkpoint; checkpoint: and the newest one's "
        "state of training, which resume_from_checkpoint hub goes on from; all_checkpoints: and each checkpoint stays, "
        "in a branch HF_REPO_REVISION-step_N",
        needs="push_to_hub",
        shapes_result=False,
    )
    hf_entity: str | None = option(
        None,
        "Hub user or organisation, if hf_repo_id names none; default: the token's",
        needs="push_to_hub",
        shapes_result=False,
    )
    hf_repo_id: str | None = option(
        None, "Hub repository, NAME or USER/NAME; default EXP_NAME", needs="push_to_hub", shapes_result=False
    )
    hf_repo_revision: str | None = option(
        None, "Hub branch to upload to; default EXP_NAME", needs="push_to_hub", shapes_result=False
    )
    hf_merged: bool = option(
        False,
        "with use_lora: upload the merged model, its adapter beside it in adapter/; default: the adapter alone",
        needs="push_to_hub",
        shapes_result=False,
    )
    hf_private: bool | None = option(
        None, "make a new Hub repository private; default true", needs="push_to_hub", shapes_result=False
    )
