"""All turns of the assistant in a conversation with one answer: those of a pair with the same chosen one."""

from __future__ import annotations

from pathlib import Path

from open_po.data.chat_templates import chat_template
from open_po.data.formats import row_reader
from open_po.data.tokenization import Truncation, tokenise
from tests import tiny


def test_they_are_those_of_a_pairs_chosen_response(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = chat_template("tulu")
    texts = ["red", "blue cat", "the dog", "small"]
    conversation = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    rejected = [*conversation[:-1], {"role": "assistant", "content": "large"}]
    (single,) = row_reader(None, None)({"messages": conversation})
    (both,) = row_reader(None, None)({"chosen": conversation, "rejected": rejected})
    for limits in (Truncation(1000, None), Truncation(40, 20)):
        (one, lost), (two, lost_of_two) = (tokenise(pair, tokenizer, limits, "all") for pair in (single, both))
        assert (one.prompt_ids, one.chosen_ids, one.rejected_ids) == (two.prompt_ids, two.chosen_ids, [])
        assert one.turns == two.turns
        assert one.turns.prompt or limits.max_prompt_length
        assert one.scored_tokens == (*two.scored_tokens[:2], 0)
        assert lost[:2] == lost_of_two[:2]
