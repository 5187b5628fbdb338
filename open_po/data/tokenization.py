"""From a parsed row to token ids: chat template, prompt boundary, EOS, truncation."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from open_po.config.data import KeptEnd, ScoredTurns
from open_po.data.formats import Message, MessagePair, RowError, TextPair, called, common_prefix_length
from open_po.data.turns import RESPONSES, Conversation, Runs, Turns, all_turns, tokens_in, within


@dataclass(frozen=True)
class PreferencePair:
    """Token ids of one prompt and its two responses, which are scored, if not for `turns`.

    No part is empty, but `rejected_ids` where there is none.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    turns: Turns = RESPONSES

    @property
    def scored_tokens(self) -> tuple[int, int, int]:
        """How many tokens of prompt, chosen and rejected are scored."""
        prompt, chosen, rejected = map(tokens_in, self.turns)
        return prompt, len(self.chosen_ids) - chosen, len(self.rejected_ids) - rejected


class Lost(NamedTuple):
    """Tokens that truncation took: of a prompt the oldest or the newest, of a response the newest."""

    prompt: int
    chosen: int
    rejected: int


class LeftOut(Exception):
    """A well-formed row that cannot train; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Truncation:
    """Length limits in tokens, and which of its tokens a prompt keeps that is too long."""

    max_seq_length: int
    max_prompt_length: int | None
    kept: KeptEnd = "keep_end"

    def __call__(self, pair: PreferencePair) -> PreferencePair:
        """`pair` within the limits: the prompt loses its oldest tokens or its newest, each response its newest.

        Without `max_prompt_length` a prompt gives way only as far as the longer response needs, and keeps at least
        half of `max_seq_length`.
        """
        longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
        limit = self.max_prompt_length
        if limit is None:
            limit = max(self.max_seq_length // 2, self.max_seq_length - longest)
        start = max(0, len(pair.prompt_ids) - limit) if self.kept == "keep_end" else 0
        prompt = pair.prompt_ids[start : start + limit]
        room = self.max_seq_length - len(prompt)
        turns = Turns(
            # The first token that is kept is predicted by nothing.
            within(pair.turns.prompt, start + 1, start + len(prompt), counted_from=start),
            *(within(runs, 0, room, counted_from=0) for runs in pair.turns[1:]),
        )
        return PreferencePair(prompt, pair.chosen_ids[:room], pair.rejected_ids[:room], turns)


def tokenise(
    pair: TextPair | MessagePair,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    scored_turns: ScoredTurns = "last",
) -> tuple[PreferencePair, Lost]:
    """Token ids of a pair, and how many it lost to truncation.

    The prompt's ids are the longest common prefix of tokenise(prompt), tokenise(prompt + chosen) and
    tokenise(prompt + rejected), if there is a rejected response; all that follows is the response, so the ids are those
    that the whole text has, whatever merges across the boundary. The response is scored, or with `scored_turns` "all"
    every turn of the assistant, in the prompt too, and of no one else; text has no turns. Raises RowError or LeftOut.
    """
    if pair.chosen == pair.rejected:
        raise LeftOut("identical responses")
    responses: list[Any] = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
    if any(map(_is_empty, responses)):
        raise LeftOut("empty response")
    if isinstance(pair, TextPair):
        texts = [pair.prompt, *(pair.prompt + response for response in responses)]
    else:
        opened = _render(tokenizer, pair.tools, pair.prompt, True)
        texts = [opened, *(_render(tokenizer, pair.tools, pair.prompt + response, False) for response in responses)]
    encoded = [_encode(text, tokenizer, isinstance(pair, TextPair)) for text in texts]
    prompt, *ids = _split(encoded)
    turns = RESPONSES
    if isinstance(pair, TextPair):
        ids = [_with_eos(response, tokenizer) for response in ids]
    elif scored_turns == "all":
        turns = _turns(pair, responses, len(prompt), texts[1:], encoded[1:], tokenizer)
    if not prompt:
        # Something must predict the response's first token.
        if tokenizer.bos_token_id is None:
            raise LeftOut("no prompt token before the response, and the tokenizer has no BOS")
        prompt = [cast(int, tokenizer.bos_token_id)]
    if not all(ids):
        raise LeftOut("empty response after the chat template")
    whole = PreferencePair(prompt, ids[0], ids[1] if len(ids) > 1 else [], turns)
    cut = truncation(whole)
    if cut.chosen_ids == cut.rejected_ids:
        raise LeftOut("identical responses after truncation")
    if not all(cut.scored_tokens[1 : 1 + len(ids)]):
        raise LeftOut("a response without a turn of the assistant, after truncation")
    lost = Lost(
        prompt=len(whole.prompt_ids) - len(cut.prompt_ids),
        chosen=len(whole.chosen_ids) - len(cut.chosen_ids),
        rejected=len(whole.rejected_ids) - len(cut.rejected_ids),
    )
    return cut, lost


KEY_DTYPE = np.dtype("V16")  # of arrays of response keys


def response_key(
    prompt_ids: Sequence[int], response_ids: Sequence[int], scored: Runs = (), skipped: Runs = ()
) -> bytes:
    """Name of "this response after this prompt", 16 bytes: what a cached log-prob is found by.

    `scored` of the prompt and `skipped` of the response as in `Turns`.
    """
    digest = hashlib.blake2b(np.asarray([len(prompt_ids)], dtype="<i8").tobytes(), digest_size=16)
    digest.update(np.asarray([*prompt_ids, *response_ids], dtype="<i4").tobytes())
    if scored or skipped:  # behind -1, which is no token
        ends = [end for run in (*scored, *skipped) for end in run]
        digest.update(np.asarray([-1, len(scored), *ends], dtype="<i4").tobytes())
    return digest.digest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything about the tokenizer that decides a pair's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        facts |= {"truncation": None, "padding": None}  # set by calls, and off whenever a pair is tokenised
    else:
        # Where its files lie makes no difference; what stands in them does, of which the vocabulary is not all.
        given = {name: value for name, value in tokenizer.init_kwargs.items() if not name.endswith(("_file", "_path"))}
        facts = [tokenizer.get_vocab(), given, _vocabulary_files(tokenizer)]
    settings = [tokenizer.special_tokens_map, tokenizer.split_special_tokens, tokenizer.chat_template]
    content = json.dumps([type(tokenizer).__name__, facts, settings], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Hashes of the files that a tokenizer in Python would be saved in, merges and scores among them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_vocabulary(folder)
        except NotImplementedError:  # it has none
            return []
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())]


def _is_empty(response: str | list[Message]) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any((message["content"] or "").strip() or message.get("tool_calls") for message in response)


def _turns(
    pair: MessagePair,
    answers: Sequence[list[Message]],
    boundary: int,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> Turns:
    """All turns of the assistant in a pair whose conversations, one for each of `answers`, are `texts`, as `ids`."""
    render = partial(_render, tokenizer, pair.tools)
    encode = partial(_encode, tokenizer=tokenizer, add_special_tokens=False)
    sides = [
        Conversation(pair.prompt + answer, text, side, render, encode)
        for answer, text, side in zip(answers, texts, ids, strict=True)
    ]
    return all_turns(len(pair.prompt), boundary, *sides)


def _render(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None, messages: Sequence[Message], opens: bool
) -> str:
    """Messages as text, with a generation prompt behind them if that `opens` an answer."""
    if tokenizer.chat_template is None:
        raise RowError("holds messages, but the tokenizer has no chat template; set chat_template_name (e.g. tulu)")
    try:
        text: Any = tokenizer.apply_chat_template(
            list(messages), tools=cast(Any, tools), tokenize=False, add_generation_prompt=opens
        )
    except (TemplateError, TypeError, ValueError, RecursionError) as error:
        raise RowError(f"is refused by the chat template ({' '.join(str(error).split())})") from error
    if any("tool_calls" in message for message in messages):
        _refuse_lost_calls(tokenizer, tools, messages, opens, text)
    return cast(str, text)


def _refuse_lost_calls(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None, messages: Sequence[Message], opens: bool, text: str
) -> None:
    """Raises RowError if the conversation's text would be the same without its tool calls, or lacks the name of one."""
    without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    same = False
    with suppress(TemplateError, TypeError, ValueError):  # a template that needs the calls
        same = text == tokenizer.apply_chat_template(
            without, tools=cast(Any, tools), tokenize=False, add_generation_prompt=opens
        )
    names = [called(call) or "" for message in messages for call in message.get("tool_calls", ())]
    if same or any(name not in text for name in names):
        raise RowError(
            "has tool calls, which the chat template leaves out; set another chat_template_name, a .jinja file that "
            "writes them"
        )


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold one: \ud83d without its other half
        raise RowError(f"holds {text[error.start]!a}, half a character and no text") from error
    # A chat template writes its special tokens itself.
    ids = cast(list[int], tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    # Where text begins with BOS and the tokenizer adds one, there would be two.
    twice = add_special_tokens and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if twice else ids


def _split(ids: list[list[int]]) -> list[list[int]]:
    """What a prompt and what follows with each response have in common, and what each response has besides."""
    shared = common_prefix_length(*ids)
    return [ids[1][:shared], *(whole[shared:] for whole in ids[1:])]


def _with_eos(response: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The response with one EOS at its end, whether its text had one, or the tokenizer adds it, or both, or neither."""
    eos = cast(int, tokenizer.eos_token_id)
    end = len(response)
    while end and response[end - 1] == eos:
        end -= 1
    return [*response[:end], eos]
