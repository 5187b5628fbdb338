"""What can be configured: sections of fields, and the whole of them, `RunConfig`.

A field's name is unique over all sections, so YAML and flags are flat. A field that is None was left to its default;
`resolve` replaces it where the default depends on other fields, and what it writes parses again to the same run.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from open_po.losses import Loss, LossMix, LossSpec, Value, loss_spec

Sharing = Literal["auto", "on", "off"]


def option(default: Any, text: str, *, shapes_result: bool = True) -> Any:
    """A field with its help text. `shapes_result=False`: changing it between a run and its resumption is allowed."""
    metadata = {"help": text, "shapes_result": shapes_result}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
        False, "recompute activations in the backward pass: less memory, slower", shapes_result=False
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
    use_lora: bool = option(False, "train LoRA adapters instead of all weights")
    lora_rank: int | None = option(None, "LoRA rank; default 64")
    lora_alpha: float | None = option(None, "LoRA alpha; default 16")
    lora_dropout: float | None = option(None, "LoRA dropout; default 0")
    lora_target_modules: list[str] | None = option(
        None, "module names that get an adapter; default all-linear (all but the head)"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs are trained and evaluated on, and how they become tokens."""

    mixer_list: list[str] | None = option(
        None, "training data: NAME AMOUNT [NAME AMOUNT ...]; an amount is a fraction (0.5) or a count of rows (1000)"
    )
    dataset_mixer: dict[str, str] | None = option(None, "the same as a YAML mapping NAME: AMOUNT")
    mixer_list_splits: list[str] = option(["train"], "one split for all datasets, or one for each: train, train[:90%]")
    eval_mixer_list: list[str] | None = option(None, "held-out data, written as mixer_list", shapes_result=False)
    eval_mixer_list_splits: list[str] = option(["train"], "splits of the held-out data", shapes_result=False)
    max_train_samples: int | None = option(None, "use at most so many training rows")
    max_seq_length: int = option(2048, "longest prompt + response, in tokens; longer responses lose their newest")
    max_prompt_length: int | None = option(
        None,
        "longest prompt, in tokens; longer ones lose their oldest. Default: what the longer response leaves of "
        "max_seq_length, and at least half of it",
    )
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise; default: the CPUs at hand", shapes_result=False
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference model and the cache of its log-probs."""

    reference_model_name_or_path: str | None = option(None, "reference model; default: the policy's initial weights")
    reference_model_revision: str | None = option(None, "Hub branch, tag or commit of the reference model")
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
    verify_reference_rows: int = option(
        4,
        "cached log-probs that are computed once more at the start and compared; 0: none, and a reference model with "
        "everything cached is not loaded",
        shapes_result=False,
    )
    reference_max_tokens_per_batch: int | None = option(
        None,
        "tokens of one forward pass of the reference, which keeps no activations; default 4 x max_tokens_per_batch on "
        "CUDA, max_tokens_per_batch on a CPU. If memory runs out it is halved and the pass goes on",
        shapes_result=False,
    )


Numbers = float | list[float | None] | None
Words = str | list[str | None] | None


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The preference loss, or a weighted mix. A parameter is one value for all that take it, or one for each loss."""

    loss_type: str | list[str] = option(
        "dpo", "a loss, or several to add up; docs/losses.md has all; or MODULE:FUNCTION"
    )
    loss_weights: float | list[float] | None = option(None, "weight of each loss in the mix; default 1")
    beta: Numbers = option(None, "strength of the pull to the reference, or the scale of the margin; default by loss")
    gamma: Numbers = option(None, "dpo_gamma, simpo: margin in reward units; default 0.5")
    delta: Numbers = option(None, "slic_dpo, hinge, slic: hinge margin in reward units; default 1")
    label_smoothing: Numbers = option(None, "share of labels taken to be wrong; default 0, exo_pair 0.001")
    reference_free: bool | list[bool | None] | None = option(None, "dpo: leave the reference out; default false")
    convention: Words = option(None, "which form of ipo, kto_pair, wpo, bco_pair or sft, see docs/losses.md")
    weight_clamp: bool | list[bool | None] | None = option(None, "wpo: keep pair weights at most 1; default false")
    lambda_sft: Numbers = option(None, "cpo, slic: weight of the likelihood term; default 1")
    sft_type: Words = option(None, "cpo, slic: likelihood per token or per instance; default token")
    nll: Words = option(None, "orpo: which likelihood is added; default token_mean_completion")
    discopop_tau: Numbers = option(None, "discopop: temperature of the modulation; default 0.05")
    f_divergence_type: Words = option(
        None, "reverse_kl, forward_kl, js_divergence or alpha_divergence, for losses built on log-ratios"
    )
    f_alpha_divergence_coef: Numbers = option(None, "alpha of alpha_divergence, in (0, 1]; default 0.5")
    ld_alpha: float | None = option(
        None,
        "LD-DPO: weight, 0 to 1, of the longer response's tokens beyond the shorter's length, in every log-prob "
        "that the loss reads; default 1",
    )
    load_balancing_loss: bool = option(
        False, "mixture-of-experts models: add transformers' load balancing loss, of each pack by its share of tokens"
    )
    load_balancing_weight: float | None = option(None, "weight of the load balancing loss; default 0.001")
    loss_parameters: dict[str, str] | None = option(None, "parameters of a loss of your own, NAME: NUMBER")

    @property
    def names(self) -> list[str]:
        """The losses of the mix."""
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    def mix(self) -> LossMix:
        """The losses with their parameters filled in. Raises ValueError with one line per problem."""
        problems: list[str] = []
        specs = [spec for name in self.names if (spec := _known_spec(name, problems)) is not None]
        weights = [1.0] * len(self.names) if self.loss_weights is None else self.loss_weights
        weights = [weights] if isinstance(weights, float) else weights
        if len(weights) != len(self.names):
            problems.append(f"loss_weights: gives {len(weights)} weights for {len(self.names)} losses")
        problems += [f"loss_weights: {weight:g} is not above 0" for weight in weights if not 0 < weight < float("inf")]
        parts: list[Loss] = []
        if len(specs) == len(self.names):
            given = self._given(specs, problems)
            for spec, values, weight in zip(specs, given, weights, strict=False):
                try:
                    parts.append(Loss(spec, spec.resolve(values), weight))
                except ValueError as error:
                    lines = str(error).splitlines()
                    problems += [x if x.startswith("loss_type") else f"loss_type {spec.name}: {x}" for x in lines]
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            problems.append(f"ld_alpha: must lie in [0, 1], got {self.ld_alpha:g}")
        if self.ld_alpha is not None and not all(spec.needs_rejected for spec in specs):
            problems.append("ld_alpha: needs both responses of a pair scored, which sft does not")
        if problems:
            raise ValueError("\n".join(problems))
        return LossMix(tuple(parts), 1.0 if self.ld_alpha is None else self.ld_alpha)

    def _given(self, specs: list[LossSpec], problems: list[str]) -> list[dict[str, Value]]:
        """The parameters that were set, by loss."""
        given: list[dict[str, Value]] = [{} for _ in specs]
        for name in LOSS_PARAMETERS:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(specs):
                problems.append(f"{name}: gives {len(value)} values for {len(specs)} losses; null leaves one out")
            elif isinstance(value, list):
                for values, item in zip(given, value, strict=True):
                    values |= {} if item is None else {name: item}
            elif value is not None:
                takers = [values for values, spec in zip(given, specs, strict=True) if name in spec.parameters]
                for values in takers or given[:1]:  # if none takes it, the first complains
                    values[name] = value
        for name, word in (self.loss_parameters or {}).items():
            own = [values for values, spec in zip(given, specs, strict=True) if spec.is_custom]
            if not own:
                problems.append(f"loss_parameters: {name} belongs to no loss of your own (MODULE:FUNCTION)")
            for values in own:
                try:
                    values[name] = float(word)
                except ValueError:
                    problems.append(f"loss_parameters: {name} is {word!r} but must be a number")
        return given

    def resolved(self) -> LossConfig:
        """The same losses with every parameter written out."""
        mix = self.mix()
        values: dict[str, Any] = {}
        for name in LOSS_PARAMETERS:
            by_part = [part.parameters.get(name) for part in mix.parts]
            if any(value is not None for value in by_part):
                values[name] = by_part[0] if len(by_part) == 1 else by_part
        if self.load_balancing_loss and self.load_balancing_weight is None:
            values["load_balancing_weight"] = 0.001
        return dataclasses.replace(self, **values)


_NO_PARAMETERS = (
    "loss_type",
    "loss_weights",
    "loss_parameters",
    "ld_alpha",
    "load_balancing_loss",
    "load_balancing_weight",
)
LOSS_PARAMETERS = tuple(f.name for f in dataclasses.fields(LossConfig) if f.name not in _NO_PARAMETERS)


def _known_spec(name: str, problems: list[str]) -> LossSpec | None:
    try:
        return loss_spec(name)
    except ValueError as error:
        problems.append(str(error))
        return None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer steps. The global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks pairs."""

    per_device_train_batch_size: int = option(4, "pairs, see gradient_accumulation_steps")
    gradient_accumulation_steps: int = option(
        8, "the global batch is per_device_train_batch_size x gradient_accumulation_steps x ranks, in pairs"
    )
    max_tokens_per_batch: int | None = option(
        None,
        "tokens of one forward pass, shared prompts counted once, padding included (a pair that needs more goes "
        "alone); default "
        "2 x per_device_train_batch_size x max_seq_length. "
        "Changes memory and speed, never a step's value",
        shapes_result=False,
    )
    group_pairs_by_prompt: bool = option(
        False,
        "draw whole prompts, so that a step holds all pairs of a prompt and computes each response once; a prompt is "
        "split between steps only if it is larger than a step or nothing that is left fits into a step's rest",
    )
    optimizer: Literal["adamw", "rmsprop", "sgd"] = option("adamw", "adamw, rmsprop or sgd")
    learning_rate: float = option(5e-7, "peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "linear, cosine, constant or constant_with_warmup"
    )
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = option(0.0, "decoupled weight decay of adamw; not on norms and biases")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    num_epochs: int = option(1, "passes over the training data")
    max_train_steps: int | None = option(None, "stop after so many optimizer steps")
    seed: int = option(42, "seed of the data order, dropout and new adapters")
    eval_steps: int | None = option(
        None, "evaluate every so many steps, besides before the first and after the last", shapes_result=False
    )
    logging_steps: int = option(1, "write metrics every so many steps", shapes_result=False)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    exp_name: str = option("dpo_tune_cache", "name of the run", shapes_result=False)
    output_dir: str | None = option(
        None, "folder of the model, metrics and checkpoints; default output/EXP_NAME", shapes_result=False
    )
    checkpointing_steps: int | None = option(None, "write a checkpoint every so many steps", shapes_result=False)
    keep_last_n_checkpoints: int = option(3, "older checkpoints are removed", shapes_result=False)
    resume_from_checkpoint: str | None = option(
        None, "auto: continue from output_dir's last checkpoint, if any; or a checkpoint's folder", shapes_result=False
    )
    save_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "precision of the saved model; auto: that of dtype. Checkpoints are always exact", shapes_result=False
    )
    with_tracking: bool = option(False, "log to Weights & Biases", shapes_result=False)
    wandb_project_name: str | None = option(None, "W&B project; default open_po", shapes_result=False)
    wandb_entity: str | None = option(None, "W&B team or user", shapes_result=False)
    push_to_hub: bool = option(False, "upload the final model to the Hugging Face Hub", shapes_result=False)
    hf_repo_id: str | None = option(None, "Hub repository, USER/NAME; default USER/EXP_NAME", shapes_result=False)
    hf_repo_revision: str | None = option(None, "Hub branch to upload to; default main", shapes_result=False)
    hf_private: bool | None = option(None, "make a new Hub repository private; default true", shapes_result=False)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reference": ReferenceConfig,
    "loss": LossConfig,
    "train": TrainConfig,
    "output": OutputConfig,
}
FIELDS: dict[str, tuple[str, dataclasses.Field[Any], Any]] = {
    f.name: (section, f, typing.get_type_hints(cls)[f.name])
    for section, cls in SECTIONS.items()
    for f in dataclasses.fields(cls)
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A checked and resolved configuration."""

    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig
    loss: LossConfig
    train: TrainConfig
    output: OutputConfig

    def flat(self) -> dict[str, Any]:
        """Every field's value by name."""
        return {name: getattr(getattr(self, section), name) for name, (section, _, _) in FIELDS.items()}

    def to_yaml(self) -> str:
        """The fields that have a value, as YAML that parses to this configuration."""
        return yaml.safe_dump({k: v for k, v in self.flat().items() if v is not None}, sort_keys=False)

    def result_fields(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run it continues."""
        return {name: value for name, value in self.flat().items() if FIELDS[name][1].metadata["shapes_result"]}
