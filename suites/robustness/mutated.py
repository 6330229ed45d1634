"""Hostile inputs out of valid ones: bytes that are cut, doubled and replaced, and JSON with strange values."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP = 100_000
"""Brackets within brackets."""
LONG = "9" * 5000
"""More digits than Python reads as an integer."""
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 2**63, 10**400, 1e308, -0.0, math.nan, math.inf),
    *("\n## forged\n\n| int8 | use it |", "<img src=x onerror=y> ![a](http://b) `</script>", "](http://b)"),
    *("", "x", "\x1b[2J\x1b]0;owned\x07", "../../x", "\ud800", "a\0b", "nan", LONG, "k" * 5000, "{" * 50),
    *([], {}, [None], [[]], [{}], ["x"], [0.5], [True, 10**400], {"": 0}, {"a": {"b": []}}, {"args": 1}, [1e308] * 3),
)
"""Values that a place in a JSON document may get instead of its own."""
WORDS = (
    *(
        b"",
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\x1b[2J",
        b"\n",
        b"\r\n",
        b"\r",
        b",",
        b'"',
        b"'",
        b"\\",
        b"=",
        b":",
        b"#",
    ),
    *(b"[" * DEEP, b'{"a":' * DEEP, b"{", b"}", b"]", b"1e999", b"-1", b"NaN", b"null", b"true", LONG.encode()),
    *("é😀\u2028".encode(), b"../..", b"a" * 70_000, b"(" * 300, b"\xef\xbb\xbf", b"%", b"*", b"?", b"~", b"$(x)"),
    *(bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 3, b"\x01\0\0\0"),
)
"""Bytes that are put where others were."""
SPANS = (0, 0, 1, 2, 4, 16, 200, 1 << 30)
"""How many bytes they replace."""


EDITS = (0, 1, 1, 2, 3)


@st.composite
def data(draw: Any, seeds: tuple[bytes, ...], words: tuple[bytes, ...] = ()) -> bytes:
    """Of valid bytes up to three places are replaced by words or by chance."""
    found = draw(st.sampled_from(seeds))
    pieces = st.sampled_from(WORDS + words) if words == () else st.sampled_from(WORDS) | st.sampled_from(words)
    for _ in range(draw(st.sampled_from(EDITS))):
        at, span = draw(st.integers(0, len(found))), draw(st.sampled_from(SPANS))
        found = found[:at] + draw(pieces | st.binary(max_size=8)) + found[at + span :]
    return found


@st.composite
def documents(draw: Any, seeds: tuple[Any, ...]) -> Any:
    """Of valid JSON up to three places are left out, doubled or get strange values."""
    found = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from(EDITS))):
        places = list(_places(found))
        if not places:
            return draw(st.sampled_from(STRANGE))
        inside, key = draw(st.sampled_from(places))
        what = draw(st.integers(0, 9))
        if what == 0:
            del inside[key]
        elif what == 1 and isinstance(inside, list):
            inside.append(inside[key])
        elif what == 1:
            inside[draw(st.sampled_from(("x", "type", "kind", "\x1b[2J")))] = inside[key]
        else:
            inside[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
    return found


def texts(seeds: tuple[Any, ...], words: tuple[bytes, ...] = ()) -> st.SearchStrategy[bytes]:
    """JSON documents as bytes, strange as values or as bytes."""
    written = tuple(json.dumps(seed).encode() for seed in seeds)
    return documents(seeds).map(lambda found: json.dumps(found).encode()) | data(written, words)


def lines(seeds: tuple[Any, ...]) -> st.SearchStrategy[bytes]:
    """Several of them, one a line."""
    rows = documents(seeds).map(lambda found: json.dumps(found).encode())
    whole = b"\n".join(json.dumps(seed).encode() for seed in seeds) + b"\n"
    return st.lists(rows, min_size=1, max_size=4).map(lambda found: b"\n".join(found) + b"\n") | data((whole,))


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(found, (dict, list)):
        for key in list(found) if isinstance(found, dict) else range(len(found)):
            yield found, key
            yield from _places(found[key])
