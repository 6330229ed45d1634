"""The table by type of task: a type that is lost stands out, whatever the mean over all types is."""

from dataclasses import replace

import numpy as np
import pytest

from kvsuite.analysis.report import analyse
from kvsuite.errors import UsageError
from suites.checks.test_partial import needles, run

N = 40


def task(name, kind, method, score=1.0, n=N):
    """Texts differ by arm, so that noise has changed something."""
    return [replace(a, task=name, type=kind, sample=f"{name} {a.sample}") for a in needles(method, score, n)]


def arms(**lost):
    """A baseline that is always right, noise, and a method that is wrong in the named tasks."""
    named = {"needle": "synthetic", "sums": "synthetic", "digest": "summarization"}
    return [
        task(name, kind, method, 1.0 - (method == "m") * lost.get(name, 0.0))
        for method in ("full", "jitter", "m")
        for name, kind in named.items()
    ]


def test_a_type_that_is_lost_stands_out():
    found = analyse(run(*arms(digest=1.0), methods=["full", "jitter", "m"])).table("types")
    rows = [row.key for row in found.rows if row.key[0] == "m"]
    kinds = ["synthetic", "summarization", "synthetic · needle", "synthetic · sums"]
    assert rows == [("m", kind) for kind in kinds], "a type of one task has one row"
    lost, kept = (found.cell(("m", kind), "change") for kind in ("summarization", "synthetic"))
    assert (lost.value, kept.value) == (-100, 0)
    assert lost.high < -80
    assert -10 < kept.low < 0 < kept.high < 10
    assert (found.cell(("m", "summarization"), "broken").value, found.cell(("m", "summarization"), "broken").of) == (
        N,
        N,
    )
    assert [found.cell(("m", kind), "n").value for kind in kinds] == [2 * N, N, N, N]
    assert found.cell(("m", "synthetic"), "base").value == 100
    assert found.cell(("jitter", "summarization"), "change").value == 0, "noise is shown, too"


def test_intervals_are_those_of_the_type_alone():
    draw = np.random.default_rng(1)
    scores = (draw.random(N) < 0.7).astype(float)
    mixed = [replace(a, score=s) for a, s in zip(task("sums", "synthetic", "m"), scores, strict=True)]
    records = [own for own in arms() if (own[0].method, own[0].task) != ("m", "sums")]
    cell = analyse(run(*records, mixed, methods=["full", "jitter", "m"])).cell(
        "types", ("m", "synthetic · sums"), "change"
    )
    assert cell.value == pytest.approx(100 * (scores.mean() - 1))
    assert cell.low < 100 * (scores.mean() - 1) < cell.high < 0


def test_one_task_has_no_table():
    found = analyse(run(needles("full"), needles("jitter"), needles("m"), methods=["full", "jitter", "m"]))
    with pytest.raises(UsageError, match="types"):
        found.table("types")
