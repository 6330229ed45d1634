"""From answers to the table a user reads."""

import io

import numpy as np
import pytest

from kvsuite.analysis.samples import Answer, summarize
from kvsuite.analysis.stats import mean_interval
from kvsuite.report import terminal


def answer(at, score=1.0, tokens=(1, 2, 3), failed=False, nbytes=100):
    return Answer(f"s{at}", score, tokens, failed, nbytes, 50, 0.5, 0.1)


def test_figures_of_a_method():
    full = [answer(i, nbytes=400) for i in range(4)]
    mine = [answer(0), answer(1, 0.0, (1, 9)), answer(2), answer(3, failed=True)]
    found = summarize(mine, full)
    assert (found["n"], found["failed"], found["pairs"], found["same"]) == (4, 1, 3, 2)
    assert found["score"] == pytest.approx(2 / 3)
    assert found["ratio"] == 0.25
    assert found["prefill"] == pytest.approx(100)
    assert found["decode"] == pytest.approx((2 + 1 + 2) / 0.3)


def test_a_method_that_always_failed_has_no_figures():
    found = summarize([answer(0, failed=True)], [answer(0)])
    assert found["failed"] == 1
    assert found["score"] is None


def test_wilson_covers_as_it_should():
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        interval = mean_interval((draw.random(16) < 0.8).astype(float))
        hits += interval.low <= 0.8 <= interval.high
    assert 0.93 <= hits / 2000 <= 0.99


def test_the_bootstrap_interval_of_other_scores():
    scores = np.random.default_rng(1).random(200)
    interval = mean_interval(scores)
    half = 1.96 * scores.std() / 200**0.5
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.006)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.006)


def written(width, same=15):
    rows = []
    for name, ratio in (("full", 1.0), ("jitter", 1.0), ("h2o:budget=256+kivi:bits=4", 0.1)):
        found = summarize([answer(i) for i in range(16)], [answer(i) for i in range(16)])
        where = {"model": "m", "dtype": "bfloat16", "threads": 2, "width": 8, "lengths": [512], "compress": "prompt"}
        rows.append(found | where | {"kind": "samples", "task": "needle", "method": name, "ratio": ratio, "same": same})
    file = io.StringIO()
    terminal.write(rows, file, width)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_its_window(width):
    lines = written(width).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in written(width)
    for words in ("full", "jitter", "0.81–1.00", "15/16", "0.10"):
        assert words in written(width)


def test_a_control_without_a_difference_is_no_floor():
    assert "changed 1 of 16" in written(80)
    assert "no floor was measured" in " ".join(written(80, same=16).split())
