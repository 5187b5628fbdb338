"""The tokenizer of a run, and whether a reference model means the same by its ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from open_po.config import ModelConfig
from open_po.data.chat_templates import CHAT_TEMPLATES, chat_template
from open_po.errors import UserError, first_line
from open_po.model_files import ModelSource, adapter_base


def load_tokenizer(config: ModelConfig, *, add_bos: bool = False) -> PreTrainedTokenizerBase:
    """The run's tokenizer with its chat template, with BOS before it if that is to be added.

    Raises UserError if it cannot be loaded, has no EOS, or cannot have a BOS added.
    """
    name = config.tokenizer_name or config.model_name_or_path
    revision = config.tokenizer_revision or (None if config.tokenizer_name else config.model_revision)
    source = ModelSource(name=name, revision=revision)
    source.refuse_missing("tokenizer_name" if config.tokenizer_name else "model_name_or_path")
    base = adapter_base(Path(name), config.trust_remote_code)
    if base is not None and not list(Path(name).glob("tokenizer*")):
        name, revision = base.name, config.tokenizer_revision or base.revision
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
    if add_bos:
        _add_bos(tokenizer, config.chat_template_name)
    return cast(PreTrainedTokenizerBase, tokenizer)


def _add_bos(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Put BOS before the chat template, which is the one that is called `name`, if it has a name."""
    if tokenizer.bos_token is None:
        raise UserError(
            "add_bos: the tokenizer has no BOS token; set bos_token in its tokenizer_config.json or leave add_bos out"
        )
    if tokenizer.chat_template is None:
        raise UserError("add_bos: the tokenizer has no chat template to put BOS before; set chat_template_name")
    # Some tokenizers have several templates, by name.
    several = isinstance(tokenizer.chat_template, dict)
    templates: dict[str, str] = tokenizer.chat_template if several else {"": tokenizer.chat_template}
    begins = [_begins_with_bos(tokenizer, template) for template in templates.values()]
    if name in CHAT_TEMPLATES and all(begins):
        return  # which is what is asked for
    if any(begins):
        raise UserError(
            "add_bos: the chat template begins with BOS itself, so that there would be two; leave add_bos out"
        )
    with_bos = {key: "{{ bos_token }}" + template for key, template in templates.items()}
    tokenizer.chat_template = with_bos if several else with_bos[""]


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    bos = cast(str, tokenizer.bos_token)
    if re.match(r"\s*\{\{-?\s*bos_token\b", template) or template.startswith(bos):
        return True
    conversation = [{"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError):  # it wants other conversations
        return False
    return cast(str, text).startswith(bos)


def no_slow_tokenizer(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A line if a tokenizer in Python is asked for and there is none."""
    if not config.use_slow_tokenizer or not tokenizer.is_fast:
        return None
    return f"use_slow_tokenizer: has no effect, transformers has one {type(tokenizer).__name__}, which is the fast one"


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A line if the chat template writes the day into a prompt, so that the same rows are others on another day."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return None
    return (
        "the chat template writes the day into prompts of messages; rows keep the day on which they were tokenised, "
        "and would differ if tokenised anew on another; chat_template_name can name a file with a fixed one"
    )


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
