"""Bytes of a pool as a fixed part and a slope: planted numbers are found, and what cannot be told is not said."""

from dataclasses import replace

import pytest

from kvsuite.analysis.pools import lines
from kvsuite.analysis.report import analyse
from kvsuite.analysis.serving import stored, told
from kvsuite.records import Probe
from suites.checks.planted import AGAIN, BASE, M, loads, run

BLOCK, TOKEN, FIXED = 16, 1000, 5_000_000


def said(method, tokens, token=TOKEN, fixed=FIXED, spare=0.0, **more):
    """A pool of so many whole blocks; ``spare``: the part of a block for which its bytes would do besides."""
    facts = {"kv_dtype": "auto", "compressed": False, "block_size": BLOCK, "kv_tokens": tokens, "features": {}}
    return Probe(method, profile="vllm", facts=facts | {"kv_bytes": fixed + token * (tokens + spare * BLOCK)} | more)


def test_a_planted_line_is_found():
    found = lines([said("a", 4096), said("b", 8192), said("a", 4096), said("c", 16384)])
    assert found.keys() == {"a", "b", "c"}
    assert len(set(found.values())) == 1, "all are of one kind of pool"
    line = found["a"]
    assert line.pools == ((4096, FIXED + TOKEN * 4096), (16384, FIXED + TOKEN * 16384))
    assert (line.slope, line.fixed) == (TOKEN, FIXED)


@pytest.mark.parametrize("spares", [(0.0, 0.99), (0.99, 0.0), (0.5, 0.99), (0.99, 0.99)])
def test_what_whole_blocks_leave_open_holds_the_truth(spares):
    probes = [said("a", tokens, spare=spare) for tokens, spare in zip((1600, 6400), spares, strict=True)]
    line = lines(probes)["a"]
    (least, most), (less, more) = line.open
    assert least <= TOKEN <= most
    assert less <= FIXED <= more
    assert least <= line.slope <= most
    assert most / least < 1.01


@pytest.mark.parametrize(
    "probes",
    [
        [said("a", 4096)],
        [said("a", 4096), said("b", 4096)],
        [said("a", 4096), said("b", 4096 + 39 * BLOCK)],
        [said("a", 4096), said("b", 8192, kv_dtype="fp8")],
        [said("a", 4096), said("b", 8192, compressed=True)],
        [said("a", 4096), said("b", 8192, block_size=32)],
        [said("a", 4096), said("b", 8192, features={"speculative decoding": "ngram"})],
        [said("a", 4096), replace(said("b", 8192), profile="sglang")],
        [said("a", 4096), replace(said("b", 8192), status="failed")],
        [said("a", 4096, block_size=None), said("b", 8192, block_size=None)],
        [said("a", 4096), said("b", 8192, kv_bytes=None)],
        [said("a", 4096), said("b", 8192, kv_bytes="some")],
        [said("a", 4096), said("b", 8192, fixed=-FIXED)],
    ],
)
def test_one_pool_or_pools_of_two_kinds_give_no_line(probes):
    assert lines(probes) == {}


def test_a_pool_set_by_hand_counts_as_that_which_would_have_fitted():
    hand = said("a", 64, blocks_set=4, blocks_fit=256, kv_bytes=FIXED + TOKEN * 256 * BLOCK)
    line = lines([hand, said("b", 8192)])["a"]
    assert (line.slope, line.fixed) == (TOKEN, FIXED)


def arms(*probes):
    return run(list(probes), loads())


def test_the_slope_is_what_is_compared_and_derived_is_what_one_pool_says(tmp_path):
    """With a fixed part, bytes over tokens are no token's bytes: 2,221 where a token takes 1,000."""
    fp8 = {"kv_dtype": "fp8", "compressed": True, "token": TOKEN / 2}
    four = arms(said(BASE, 4096), said(AGAIN, 8192), said(M, 4096, **fp8), said(M, 8192, **fp8))
    assert stored(four)[M] == pytest.approx(0.5)
    mine = next(s for s in told(four) if s.method == M)
    assert mine.proof == "500 bytes a token, the baseline 1,000"
    one = arms(said(BASE, 4096), said(M, 4096, **fp8))
    assert stored(one)[M] == pytest.approx((FIXED + 500 * 4096) / (FIXED + 1000 * 4096))
    assert next(s for s in told(one) if s.method == M).proof.endswith(
        "derived: the bytes of a pool over the tokens that fit into it"
    )
    half = arms(said(BASE, 4096), said(AGAIN, 8192), said(M, 4096, **fp8, fixed=0))
    assert "derived" in next(s for s in told(half) if s.method == M).proof, "a line of one of them is not enough"
    [table] = [t for t in analyse(four).tables if t.key == "servers"]
    notes = [note.text for note in table.notes]
    assert (
        "baseline, baseline again: 1,000 bytes a token (996 to 1,004) and 4.8 MiB besides (4.7 to 4.8), by the line "
        "through pools of 4,096 and 8,192 tokens; in brackets what blocks of 16 tokens leave open." in notes
    )
    assert any(note.startswith("m: 500 bytes a token (") for note in notes)
    [table] = [t for t in analyse(one).tables if t.key == "servers"]
    assert not any("by the line" in note.text for note in table.notes)
