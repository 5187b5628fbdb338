"""The layouts that rows of data may have, all read into one: a prompt and its responses.

`catalogue.py` has an entry for each, with the columns it is found by; the functions that read them stand by family in
`texts.py`, `messages.py`, `forums.py` and `unpaired.py`. `row_reader` is what reads the rows of a data set.
"""

from open_po.data.formats.catalogue import FORMATS
from open_po.data.formats.messages import called
from open_po.data.formats.pairs import (
    Message,
    MessagePair,
    Pair,
    RowError,
    TextPair,
    common_prefix_length,
)
from open_po.data.formats.reader import RowReader, row_reader

__all__ = [
    "FORMATS",
    "Message",
    "MessagePair",
    "Pair",
    "RowError",
    "RowReader",
    "TextPair",
    "called",
    "common_prefix_length",
    "row_reader",
]
