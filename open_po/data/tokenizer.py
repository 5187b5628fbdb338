"""The tokenizer of a run, and whether a reference model means the same by its ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from open_po.config import ModelConfig
from open_po.data.chat_templates import chat_template
from open_po.errors import UserError, first_line
from open_po.model_files import ModelSource, adapter_base


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer with its chat template. Raises UserError if it cannot be loaded or has no EOS."""
    name = config.tokenizer_name or config.model_name_or_path
    revision = None if config.tokenizer_name else config.model_revision
    source = ModelSource(name=name, revision=revision)
    source.refuse_missing("tokenizer_name" if config.tokenizer_name else "model_name_or_path")
    base = adapter_base(Path(name), config.trust_remote_code)
    if base is not None and not list(Path(name).glob("tokenizer*")):
        name, revision = base.name, base.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for a bad folder
        raise UserError(f"{name}: no tokenizer can be loaded ({first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: the tokenizer has no EOS token, so answers would never end; set eos_token in its "
            "tokenizer_config.json or choose another tokenizer_name"
        )
    if config.chat_template_name is not None:
        tokenizer.chat_template = chat_template(config.chat_template_name)
    return cast(PreTrainedTokenizerBase, tokenizer)


def refuse_other_vocabulary(source: ModelSource, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Raises UserError if the tokenizer that lies beside a reference model means other tokens by `ids`.

    A reference without a tokenizer is not refused: its own is not used for anything.
    """
    try:
        other = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        theirs, ours = ({number: token for token, number in t.get_vocab().items()} for t in (other, tokenizer))
    except Exception:  # see load_tokenizer
        return
    for number in sorted(theirs.keys() & ours.keys() & set(ids)):
        if theirs[number] != ours[number]:
            raise UserError(
                f"reference_model_name_or_path: {source.name} was trained with another tokenizer than the policy, id "
                f"{number} is {theirs[number]!r} there and {ours[number]!r} here; policy and reference must share one"
            )


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id rows are filled up with; it is never scored nor attended to, so EOS serves where there is no pad token."""
    return cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
