"""A rude server costs a client the answers it is rude to, and no other: `suites.robustness.streams` in short."""

import asyncio

import pytest

from kvsuite.engines import stream
from suites.robustness import streams
from suites.robustness.rude import KINDS, whole

LATE = [name for name, (error, _) in KINDS.items() if error == "no token within"]
OTHERS = sorted({*KINDS} - {*LATE, "gigantic-event", "endless"})


@pytest.mark.parametrize(
    ("kinds", "streams_at_once", "patience"),
    [(2 * OTHERS, 6, {}), (LATE, len(LATE), {"first": 0.7, "between": 0.7})],
    ids=["others", "late"],
)
def test_no_answer_is_mixed_lost_or_doubled(kinds, streams_at_once, patience):
    """All kinds, one after the other: no rest of one reaches the next."""
    with streams.server(pace=0.001) as url:
        held = asyncio.run(streams.hold(url, iter(kinds), streams_at_once, patience))
    assert held.examples == []
    assert not any(held.wrong.values()), held.wrong
    assert held.kinds.keys() == {*kinds}
    assert held.asked == len(kinds)


def test_what_has_no_end_is_not_kept(monkeypatch):
    monkeypatch.setattr(stream, "LARGEST", 1 << 20)
    with streams.server(pace=0.0) as url:
        held = asyncio.run(streams.hold(url, iter(["gigantic-event", "endless", "normal"]), 1))
    assert held.examples == []
    assert {said.partition(" of more than")[0] for said in held.said.values()} == {
        "the server sent an event",
        "the server sent an answer",
        "right",
    }


def test_what_is_wrong_is_told():
    def judged(text, error="", kind="normal"):
        return streams.judged(kind, 7, streams.Reply("7", text=text, error=error))

    assert judged(whole(7)) == ""
    assert judged(whole(7)[:-5]) == "lost"
    assert judged(whole(7) + whole(7)) == "doubled"
    assert judged(whole(8)) == judged(whole(7)[:-6] + whole(8)[-6:]) == "mixed"
    assert judged(whole(7), "broke") == judged(whole(7), kind="reset") == "another end"
    assert judged(" 7·0 7·1", "the connection broke", "reset") == ""
    late = "no token within 60 s, and this client was 3.0 s late itself"
    assert (judged(" 7·0", late), judged(" 7·0", late, "stops")) == (streams.SHORT, "")
