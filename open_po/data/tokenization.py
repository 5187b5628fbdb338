"""From a parsed row to token ids: chat template, prompt boundary, EOS, truncation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from open_po.data.formats import Message, MessagePair, RowError, TextPair, called, common_prefix_length


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of one prompt and its two responses. No part is empty, but `rejected_ids` where there is none."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Lost(NamedTuple):
    """Tokens that truncation took: a prompt's oldest, a response's newest."""

    prompt: int
    chosen: int
    rejected: int


class LeftOut(Exception):
    """A well-formed row that cannot train; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Truncation:
    """Length limits in tokens."""

    max_seq_length: int
    max_prompt_length: int | None

    def __call__(self, pair: PreferencePair) -> PreferencePair:
        """`pair` within the limits: the prompt loses its oldest tokens, each response its newest.

        Without `max_prompt_length` a prompt gives way only as far as the longer response needs, and keeps at least
        half of `max_seq_length`.
        """
        longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
        limit = self.max_prompt_length
        if limit is None:
            limit = max(self.max_seq_length // 2, self.max_seq_length - longest)
        prompt = pair.prompt_ids[-limit:]
        room = self.max_seq_length - len(prompt)
        return PreferencePair(prompt, pair.chosen_ids[:room], pair.rejected_ids[:room])


def tokenise(
    pair: TextPair | MessagePair, tokenizer: PreTrainedTokenizerBase, truncation: Truncation
) -> tuple[PreferencePair, Lost]:
    """Token ids of a pair, and how many it lost to truncation.

    The prompt's ids are the longest common prefix of tokenise(prompt), tokenise(prompt + chosen) and
    tokenise(prompt + rejected), if there is a rejected response; all that follows is the response, scored, so the ids
    are those that the whole text has, whatever merges across the boundary. Raises RowError or LeftOut.
    """
    if pair.chosen == pair.rejected:
        raise LeftOut("identical responses")
    responses: list[Any] = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
    if any(map(_is_empty, responses)):
        raise LeftOut("empty response")
    if isinstance(pair, TextPair):
        texts = [pair.prompt, *(pair.prompt + response for response in responses)]
    else:
        opened = _render(pair, pair.prompt, tokenizer, opens=True)
        texts = [opened, *(_render(pair, pair.prompt + response, tokenizer) for response in responses)]
    prompt, *ids = _split([_encode(text, tokenizer, isinstance(pair, TextPair)) for text in texts])
    if isinstance(pair, TextPair):
        ids = [_with_eos(response, tokenizer) for response in ids]
    if not prompt:
        # Something must predict the response's first token.
        if tokenizer.bos_token_id is None:
            raise LeftOut("no prompt token before the response, and the tokenizer has no BOS")
        prompt = [cast(int, tokenizer.bos_token_id)]
    if not all(ids):
        raise LeftOut("empty response after the chat template")
    whole = PreferencePair(prompt, ids[0], ids[1] if len(ids) > 1 else [])
    cut = truncation(whole)
    if cut.chosen_ids == cut.rejected_ids:
        raise LeftOut("identical responses after truncation")
    lost = Lost(
        prompt=len(whole.prompt_ids) - len(cut.prompt_ids),
        chosen=len(whole.chosen_ids) - len(cut.chosen_ids),
        rejected=len(whole.rejected_ids) - len(cut.rejected_ids),
    )
    return cut, lost


KEY_DTYPE = np.dtype("V16")  # of arrays of response keys


def response_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
    """Name of "this response after this prompt", 16 bytes: what a cached log-prob is found by."""
    digest = hashlib.blake2b(np.asarray([len(prompt_ids)], dtype="<i8").tobytes(), digest_size=16)
    digest.update(np.asarray([*prompt_ids, *response_ids], dtype="<i4").tobytes())
    return digest.digest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything about the tokenizer that decides a pair's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        facts |= {"truncation": None, "padding": None}  # set by calls, and off whenever a pair is tokenised
    else:
        facts = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    settings = [tokenizer.special_tokens_map, tokenizer.split_special_tokens, tokenizer.chat_template]
    content = json.dumps([type(tokenizer).__name__, facts, settings], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _is_empty(response: str | list[Message]) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any((message["content"] or "").strip() or message.get("tool_calls") for message in response)


def _render(
    pair: MessagePair, messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, opens: bool = False
) -> str:
    """Messages as text, with a generation prompt behind them if that `opens` an answer."""
    if tokenizer.chat_template is None:
        raise RowError("holds messages, but the tokenizer has no chat template; set chat_template_name (e.g. tulu)")
    try:
        text: Any = tokenizer.apply_chat_template(
            messages, tools=cast(Any, pair.tools), tokenize=False, add_generation_prompt=opens
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise RowError(f"is refused by the chat template ({' '.join(str(error).split())})") from error
    if any(called(call) not in text for message in messages for call in message.get("tool_calls", ())):
        raise RowError("has tool calls, which the chat template leaves out; set another chat_template_name")
    return cast(str, text)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold one: \ud83d without its other half
        raise RowError(f"holds {text[error.start]!a}, half a character and no text") from error
    # A chat template writes its special tokens itself.
    return cast(list[int], tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _split(ids: list[list[int]]) -> list[list[int]]:
    """What a prompt and what follows with each response have in common, and what each response has besides."""
    shared = common_prefix_length(*ids)
    return [ids[1][:shared], *(whole[shared:] for whole in ids[1:])]


def _with_eos(response: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = cast(int, tokenizer.eos_token_id)
    return response if response and response[-1] == eos else [*response, eos]
