"""HTML as text: tags are removed, but for `<code>`, which tells code from prose."""

from __future__ import annotations

from html.parser import HTMLParser

from open_po.data.formats.pairs import RowError

_VOID = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"]
)
_BLOCKS = frozenset(
    ["p", "pre", "ul", "ol", "li", "dl", "dt", "dd", "blockquote", "div", "table", "tr", "hr"]
    + [f"h{level}" for level in range(1, 7)]
)


def all_text(html: str) -> str:
    """All text, a blank line between paragraphs, headings, items of lists and blocks of code; code in `<code>`."""
    return _joined(_AllText(), html)


def paragraphs_and_code(html: str) -> str:
    """What the DPO paper's code keeps: the text that stands directly in a paragraph, and code of its own.

    Text within other tags (emphasis, links, code amid a paragraph), lists, quotations and headings are lost.
    """
    return _joined(_ParagraphsAndCode(), html)


def _joined(parser: _Blocks, html: str) -> str:
    try:
        parser.feed(html)
        parser.close()
    except AssertionError as error:  # the parser's way with a declaration that it does not know
        raise RowError(f"has text that is no HTML ({error})") from error
    parser.end_block()
    return "\n\n".join(parser.blocks)


class _Blocks(HTMLParser):
    """Pieces of text, collected block by block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._pieces: list[str] = []

    def end_block(self) -> None:
        text, self._pieces = "".join(self._pieces), []
        if text.strip():
            self.blocks.append(text)


class _AllText(_Blocks):
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.end_block()
        elif tag == "code":
            self._pieces.append("<code>")
        elif tag == "br":
            self._pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.end_block()
        elif tag == "code":
            self._pieces.append("</code>")

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)


class _ParagraphsAndCode(_Blocks):
    def __init__(self) -> None:
        super().__init__()
        self._open: list[str] = []  # tags, the outermost first

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        self._open.append(tag)
        if self._begins():
            self._pieces = []

    def _begins(self) -> bool:
        """Whether the tag that is open last begins a block: a paragraph, or code that is not amid a paragraph."""
        return self._open in (["p"], ["code"]) or (
            self._open[0] == "pre" and self._open[-1] == "code" and self._open.count("code") == 1
        )

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open:
            if self._close() == tag:
                return

    def _close(self) -> str:
        if self._begins():
            text, self._pieces = "".join(self._pieces), []
            self.blocks.append(text if self._open[-1] == "p" else f"<code>{text}</code>")
        return self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open == ["p"] or (self._open and self._open[0] in ("pre", "code") and "code" in self._open):
            self._pieces.append(data)

    def end_block(self) -> None:
        while self._open:
            self._close()
