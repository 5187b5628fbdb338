"""The section of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_po.config.field import option

Sharing = Literal["auto", "on", "off"]
LoraStart = Literal["new", "continue"]

# What `use_qlora` keeps frozen weights in, as arguments of transformers' BitsAndBytesConfig (arXiv 2305.14314).
FOUR_BIT: dict[str, str | bool] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy, its tokenizer and how it computes."""

    model_name_or_path: str = option("", "policy: a local folder or a Hub name")
    model_revision: str | None = option(None, "Hub branch, tag or commit of the policy")
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the policy's")
    tokenizer_revision: str | None = option(None, "Hub branch, tag or commit of tokenizer_name", needs="tokenizer_name")
    use_slow_tokenizer: bool = option(False, "the tokenizer's Python implementation, where it has one")
    chat_template_name: str | None = option(
        None, "chat template to use and save: 'tulu' or a .jinja file; default: the tokenizer's own"
    )
    trust_remote_code: bool = option(False, "run model code that comes with a Hub repository")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute precision; auto: bfloat16 on CUDA, else float32. What is trained: see weights_dtype"
    )
    weights_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "precision of trained weights; auto: bfloat16 if they compute in it and small updates of such weights are "
        "kept, by the optimizer (adamw_kahan, adamw_sr, adamw_8bit) or in float32 weights on the host "
        "(offload_optimizer without DeepSpeed), else float32. Adapters are always float32",
        scores=False,
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, slower",
        shapes_result=False,
        scores=False,
    )
    gradient_checkpointing_every: int = option(
        1,
        "recompute every n-th layer only; 1: all of them",
        above=0,
        needs="gradient_checkpointing",
        shapes_result=False,
        scores=False,
    )
    offload_activations: bool = option(
        False,
        "keep activations in host memory until the backward pass; with gradient_checkpointing the layers' inputs, for "
        "very long rows",
        shapes_result=False,
        scores=False,
    )
    mlp_tile_tokens: int | None = option(
        None,
        "compute each layer's MLP for so many tokens at a time, and again in the backward pass: less memory with very "
        "long rows, slower",
        above=0,
        shapes_result=False,
        scores=False,
    )
    use_liger_kernel: bool | None = option(
        None, "Liger's Triton kernels for head, RMSNorm, RoPE and SwiGLU; default: on CUDA"
    )
    torch_compile: bool = option(
        False, "compile each layer with torch.compile: faster on CUDA, after a minute or so of compiling"
    )
    prompt_sharing: Sharing = option(
        "auto",
        "compute a prompt once for all its responses; auto: if the model's scores stay those of its own forward, which "
        "is checked at the start; on: or stop",
        shapes_result=False,
    )
    use_lora: bool = option(False, "train LoRA adapters instead of all weights", scores=False)
    lora_start: LoraStart = option(
        "new",
        "of a policy that is a folder of adapters: new: these are merged into their base and new ones trained on top; "
        "continue: they are trained on, and the reference is what they were",
        needs="use_lora",
        scores=False,
    )
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
    use_rslora: bool = option(
        False,
        "scale adapters by alpha / sqrt(rank), not alpha / rank (arXiv 2312.03732)",
        needs="use_lora",
        scores=False,
    )
    use_dora: bool = option(
        False,
        "train the norm of each row of a weight apart from its direction (DoRA, arXiv 2402.09353); slower",
        needs="use_lora",
        scores=False,
    )
    use_qlora: bool = option(
        False,
        "use_lora, with linear layers but the head frozen in 4 bits (NF4, double quantisation; needs bitsandbytes); "
        "also of a reference model and in score",
    )
