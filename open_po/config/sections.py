"""What can be configured, but for the loss: sections of fields."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from open_po.config.field import option
from open_po.config.mixture import MixturePart, parse_mixture

Sharing = Literal["auto", "on", "off"]
Tracker = Literal["wandb", "tensorboard", "trackio", "mlflow"]
Parallel = Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp", "layers", "tp"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy, its tokenizer and how it computes."""

    model_name_or_path: str = option("", "policy: a local folder or a Hub name")
    model_revision: str | None = option(None, "Hub branch, tag or commit of the policy")
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the policy's")
    chat_template_name: str | None = option(
        None, "chat template to use and save: 'tulu' or a .jinja file; default: the tokenizer's own"
    )
    trust_remote_code: bool = option(False, "run model code that comes with a Hub repository")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute precision; auto: bfloat16 on CUDA, else float32. Trained weights are always float32"
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, slower",
        shapes_result=False,
        scores=False,
    )
    use_liger_kernel: bool | None = option(
        None, "Liger's Triton kernels for head, RMSNorm, RoPE and SwiGLU; default: on CUDA"
    )
    prompt_sharing: Sharing = option(
        "auto",
        "compute a prompt once for all its responses; auto: if the model's scores stay those of its own forward, which "
        "is checked at the start; on: or stop",
        shapes_result=False,
    )
    use_lora: bool = option(False, "train LoRA adapters instead of all weights", scores=False)
    lora_rank: int = option(None, "LoRA rank; default 64", derived=True, above=0, needs="use_lora", scores=False)
    lora_alpha: float = option(None, "LoRA alpha; default 16", derived=True, above=0, needs="use_lora", scores=False)
    lora_dropout: float = option(
        None, "LoRA dropout; default 0", derived=True, not_negative=True, below=1, needs="use_lora", scores=False
    )
    lora_target_modules: list[str] = option(
        None,
        "module names that get an adapter; default all-linear (all but the head)",
        derived=True,
        needs="use_lora",
        scores=False,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs are trained and evaluated on, and how they become tokens."""

    mixer_list: list[str] = option(
        None,
        "training data: NAME AMOUNT [NAME AMOUNT ...]; an amount is a fraction (0.5) or a count of rows (1000)",
        derived=True,
    )
    dataset_mixer: dict[str, str] | None = option(None, "the same as a YAML mapping NAME: AMOUNT")
    mixer_list_splits: list[str] = option(["train"], "one split for all datasets, or one for each: train, train[:90%]")
    eval_mixer_list: list[str] | None = option(None, "held-out data, written as mixer_list", shapes_result=False)
    eval_mixer_list_splits: list[str] = option(
        ["train"], "splits of the held-out data", needs="eval_mixer_list, the held-out data", shapes_result=False
    )
    max_train_samples: int | None = option(None, "use at most so many training rows", above=0)
    max_seq_length: int = option(
        2048, "longest prompt + response, in tokens; longer responses lose their newest", above=0
    )
    max_prompt_length: int | None = option(
        None,
        "longest prompt, in tokens; longer ones lose their oldest. Default: what the longer response leaves of "
        "max_seq_length, and at least half of it",
        above=0,
    )
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise; default: the CPUs at hand", above=0, shapes_result=False
    )

    @cached_property
    def mixture(self) -> list[MixturePart]:
        """The training data. Raises ValueError with one line."""
        return parse_mixture(self.mixer_list, self.mixer_list_splits, "mixer_list")

    @cached_property
    def held_out_mixture(self) -> list[MixturePart]:
        """The held-out data; empty if there is none. Raises ValueError with one line."""
        if self.eval_mixer_list is None:
            return []
        return parse_mixture(self.eval_mixer_list, self.eval_mixer_list_splits, "eval_mixer_list")


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
    reference_max_tokens_per_batch: int | None = option(
        None,
        "tokens of one forward pass of the reference, which keeps no activations; default 4 x max_tokens_per_batch on "
        "CUDA, max_tokens_per_batch on a CPU. If memory runs out it is halved and the pass goes on",
        above=0,
        shapes_result=False,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer steps. The global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks pairs."""

    per_device_train_batch_size: int = option(4, "pairs, see gradient_accumulation_steps", above=0)
    gradient_accumulation_steps: int = option(
        8, "the global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks, in pairs", above=0
    )
    max_tokens_per_batch: int = option(
        None,
        "tokens of one forward pass, shared prompts counted once, padding included (a pair that needs more goes "
        "alone); default "
        "2 x per_device_train_batch_size x max_seq_length. "
        "Changes memory and speed, never a step's value",
        derived=True,
        above=0,
        shapes_result=False,
        scores=True,
    )
    group_pairs_by_prompt: bool = option(
        False,
        "draw whole prompts, so that a step holds all pairs of a prompt and computes each response once; a prompt is "
        "split between steps only if it is larger than a step or nothing that is left fits into a step's rest",
    )
    optimizer: Literal["adamw", "rmsprop", "sgd"] = option("adamw", "adamw, rmsprop or sgd")
    learning_rate: float = option(5e-7, "peak learning rate", above=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "linear, cosine, constant or constant_with_warmup"
    )
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises", not_negative=True, below=1)
    weight_decay: float = option(0.0, "decoupled weight decay of adamw; not on norms and biases", not_negative=True)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", not_negative=True)
    num_epochs: int = option(1, "passes over the training data", above=0)
    max_train_steps: int | None = option(None, "stop after so many optimizer steps", above=0)
    max_run_time: float | None = option(
        None,
        "stop after so many hours, counted from the start of the program: the step is finished and a checkpoint "
        "written, as on SIGTERM and SIGUSR1; exit code 75",
        above=0,
        shapes_result=False,
    )
    seed: int = option(42, "seed of the data order, dropout and new adapters", not_negative=True, below=2**32)
    eval_steps: int | None = option(
        None,
        "evaluate every so many steps, besides before the first and after the last",
        above=0,
        needs="eval_mixer_list, the held-out data",
        shapes_result=False,
    )
    sample_during_eval: int = option(
        0,
        "at each evaluation, answer so many held-out prompts greedily, the same every time: console, samples.jsonl, "
        "trackers. Where ranks divide the weights, these are gathered for every token: slow for large models",
        not_negative=True,
        needs="eval_mixer_list, the held-out data",
        shapes_result=False,
    )
    sample_max_new_tokens: int = option(
        256, "longest such answer, in tokens", above=0, needs="sample_during_eval", shapes_result=False
    )
    logging_steps: int = option(1, "write metrics every so many steps", above=0, shapes_result=False)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the model is spread over the ranks; none of it changes the value of a step."""

    parallel: Parallel = option(
        "auto",
        "ddp: a whole model on every rank; zero1, zero2, zero3: DeepSpeed divides optimizer states, gradients too, "
        "weights too; fsdp: PyTorch divides all three; layers: one process, its model over all GPUs it sees, layer by "
        "layer; tp (experimental, CUDA): each rank has a part of every layer. auto: what accelerate launch asks for; "
        "else ddp, or fsdp where that does not fit",
        shapes_result=False,
    )
    offload_optimizer: bool = option(
        False, "keep the optimizer's states in the host's memory (zero1, zero2, zero3)", shapes_result=False
    )
    offload_param: bool = option(
        False, "keep weights in the host's memory (zero3; fsdp, with the optimizer's states)", shapes_result=False
    )
    zero_hpz_partition_size: int = option(
        1,
        "zero3: keep a second copy of the weights, divided among so many ranks, those of a node, so that the backward "
        "pass gathers them from there; 1: none",
        above=0,
        shapes_result=False,
    )


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
