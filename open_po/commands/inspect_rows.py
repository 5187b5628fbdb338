"""A pair as the model sees it, token by token, for the console."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from open_po.config.data import KeptEnd
from open_po.data import PairDataset
from open_po.data.examples import Example
from open_po.data.token_texts import Piece, pieces
from open_po.data.turns import Runs, tokens_in

_SHOWN = 240  # pieces of a prompt or a response, half of them from its beginning, half from its end
_BETWEEN = "┊"  # tokens, where no colours show where one ends
_SPECIAL, _CUT, _SKIPPED = "bold black on #ffd75f", "bold black on #ff8f5f", "italic dim"
_RUN = "bold #ffd75f"
# A heading's colour, and those that the tokens below it have in turn.
COLOURS = {
    "prompt": ("#5fafff", "white on #1f3b5c", "white on #30608f"),
    "chosen": ("#5fd787", "white on #1d4a2a", "white on #2f7a47"),
    "rejected": ("#ff8787", "white on #5c2323", "white on #913c3c"),
}


def _shows_shades(console: Console) -> bool:
    """Whether colours alone can tell tokens apart."""
    return console.color_system in ("256", "truecolor") and not console.no_color


class Legend:
    """How to read the rows below."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        between = (
            "a change of shade is a token's end" if _shows_shades(console) else f"{_BETWEEN} stands between tokens"
        )
        yield Text(
            f"{between}; ⟨...⟩ a special or an added token, ␣ a space at a token's end or beside another one, ↵ a line "
            "break, ⇥ a tab, ⟨é=2 tokens⟩ a character of several tokens, \ufffd bytes that are no whole character",
            style="dim",
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pair with its heading; `full` shows every token of it."""

    number: int
    example: Example
    dataset: PairDataset
    tokenizer: PreTrainedTokenizerBase
    full: bool
    kept: KeptEnd = "keep_end"  # of prompts that are too long
    unused: frozenset[str] = frozenset()  # sides that the loss does not train on

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        index = self.example.index
        yield Text(f"Row {self.number}: {self.dataset.origin(index)}", style="bold")
        yield Text(f"shown because {'; '.join(self.example.reasons)}", style="dim")
        pair = self.dataset[index]
        lost = self.dataset.lost[index].tolist()
        parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        for name, ids, cut, runs in zip(COLOURS, parts, lost, pair.turns, strict=True):
            if ids:
                yield from self._part(name, ids, cut, runs, shaded=_shows_shades(console))
        yield Text()

    def _part(self, name: str, ids: list[int], cut: int, runs: Runs, *, shaded: bool) -> Iterator[RenderableType]:
        """A heading and the tokens; `runs` of them are scored in a prompt, and are not in a response."""
        heading = COLOURS[name][0]
        oldest_go = name == "prompt" and self.kept == "keep_end"
        title = Text(f"{name}, {_tokens(len(ids))}", style=f"bold {heading}")
        if cut:
            title.append(f", {_tokens(cut, 'older' if oldest_go else 'newer')} cut", style="bold #ff8f5f")
        if runs:
            title.append(f", {tokens_in(runs):,} of them {'' if name == 'prompt' else 'not '}scored, in ⟦⟧")
        if name in self.unused:
            title.append(", not trained on by this loss", style="dim")
        yield Rule(title, align="left", style=heading)
        text = Text()
        if cut and oldest_go:
            text.append(f"⟪{_tokens(cut)} cut here⟫", style=_CUT)
        self._write(text, pieces(ids, self.tokenizer), name, runs, shaded=shaded)
        if cut and not oldest_go:
            text.append(f"⟪{_tokens(cut)} cut here⟫", style=_CUT)
        if text.plain.endswith("\n"):
            text.right_crop(1)
        yield text

    def _write(self, text: Text, found: list[Piece], name: str, runs: Runs, *, shaded: bool) -> None:
        half, place = _SHOWN // 2, 0
        skipped = range(0) if self.full or len(found) <= _SHOWN else range(half, len(found) - half)
        previous: Piece | None = None
        for position, piece in enumerate(found):
            first, place = place, place + len(piece.ids)
            if position in skipped:
                if position == skipped.start:
                    count = sum(len(found[i].ids) for i in skipped)
                    text.append(f"\n... {_tokens(count)} not shown here, --full shows them ...\n", style=_SKIPPED)
                    previous = None
                continue
            if not shaded and previous is not None and previous.name is None and piece.name is None:
                text.append(_BETWEEN, style="dim")
            style = COLOURS[name][1 + position % 2] if piece.name is None else _SPECIAL
            if any(first <= start < place for start, _ in runs):
                text.append("⟦", style=_RUN)
            text.append(piece.shown, style=style if shaded else "")
            if any(first < end <= place for _, end in runs):
                text.append("⟧", style=_RUN)
            previous = piece


def _tokens(count: int, which: str = "") -> str:
    return f"{count:,} {which + ' ' if which else ''}token{'' if count == 1 else 's'}"
