"""From answers of servers to figures: what is paired, what proves compression, what has no figure."""

import math
from dataclasses import replace

import pytest

from kvsuite.analysis.runs import speed_changes, speeds
from kvsuite.analysis.serving import as_load, checks, differing, goodputs, proven, served_rows, token_speeds, told
from kvsuite.analysis.tables.servers import speed
from kvsuite.analysis.verdict import decide
from kvsuite.margins import Margins
from kvsuite.records import Probe, Run, Served
from suites.checks.planted import recorded

TOKENS, PROMPTS = 11, 8


def leg(method, block, half, seconds=1.0, leg=0, **more):
    """A leg of 8 requests at a time; everything takes ``seconds``."""
    start = 100.0 * block + 10 * half
    known = {"cell": "c", "block": block, "leg": leg or 10 * block + half, "evaluation": "throughput", "cap": 50}
    known |= {"start": start, "ttft": 0.2 * seconds, "e2e": 1.2 * seconds, "count": TOKENS, "counted": "usage"}
    known |= {"gaps": [0.1 * seconds] * 10, "finish": "stop", "prompt_tokens": 100}
    return [Served(method, sample=f"s{i}", **{"text": recorded()[i][0][0]} | known | more) for i in range(PROMPTS)]


def run(records, tmp_path, **facts):
    known = {"baseline": "baseline", "controls": ["baseline again"], "servers": {}, "methods": []}
    return Run(tmp_path, {**known, "settings": {"temperature": 0}, **facts}, records)


def both(seconds, blocks=3):
    return [
        r
        for block in range(blocks)
        for half, order in enumerate((("baseline", "m"), ("m", "baseline")))
        for r in (x for name in order for x in leg(name, block, half, seconds[name] * (1 + 0.01 * block)))
    ]


def test_figures_of_a_cell(tmp_path):
    found = run(both({"baseline": 1.0, "m": 2.0}), tmp_path)
    base, mine = served_rows(found)
    assert (mine.method, mine.blocks, mine.n, mine.failed, mine.tokens) == ("m", 3, 48, 0, TOKENS)
    assert mine.figures["ttft"] == pytest.approx(2 * base.figures["ttft"])
    assert mine.figures["tpot"] == pytest.approx(0.2 * 1.01)
    assert mine.figures["itl95"] == pytest.approx(0.2 * 1.01)
    assert mine.figures["rate"] == pytest.approx(PROMPTS * TOKENS / (2.4 * 1.01))
    assert all(mine.ratios[name].mean == pytest.approx(0.5) for name in ("rate", "ttft", "tpot", "e2e")), (
        "over 1: faster"
    )
    [(name, effect)] = decide(speeds(found, Margins()).effects)
    assert (name, effect.verdict) == ("m", "harmful")


def test_two_runs_are_compared_by_their_own_ratios(tmp_path):
    """The machine is half as fast in the second, and m has lost a third beside that."""

    def uneven(r):
        return replace(r, e2e=r.ttft + (r.e2e - r.ttft) * (1 + 0.02 * r.block)) if r.method == "m" else r

    facts = {"environment": {"cpu": "one", "cores": 2, "threads": 2}}
    one = run([uneven(r) for r in both({"baseline": 1.0, "m": 2.0})], tmp_path, **facts)
    other = run([uneven(r) for r in both({"baseline": 2.0, "m": 6.0})], tmp_path, **facts)
    seen = {name: effect.estimate.mean for name, effect in speed_changes(one, other, Margins())}
    assert seen == {"m, c": pytest.approx(2 / 3)}, "on what hardware servers run is not known"
    garbage = run([replace(r, text="") if r.method == "m" else r for r in other.records], tmp_path, **facts)
    assert speed_changes(one, garbage, Margins()) == []


def test_talking_longer_is_not_faster(tmp_path):
    def longer(r):
        return replace(r, count=21, e2e=r.ttft + 2 * (r.e2e - r.ttft)) if r.method == "m" else r

    found = run([longer(r) for r in both({"baseline": 1.0, "m": 1.0})], tmp_path)
    assert served_rows(found)[1].ratios["rate"].mean > 1.01
    assert token_speeds(found)["c", "m"] == pytest.approx([0, 0, 0])


ENDED = {"expected": {"blocks": 3}, "finished": "now"}


def test_a_verdict_on_speed_needs_every_block(tmp_path):
    cells = {"cells": ["c"], "methods": ["baseline", "m", "never"], "model": {"name": "tiny"}}

    def seen(records, **facts):
        found = run(records, tmp_path, **cells, **facts)
        [(_, effect)] = decide(speeds(found, Margins()).effects)
        [table] = speed(found)
        return effect.verdict, effect.lacking, table.title, [row.key[1] for row in table.rows]

    slow = {"baseline": 1.0, "m": 2.0}
    whole, two, cut = both(slow), both(slow, blocks=2), both(slow)[: -PROMPTS - 1]
    assert seen(whole, **ENDED) == seen(whole) == ("harmful", None, "served · tiny", ["baseline", "m"])
    partial = "served · partial: 2 of 3 blocks · tiny"
    assert seen(two, **ENDED) == ("partial", (2, 3), partial, ["baseline", "m"])
    assert seen(two) == ("harmful", None, "served · tiny", ["baseline", "m"]), "an earlier run"
    assert seen(two, expected={})[:2] == ("partial", None), "how many blocks there were to be is not said"
    names = ["baseline", "m", "never"]
    assert seen(cut, expected={}) == ("partial", (2, 3), "served · partial: 0–2 of 3 blocks · tiny", names)
    failed = [replace(r, status="failed", error="cut") if (r.method, r.block) == ("m", 1) else r for r in whole]
    found = run(failed, tmp_path, **cells, **ENDED)
    assert [table.title for table in speed(found)] == ["served · partial: 2–3 of 3 blocks · tiny"]
    assert speeds(found, Margins()).lost == [("m", "cannot tell")], "what is left of so many failures has no rank"


def test_an_arm_of_which_no_block_is_whole_has_failed(tmp_path):
    failed = [replace(r, status="failed", error="cut") if r.method == "m" else r for r in both({"baseline": 1, "m": 2})]
    assert speeds(run(failed, tmp_path), Margins()).lost == [("m", "failed")]


def test_a_block_with_a_failed_leg_is_left_out_of_ratios(tmp_path):
    records = both({"baseline": 1.0, "m": 1.0})
    at = next(i for i, r in enumerate(records) if (r.method, r.block) == ("m", 1))
    records[at] = replace(records[at], status="failed", error="cut", e2e=0.001)
    row = served_rows(run(records, tmp_path))[1]
    assert (row.blocks, row.failed, row.error) == (2, 1, "cut")
    assert row.ratios["rate"].mean == pytest.approx(1)


def test_an_answer_without_a_token_has_no_time_to_its_first(tmp_path):
    records = [replace(r, ttft=0.0, gaps=[], count=0, text="") if r.sample == "s0" else r for r in leg("m", 0, 0)]
    assert served_rows(run(records, tmp_path))[0].figures["ttft"] == pytest.approx(0.2)
    load = as_load(records, "c")
    assert len(load) == PROMPTS - 1
    assert as_load([replace(r, status="failed") for r in records], "c").ttft.tolist() == [math.inf]


def test_goodput_where_nothing_was_answered(tmp_path):
    records = leg("m", 0, 0, cell="poisson:2 goodput", evaluation="goodput", status="failed", error="down")
    found = goodputs(run(records, tmp_path, settings={"temperature": 0, "goodput": [1.0, 0.5]}))["m"]
    assert (found.rate, found.missed) == (None, 2.0)


FP8 = {"compressed": True, "kv_dtype": "fp8"}
SET = {"blocks_set": 2}
"""Its user chose the size of the pool."""
PROOFS = [
    (
        FP8 | {"kv_tokens": 200, "kv_bytes": 1000},
        {"kv_tokens": 100, "kv_bytes": 1000},
        "5 bytes a token, the baseline 10, derived: the bytes of a pool over the tokens that fit into it",
    ),
    (FP8 | {"kv_tokens": 200, "kv_bytes": 2000}, {"kv_tokens": 100, "kv_bytes": 1000}, ""),
    (FP8 | {"kv_tokens": 200}, {"kv_tokens": 100}, "room for 200 tokens, the baseline's server for 100"),
    (FP8 | {"kv_tokens": 100}, {"kv_tokens": 100}, ""),
    ({"compressed": False, "kv_tokens": 200}, {"kv_tokens": 100}, ""),
    ({"compressed": None, "kv_tokens": 200}, {"kv_tokens": 100}, ""),
    (FP8 | {"kv_bytes_per_token": 5}, {"kv_bytes_per_token": 10}, "5 bytes a token, the baseline 10"),
    (FP8, {}, ""),
    (FP8 | SET | {"kv_tokens": 200}, {"kv_tokens": 100}, ""),
    (FP8 | {"kv_tokens": 200, "kv_bytes": 2000}, SET | {"kv_tokens": 20, "kv_bytes": 2000}, ""),
    (
        FP8 | SET | {"kv_tokens": 64, "kv_bytes": 1600, "block_size": 32, "blocks_fit": 10},
        SET | {"kv_tokens": 64, "kv_bytes": 1600, "block_size": 32, "blocks_fit": 5},
        "5 bytes a token, the baseline 10, derived: the bytes of a pool over the tokens that fit into it",
    ),
]


@pytest.mark.parametrize(("facts", "base", "proof"), PROOFS)
def test_what_proves_that_compression_ran(facts, base, proof):
    assert proven(facts, base) == proof


def test_features_that_differ():
    mine, base = (
        {"features": f} for f in ({"prefix caching": "False", "x": "1"}, {"prefix caching": "True", "x": "1"})
    )
    assert differing(mine, base) == {"prefix caching": ("False", "True")}
    assert differing(mine, {}) == {"prefix caching": ("False", None), "x": ("1", None)}


def test_what_is_told_of_an_arm(tmp_path):
    probes = [
        Probe("baseline", facts={"compressed": False}, counters={"preemptions": 1.0, "late": 0.2}),
        Probe("baseline", facts={"compressed": False}, counters={"preemptions": 2.0, "late": 0.1}),
        Probe("m", facts=FP8, counters={}),
        Probe("m", status="failed", error="it died"),
    ]
    warm = [replace(r, cached_tokens=50, counted="chunks") for r in leg("m", 0, 0)]
    base, mine = told(run([*probes, *warm, *leg("baseline", 0, 0)], tmp_path))
    assert base.counters == {"preemptions": 3.0, "late": 0.2}
    assert (mine.facts, mine.failures, mine.warm, mine.proof) == (FP8, ("it died",), 0.5, "")
    assert mine.apart == {}


def test_every_leg_is_checked_for_garbage(tmp_path):
    again = [r for b in range(3) for h in (0, 1) for r in leg("baseline again", b, h)]
    records = both({"baseline": 1.0, "m": 1.0}) + [replace(r, text=f"{r.text}.") for r in again]
    assert not checks(run(records, tmp_path))["m"].broken
    bad = [replace(r, text="�#%" * 40) if r.method == "m" and r.leg % 10 == 1 else r for r in records]
    assert checks(run(bad, tmp_path))["m"].broken, "only the second legs are garbage"


def test_goodput_under_load_is_checked_for_garbage(tmp_path):
    """The rates are each arm's own, the prompts of their first, second … tests are not."""
    records = both({"baseline": 1.0, "m": 1.0})
    records += [replace(r, text=f"{r.text}.") for b in range(3) for h in (0, 1) for r in leg("baseline again", b, h)]
    for method, rate in (("baseline", 2), ("baseline again", 4), ("m", 8)):
        for test in (0, 1):
            records += leg(method, 0, 0, cell=f"poisson:{rate} goodput", evaluation="goodput", test=test)
    assert not checks(run(records, tmp_path))["m"].broken
    bad = [replace(r, text="�#%" * 40) if (r.method, r.evaluation) == ("m", "goodput") else r for r in records]
    assert checks(run(bad, tmp_path))["m"].broken


def test_a_rate_that_missed_once_is_missed(tmp_path):
    """Two tests of 8 at one rate, of which one held: together they would miss no p95."""
    held, missed = (
        leg("m", 0, 0, cell="poisson:2 goodput", evaluation="goodput", leg=1, ttft=0.1, test=test) for test in (0, 1)
    )
    settings = {"temperature": 0, "goodput": [1.0, 0.5]}
    assert goodputs(run(held + missed, tmp_path, settings=settings))["m"].rate == 2.0
    missed[0] = replace(missed[0], gaps=[0.9] * 10)
    found = goodputs(run(held * 2 + missed, tmp_path, settings=settings))["m"]
    assert (found.rate, found.missed, len(found.cells)) == (None, 2.0, 2)


COUNTS = {"prefix_hits": 30.0, "prefix_queries": 100.0}


@pytest.mark.parametrize(
    ("counters", "features", "warm", "perhaps"),
    [
        (COUNTS, {}, 0.3, False),
        (COUNTS | {"perhaps_warm": 1.0}, {}, 0.3, False),
        ({"perhaps_warm": 1.0}, {}, 0.0, True),
        ({"perhaps_warm": 0.0}, {}, 0.0, False),
        ({"perhaps_warm": 1.0}, {"prefix caching": "False"}, 0.0, False),
    ],
)
def test_whether_prompts_were_cold(tmp_path, counters, features, warm, perhaps):
    """By the server's own counters, in legs without tasks, where it does not say it of every request."""
    records = [
        *leg("baseline", 0, 0, leg=1),
        *leg("baseline", 0, 1, leg=2),
        replace(leg("baseline", 0, 0)[0], task="t"),
    ]
    probes = [
        Probe("baseline", leg=0, facts={"features": features}, counters={"prefix_hits": 90.0, "prefix_queries": 100.0}),
        Probe("baseline", leg=2, facts={"features": features}, counters=counters),
    ]
    [base] = told(run([*probes, *records], tmp_path))
    assert (base.warm, base.perhaps_warm) == (warm, perhaps)


def test_an_arm_without_a_whole_block_failed_only_where_a_request_did(tmp_path):
    """An interrupted run said FAILED of a speed of which it had no block."""
    known = {"expected": {"blocks": 3}}
    cut = [r for r in both({"baseline": 1.0, "m": 1.0}, blocks=1) if not (r.method == "m" and r.leg == 1)]
    assert speeds(run(cut, tmp_path, **known), Margins()).lost == [("m", "missing")]
    for arm in ("m", "baseline"):
        fell = [replace(r, status="failed") if r.method == arm and r.sample == "s0" else r for r in cut]
        assert speeds(run(fell, tmp_path, **known), Margins()).lost == [("m", "failed")]
