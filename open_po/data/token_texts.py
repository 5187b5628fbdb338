"""Token ids as text that a person can read, each token by itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what bytes that are no text by themselves are decoded to
_BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8: so many tokens may make one up
_HARD_TO_SEE = re.compile(r"(?<=\s) | (?=\s)| $")  # spaces beside other white space or at a token's end
_NAMES = {"\n": "↵\n", "\t": "⇥", "\r": "⟨CR⟩", "\u200d": "⟨ZWJ⟩", "\u00a0": "⟨NBSP⟩"}
_INVISIBLE = ("C", "Z")  # Unicode's categories: control and format characters, and white space


@dataclass(frozen=True)
class Piece:
    """A token; or the few that together make up a character, of which each holds some bytes."""

    ids: tuple[int, ...]
    text: str  # what they add to the decoded text
    name: str | None = None  # of a token that is written in no text: BOS, EOS, a template's role marker

    @property
    def shown(self) -> str:
        """The text with everything in it that is not seen otherwise.

        Tokens outside the text stand in ⟨⟩, without the <> that many of them have. A line break is `↵`, and the line
        ends there.
        """
        if self.name is not None:
            inner = re.fullmatch("<(.+)>", self.name, re.DOTALL)
            return f"⟨{visible(inner[1] if inner else self.name)}⟩"
        if not self.text:
            return "⟨no text⟩"
        return visible(self.text) if len(self.ids) == 1 else f"⟨{visible(self.text)}={len(self.ids)} tokens⟩"


def visible(text: str) -> str:
    """`text` with `␣` for spaces that would not be seen, and names for other white space and control characters."""
    spaced = _HARD_TO_SEE.sub("␣", text)
    return "".join(_NAMES.get(character) or _visible(character) for character in spaced)


def _visible(character: str) -> str:
    hidden = character != " " and unicodedata.category(character).startswith(_INVISIBLE)
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """`ids` as pieces, whose texts together are what the tokenizer decodes `ids` to.

    What a token adds is told by decoding it behind a piece before it, since a tokenizer may drop the space that a
    text begins with. Where truncation left half a character, some tokenizers decode the whole ones beside it to
    U+FFFD too; here they are kept.
    """
    outside = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)
    found: list[Piece] = []
    position = 0
    while position < len(ids):
        before = _context(found, tokenizer)
        end, text = _next(ids, position, before, tokenizer)
        taken = tuple(ids[position:end])
        name = cast(str, tokenizer.convert_ids_to_tokens(taken[0])) if taken[0] in outside else None
        found.append(Piece(taken, text, name))
        position = end
    return found


def _context(found: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens to decode the next ones behind: the last that are whole characters, which no byte can change."""
    whole = next((piece.ids for piece in reversed(found) if _HALF not in piece.text), None)
    return (whole or (cast(int, tokenizer.eos_token_id),)) if found else ()


def _next(ids: Sequence[int], start: int, before: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """Where the piece that begins at `start` ends, and its text: at the first token whose characters are whole."""

    def added(end: int) -> str:
        known, text = _decode(before, tokenizer), _decode([*before, *ids[start:end]], tokenizer)
        return text[len(known) :] if text.startswith(known) else _decode(ids[start:end], tokenizer)

    end, text = start + 1, added(start + 1)
    longer = end + 1
    # What comes out as half a character is one if later tokens change it or add nothing to it, else no text at all.
    while text.endswith(_HALF) and longer <= min(end + _BYTES_OF_A_CHARACTER - 1, len(ids)):
        later = added(longer)
        if later == text or not later.startswith(text):
            end, text = longer, later
        longer += 1
    return end, text


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
