"""From records to figures: what the reports show of a run."""

import math
from dataclasses import replace

import numpy as np
import pytest

from kvsuite.analysis.length import cost_interval, length_rows
from kvsuite.analysis.samples import sample_rows
from kvsuite.analysis.speed import speed_rows
from kvsuite.analysis.stats import log_ratio_interval, mean_interval
from kvsuite.errors import UsageError
from kvsuite.records import Answer, Timing
from kvsuite.report.tables import _by_what, provenance

SCORED = "kvsuite.cache.layer.LayerCache"


def answer(at, method="full", **more):
    given = {"task": "needle", "score": 1.0, "tokens": [1, 2, 3], "nbytes": 100, "prompt_tokens": 50, "finish": "stop"}
    given |= {"prefill_seconds": 0.5, "decode_share": 0.1, "cap": 9, "nbytes_end": 50, "dense_end": 100}
    return Answer(method, sample=f"s{at}", **given | more)


def test_figures_of_a_method():
    full = [answer(i, nbytes=400) for i in range(4)]
    mine = [answer(0, "m"), answer(1, "m", score=0.0, tokens=[1, 9]), answer(2, "m")]
    mine.append(answer(3, "m", status="failed", error="out of memory", score=None))
    found = sample_rows(full + mine)[1]
    assert (found.method, found.n, found.failed, found.pairs, found.same) == ("m", 4, 1, 3, 2)
    assert found.error == "out of memory"
    assert found.score.mean == pytest.approx(2 / 3)
    assert found.ratio == 0.25
    assert found.prefill == pytest.approx(100)
    assert found.decode == pytest.approx((2 + 1 + 2) / 0.3)


def test_a_method_that_always_failed_has_no_figures():
    found = sample_rows([answer(0), answer(0, "m", status="failed", error="x")])[1]
    assert (found.failed, found.score, found.pairs) == (1, None, 0)


def test_cost_of_an_arm_and_its_control():
    full = [answer(i, tokens=[1] * n) for i, n in enumerate((2, 4, 6))]
    again = [answer(i, tokens=[1] * n, repeat=1) for i, n in enumerate((4, 4, 4))]
    mine = [answer(i, "m", tokens=[1] * n, finish="length") for i, n in enumerate((3, 8, 9))]
    first, control, method = length_rows(full + again + mine)
    assert (first.cost.mean, first.cost.low, first.cost.high) == (1, 1, 1)
    assert (control.method, control.repeat, control.cost.mean) == ("full", 1, 1)
    assert (control.longer, control.shorter) == (1, 1)
    assert method.cost.mean == pytest.approx(20 / 12)
    assert (method.capped, method.baseline_capped, method.longer, method.shorter) == (3, 0, 3, 0)
    assert method.ratio == 0.5


def test_a_failure_is_no_short_answer():
    rows = length_rows([answer(0), answer(1), answer(0, "m"), answer(1, "m", status="failed", error="x", tokens=[])])
    assert (rows[1].pairs, rows[1].failed, rows[1].cost.mean) == (1, 1, 1)


def test_different_caps_are_refused():
    with pytest.raises(UsageError, match="sample s0: m had a cap of 5 tokens, the baseline 9"):
        length_rows([answer(0), answer(0, "m", cap=5)])


def timing(**more):
    given = {
        "cache": SCORED,
        "path": "m/unfused",
        "checked": 0.3,
        "tokens": 8,
        "seconds": [0.1] * 4,
        "baseline_seconds": [0.2] * 4,
    }
    return Timing("m", width=8, length=512, **given | more)


def test_speed_is_a_ratio_of_paired_rounds():
    row = speed_rows([timing(seconds=[0.1, 0.2, 0.4], baseline_seconds=[0.2, 0.4, 0.8])])[0]
    assert row.speedup.mean == pytest.approx(2)
    assert row.speedup.high - row.speedup.low < 1e-9
    assert row.rate == pytest.approx(8 / 0.2)


@pytest.mark.parametrize("checked", [None, 1.5])
def test_a_timing_of_our_cache_that_was_not_checked_is_refused(checked):
    with pytest.raises(UsageError, match="without its output being checked"):
        speed_rows([timing(checked=checked)])
    assert speed_rows([timing(cache="transformers.cache_utils.DynamicCache", checked=None)])[0].rate


def test_the_cache_that_is_scored_is_the_cache_that_is_timed_method_by_method():
    other = "kvsuite.cache.fused.FusedCache"
    same = [answer(0, "m", cache=SCORED), timing(), answer(0, "n", cache=other)]
    assert provenance(same) == f"Scored and timed: the same {SCORED}."
    apart = provenance([*same, timing(cache=other)])
    assert apart == f"NOT THE SAME CACHE SCORED AND TIMED: m {other}."
    assert provenance([answer(0, "n", cache=other), timing()]) == "", "no method was both"


def test_a_method_without_a_kernel_is_named():
    def said(*paths):
        timings = [replace(timing(path=p), method=f"m{i}") for i, p in enumerate(paths)]
        return _by_what(speed_rows(timings))

    assert "PyTorch reference, no kernel" in said("full/unfused", "int8/unfused")
    assert said("full/triton", "int8/triton") == "Steps and attention are Triton kernels."
    assert "not to be ranked by speed) for m1." in said("full/triton", "int8/unfused")


def test_a_failed_cell_has_no_speed():
    row = speed_rows([timing(status="failed", error="TimeoutError", checked=None)])[0]
    assert (row.failed, row.rate, row.error) == (True, None, "TimeoutError")


def test_wilson_covers_as_it_should():
    draw = np.random.default_rng(0)
    found = [mean_interval((draw.random(16) < 0.8).astype(float)) for _ in range(2000)]
    assert 0.93 <= sum(i.low <= 0.8 <= i.high for i in found) / 2000 <= 0.99


def test_the_bootstrap_interval_of_other_scores():
    scores = np.random.default_rng(1).random(200)
    interval, half = mean_interval(scores), 1.96 * scores.std() / 200**0.5
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.006)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.006)


def test_the_interval_of_a_ratio_of_sums_covers_it():
    draw, hits = np.random.default_rng(2), 0
    for _ in range(60):
        theirs = draw.integers(20, 200, 80)
        interval = cost_interval(theirs * draw.lognormal(0, 0.5, 80) / math.exp(0.125), theirs, [10**4] * 80)
        hits += interval.low <= 1 <= interval.high
    assert hits >= 52


def test_the_interval_of_a_speed_ratio_covers_it():
    draw, hits = np.random.default_rng(3), 0
    for _ in range(1000):
        interval = log_ratio_interval(draw.normal(math.log(1.3), 0.1, 6))
        hits += interval.low <= 1.3 <= interval.high
    assert 930 <= hits <= 970
