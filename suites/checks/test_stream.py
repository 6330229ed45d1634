"""What a server says while it answers, however its bytes are cut."""

import json

from hypothesis import given
from hypothesis import strategies as st

from kvsuite.engines.request import Reply
from kvsuite.engines.stream import Events, StreamParser

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))
OTHER = st.lists(st.sampled_from([b": a comment", b"id: 7", b"event: message", b"retry"]), max_size=2)


@st.composite
def streams(draw):
    """Events, and one way to write them."""
    events, stream = [], b""
    for parts in draw(st.lists(st.lists(TEXT, min_size=1, max_size=2), max_size=6)):
        end = draw(st.sampled_from([b"\n", b"\r\n"]))
        lines = draw(OTHER)
        for part in parts:
            blank = b" " if part.startswith(" ") or draw(st.booleans()) else b""
            lines += [b"data:" + blank + part.encode(), *draw(OTHER)]
        stream += b"".join(line + end for line in [*lines, b"", *[b""] * draw(st.integers(0, 1))])
        events.append("\n".join(parts).encode())
    return [event for event in events if event], stream


def test_thoughts_and_calls_are_counted_too():
    heard = StreamParser(Reply("a"))
    for delta in (
        {"reasoning": "hm "},
        {"content": "so "},
        {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ):
        heard.hear(json.dumps({"choices": [{"delta": delta}]}).encode(), 1.0)
    assert heard.close() == "hm so f{}"
    assert (heard.reply.reasoning, heard.reply.text, heard.reply.tool_calls) == ("hm ", "so ", "f{}")


@given(streams(), st.data())
def test_any_cut_of_a_stream_gives_the_same_events(written, data):
    events, stream = written
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    for ends in ([*cuts, len(stream)], range(1, len(stream) + 1), [len(stream)]):
        parser, found = Events(), []
        for start, stop in zip([0, *ends], ends, strict=False):
            found += parser.feed(stream[start:stop])
        assert found == events
