"""All aliases, by the trainer that people know them from. A name that several have stands under the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from open_po.config.aliases.alias import Alias, becomes, number, refused, same, together, truth, unused, values

_BEAKER = "their cluster's own; `python -m open_po evaluate` measures a model, push_to_hub uploads it"
_KERNELS = "the attention that a model allows is found at the start; on CUDA it is FlashAttention"
_PACKED = "pairs are always packed without padding, max_tokens_per_batch says how many tokens"
_ALL_PARTS = "needs mixer_list or mixture with names of files or of the Hub"

_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw_paged"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    "rmsprop": "rmsprop",  # also where it is written RMSprop
}
_OF_GAMMA = "loss_type dpo_loss_type beta dpo_beta"
_LOSSES = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "aot_pair": "aot_unpaired"}


def _switch(field: str, value: str) -> Any:
    """True sets a field to a value; false leaves it alone."""
    return lambda given, _: {field: value} if truth(given) else {}


def _one_part(name: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    configuration = known.get("dataset_config_name")
    return {"mixture": [{"dataset": str(name)} | ({"configuration": configuration} if configuration else {})]}


def _configuration(value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if known.get("dataset_name") is None:
        raise ValueError("belongs to dataset_name; in mixture each entry has its configuration")
    return {}


def _whole(field: str) -> Any:
    """A whole number that may be written as 3.0."""

    def take(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        return {field: str(int(number(value))) if number(value).is_integer() else value}

    return take


def _or_off(field: str, off: str | None) -> Any:
    """A number, of which -1 and 0 mean that it is switched off."""
    return lambda value, _: {field: off if value is not None and number(value) in (-1, 0) else value}


def _gamma(value: Any, known: Mapping[str, Any]) -> dict[str, Any] | str:
    losses = [said for name, said in known.items() if name in ("loss_type", "dpo_loss_type") and said is not None]
    betas = [said for name, said in known.items() if name in ("beta", "dpo_beta") and said is not None]
    if losses[-1:] != ["simpo"]:
        return "no effect but with loss_type simpo"
    if not betas:
        raise ValueError("needs beta beside it, since gamma is this times beta; or give gamma")
    return {"gamma": repr(number(value) * number(betas[-1]))}


def _dtype(value: Any, known: Mapping[str, Any]) -> dict[str, Any] | str:
    if value == "float16":
        raise ValueError("float16 is not offered; use dtype bfloat16 or float32")
    if value == "auto" or (known.get("bf16") is True and value != "bfloat16"):
        return "no effect; dtype says what is computed in, weights_dtype what trained weights are kept in"
    return {"dtype": value}


def _bf16(value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"dtype": "auto"} if value == "auto" else {"dtype": "bfloat16"} if truth(value) else {}


def _warmup_steps(value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    nothing = value is not None and number(value) == 0 and known.get("warmup_ratio") is not None
    return {"warmup_steps": None if nothing else value}


def _zero_stage(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if value not in ("0", "1", "2", "3"):
        raise ValueError(f"expects 0, 1, 2 or 3, got {value}")
    return {"parallel": "ddp" if value == "0" else f"zero{value}"}


def _checkpointing(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if not 0 <= number(value) <= 1:
        raise ValueError(f"must lie in [0, 1], got {value}")
    return {"gradient_checkpointing": number(value) < 1}


def _save_steps(value: Any, known: Mapping[str, Any]) -> dict[str, Any] | str:
    if known.get("save_strategy") in ("no", False):
        return "no effect with save_strategy no"
    return {"checkpointing_steps": value}


def _save_strategy(value: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if value == "steps":
        return {} if known.get("save_steps") is not None else {"checkpointing_steps": "500"}
    if value in ("no", False):
        return {"checkpointing_steps": None}
    raise ValueError(f"{value} is not offered; say steps, and checkpointing_steps")


def _truncation(start: str, end: str) -> Any:
    meanings = {start: "keep_start", end: "keep_end"}

    def take(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        if value not in meanings:
            raise ValueError(f"expects {start} or {end}, got {value}")
        return {"truncation": meanings[value]}

    return take


def _trackers(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if value == "all":
        raise ValueError("all is not offered; name them: wandb, tensorboard, trackio, mlflow")
    return {"report_to": None if value in ("none", ["none"]) else value}


def _modules(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    return {"lora_target_modules": ["all-linear"] if words in (["all"], ["all-linear"]) else words}


def _adapter(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if value not in ("lora", "qlora", "full"):
        raise ValueError(f"expects lora, qlora or full, got {value}")
    return {} if value == "full" else {f"use_{value}": True}


def _stage(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if value != "dpo":
        raise ValueError(f"{value} is not offered; loss_type says what is trained, sft and kto_pair among others")
    return {}


def _four_bits(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if value not in ("4", "none", "no"):
        raise ValueError(f"{value} is not offered; 4 is use_qlora")
    return {"use_qlora": True} if value == "4" else {}


def _checkpoint_steps(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if value == "epoch":
        raise ValueError("epoch is not offered; give a number of steps")
    return {"checkpointing_steps": value}


# Fields of ours that others have too, with values that they spell otherwise.
_OWN = [
    values("loss_type", "loss_type", _LOSSES),
    values("optimizer", "optimizer", _OPTIMIZERS),
    becomes("max_grad_norm", "max_grad_norm", "-1 is 0: never", _or_off("max_grad_norm", "0")),
    becomes("checkpointing_steps", "checkpointing_steps", "a number of steps; `epoch` is refused", _checkpoint_steps),
    becomes("report_to", "report_to", "`none` is null; `all` is refused", _trackers),
    becomes("lora_target_modules", "lora_target_modules", "`all` is all-linear", _modules),
]
_OPEN_INSTRUCT = [
    same("dpo_beta", "beta"),
    values("dpo_loss_type", "loss_type", _LOSSES),
    same("dpo_label_smoothing", "label_smoothing"),
    becomes("dpo_gamma_beta_ratio", "gamma", "gamma = ratio x beta; simpo alone", _gamma, reads=_OF_GAMMA),
    becomes("gamma_beta_ratio", "gamma", "gamma = ratio x beta; simpo alone", _gamma, reads=_OF_GAMMA),
    same("dataset_mixer_list", "mixer_list"),
    same("dataset_mixer_list_splits", "mixer_list_splits"),
    same("dataset_eval_mixer_list", "eval_mixer_list"),
    same("dataset_eval_mixer_list_splits", "eval_mixer_list_splits"),
    becomes("dataset_name", "mixture", "all of its split train", _one_part, reads="dataset_config_name"),
    becomes("dataset_config_name", "mixture", "configuration of dataset_name", _configuration),
    becomes("train_file", "mixture", "all of it", _one_part),
    becomes("num_train_epochs", "num_epochs", "3.0 is 3", _whole("num_epochs")),
    becomes("clip_grad_norm", "max_grad_norm", "-1 is 0: never", _or_off("max_grad_norm", "0")),
    values("optimizer_type", "optimizer", _OPTIMIZERS),
    becomes("use_8bit_optimizer", "optimizer", "true is adamw_8bit", _switch("optimizer", "adamw_8bit")),
    becomes("dpo_use_paged_optimizer", "optimizer", "true is adamw_paged", _switch("optimizer", "adamw_paged")),
    becomes("zero_stage", "parallel", "0 is ddp; 1, 2, 3 are zero1, zero2, zero3", _zero_stage),
    becomes("activation_memory_budget", "gradient_checkpointing", "below 1 is true", _checkpointing),
    same("compile_model", "torch_compile"),
    same("wandb_project", "wandb_project_name"),
    same("run_name", "exp_name", "gives way to exp_name", yields=True),
    same("tokenizer_name_or_path", "tokenizer_name"),
    *refused("config_name", "a model's configuration is that of its folder; set model_name_or_path to one with it"),
    *refused("cache_dataset_only", "`python -m open_po inspect` tokenises and keeps what it did"),
    *refused("cache_logprobs_only", "`python -m open_po cache build` does that"),
    *refused("save_to_hub", "set push_to_hub, and hf_repo_id to this"),
    *refused("tensor_parallel_degree", "set parallel to tp", ["1"]),
    *refused("context_parallel_degree pipeline_parallel_degree", "is not offered; leave it out", ["1"]),
    *unused("packing", _PACKED),
    *unused("use_flash_attn", _KERNELS),
    *unused("label_pad_token_id", "what is scored is known by position, not by a label"),
    *unused("concatenated_forward", "both responses are computed in one pack"),
    *unused("fused_optimizer", "optimizers are fused where they can be"),
    *unused("do_not_randomize_output_dir", "output_dir is used as it is given"),
    *unused("low_cpu_mem_usage", "parallel settles how a model is loaded"),
    *unused("sync_each_batch", "gradients are summed once a step"),
    *unused("timeout", "what takes long is done while no rank waits in a collective"),
    *unused(
        "dataset_mix_dir dataset_cache_mode dataset_local_cache_dir dataset_skip_cache overwrite_cache "
        "dataset_config_hash cache_mode local_cache_dir skip_cache",
        "tokenised data are found by their content, and made anew when it changes",
    ),
    *unused("dataset_transform_fn dataset_target_columns transform_fn target_columns", "format says how rows are read"),
    *unused("try_launch_beaker_eval_jobs try_auto_save_to_beaker gs_bucket_path oe_eval_*", _BEAKER),
    *unused("eval_workspace eval_priority hf_metadata_dataset hf_repo_url", _BEAKER),
    *unused("add_seed_and_date_to_exp_name", "exp_name is used as it is given"),
]
_DPO_GAMMA = [
    *together(
        "algorithm contrast_loss_type lambda_contrast average_log_prob",
        "loss_type loss_weights",
        "the loss, with beta, gamma, lambda_sft, sft_type and reference_free; see below",
    ),
    *together(
        "dataset_splits dataset_configs eval_split_size",
        "mixture eval_mixture",
        "with dataset_mixer: splits with `train` in their name are trained on, the others held out, of which "
        "eval_split_size is taken",
    ),
    *together("task_name", "format prompt_template", "`mt` rows as they are; `sum` its prompt"),
    *together("evaluation_strategy eval_strategy", "eval_steps", "`steps`; `no` drops eval_steps; `epoch` is refused"),
    becomes("torch_dtype", "dtype", "beside bf16 that one decides; `auto` has no effect; float16 is refused", _dtype),
    becomes("bf16", "dtype", "true is bfloat16", _bf16),
    *refused("fp16", "float16 is not offered; use bf16 or dtype bfloat16"),
    becomes("warmup_steps", "warmup_steps", "0 is none, beside warmup_ratio", _warmup_steps, reads="warmup_ratio"),
    becomes("max_steps", "max_train_steps", "-1 is none", _or_off("max_train_steps", None)),
    becomes("save_steps", "checkpointing_steps", "", _save_steps),
    becomes(
        "save_strategy",
        "checkpointing_steps",
        "`steps` is every save_steps; `no` none; `epoch` refused",
        _save_strategy,
    ),
    same("save_total_limit", "keep_last_n_checkpoints"),
    *unused("attn_implementation", _KERNELS),
    *unused("do_train do_eval", "held-out data are evaluated where there are any"),
    *unused("per_device_eval_batch_size", _PACKED),
    *unused("gradient_checkpointing_kwargs", "layers are recomputed without re-entering autograd"),
    *unused("logging_strategy logging_first_step", "logging_steps says when"),
    *unused("log_level", "what a run says is not by level"),
    *unused("overwrite_output_dir", "a folder that holds another run is never overwritten; give another output_dir"),
    *unused("remove_unused_columns", "a row's other columns are never read"),
]
_TRANSFORMERS = [  # and TRL, alignment-handbook
    same("max_length", "max_seq_length"),
    values("optim", "optimizer", _OPTIMIZERS),
    same("dataset_num_proc", "preprocessing_num_workers"),
    becomes("truncation_side", "truncation", "`left` is keep_end, `right` keep_start", _truncation("right", "left")),
    *refused("truncation_mode", "cuts whole rows; truncation says which end of a long prompt stays", ["keep_end"]),
    same("use_peft", "use_lora"),
    same("lora_r", "lora_rank"),
    same("load_in_4bit", "use_qlora"),
    *refused("load_in_8bit", "8 bits are not offered; use_qlora has 4"),
    same("hub_model_id", "hf_repo_id"),
    same("hub_model_revision", "hf_repo_revision"),
    same("hub_private_repo", "hf_private"),
    *refused("rpo_alpha", "set loss_type to [dpo, sft] and loss_weights to [1, rpo_alpha]"),
    *refused("max_completion_length max_target_length", "is not offered; max_seq_length and max_prompt_length are"),
    *refused("neftune_noise_alpha", "is not offered; leave it out"),
    *refused("sync_ref_model", "the reference does not change; leave it out"),
    *refused("adam_beta1", "is 0.9, PyTorch's; leave it out", ["0.9"]),
    *refused("adam_beta2", "is 0.999, PyTorch's; leave it out", ["0.999"]),
    *refused("adam_epsilon", "is 1e-8, PyTorch's; leave it out", ["1e-8", "1e-08", "1.0e-8", "1.0e-08"]),
    *refused("deepspeed fsdp fsdp_config", "set parallel; a file goes to accelerate launch, see docs/launching.md"),
    *unused("precompute_ref_log_probs", "the reference's log-probs are always computed first, and kept"),
    *unused("disable_dropout", "dropout of the base model is off"),
    *unused("padding_free group_by_length", _PACKED),
    *unused("dataloader_num_workers dataloader_pin_memory dataloader_drop_last", "rows are tokenised before training"),
    *unused("tf32 ddp_timeout ddp_find_unused_parameters save_safetensors", "is settled by what runs it"),
]
_LLAMA_FACTORY = [
    becomes("stage", "loss_type", "`dpo`, with pref_loss; others refused", _stage),
    same("pref_beta", "beta"),
    values("pref_loss", "loss_type", _LOSSES),
    same("simpo_gamma", "gamma"),
    same("cutoff_len", "max_seq_length"),
    same("max_samples", "max_train_samples"),
    same("ref_model", "reference_model_name_or_path"),
    becomes("finetuning_type", "use_lora", "`lora`; `full` is none; others refused", _adapter),
    becomes("lora_target", "lora_target_modules", "`all` is all-linear", _modules),
    becomes("quantization_bit", "use_qlora", "4 is use_qlora; others refused", _four_bits),
    *refused("pref_ftx", "set loss_type to [dpo, sft] and loss_weights to [1, pref_ftx]", ["0.0"]),
    *refused("dataset dataset_dir", _ALL_PARTS),
    *refused("template", "chat_template_name names tulu or a .jinja file; default: the tokenizer's own"),
    *refused("val_size", "name held-out data with eval_mixer_list, of another split", ["0.0"]),
    *unused("flash_attn", _KERNELS),
    *unused("plot_loss", "curves are always drawn"),
]
_AXOLOTL = [
    same("base_model", "model_name_or_path"),
    values("rl", "loss_type", _LOSSES),
    same("rl_beta", "beta"),
    same("sequence_len", "max_seq_length"),
    same("micro_batch_size", "per_device_train_batch_size"),
    same("lr_scheduler", "lr_scheduler_type"),
    same("wandb_name", "exp_name", "gives way to exp_name", yields=True),
    same("saves_total_limit", "keep_last_n_checkpoints"),
    becomes("adapter", "use_lora use_qlora", "`lora` or `qlora`", _adapter),
    becomes(
        "lora_target_linear",
        "lora_target_modules",
        "true is all-linear",
        lambda value, _: {"lora_target_modules": ["all-linear"]} if truth(value) else {},
    ),
    *refused("datasets test_datasets", _ALL_PARTS),
    *refused("val_set_size", "name held-out data with eval_mixer_list, of another split", ["0.0"]),
    *refused("saves_per_epoch", "give checkpointing_steps"),
    *refused("evals_per_epoch", "give eval_steps"),
    *unused("flash_attention xformers_attention sdp_attention", _KERNELS),
    *unused("sample_packing pad_to_sequence_len", _PACKED),
]

# By the trainer that a name is known from.
TRAINERS: dict[str, Sequence[Alias]] = {
    "open-instruct": _OPEN_INSTRUCT,
    "the DPO-gamma work, alignment-handbook": _DPO_GAMMA,
    "transformers, TRL": _TRANSFORMERS,
    "LLaMA-Factory": _LLAMA_FACTORY,
    "axolotl": _AXOLOTL,
    "open_po's own, with values of others": _OWN,
}
ALIASES: dict[str, Alias] = {alias.name: alias for alias in chain.from_iterable(TRAINERS.values())}
