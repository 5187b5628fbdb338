"""Keys in arrays beside dictionaries and sets of them, also such as share their first half."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from open_po.data.keys import key_numbers, may_be_shared

halves = st.sampled_from([bytes(8), b"\xff" * 8, b"abcdefgh", b"abcdefg\0"])
keys = st.tuples(halves, halves).map(b"".join)


@given(st.lists(keys, max_size=20))
def test_numbers(given_keys: list[bytes]) -> None:
    found: dict[bytes, int] = {}
    expected = [found.setdefault(key, len(found)) for key in given_keys]
    assert key_numbers(np.array(given_keys, dtype="V16")).tolist() == expected


@given(st.lists(keys, max_size=12), st.lists(keys, max_size=12))
def test_shared(mine: list[bytes], theirs: list[bytes]) -> None:
    """What is shared is found, and of the rest only what shares a first half with the others."""
    found = may_be_shared(np.array(mine, dtype="V16"), np.array(theirs, dtype="V16"))
    for hits, of, others in zip(found, (mine, theirs), (theirs, mine), strict=True):
        assert hits.tolist() == [key[:8] in {other[:8] for other in others} for key in of]
