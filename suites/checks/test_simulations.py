"""The analysis keeps its promises on data whose truth is known: sizes, coverage, power (docs/statistics.md)."""

import pytest

from suites.checks.depth import depth
from suites.checks.simulations import COVERAGE, DOCUMENT, WORLDS, Row, tables, widened

THIN = depth(20, 1)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_what_is_promised_holds(world):
    rows = world(THIN)
    assert rows
    assert [row for row in rows if not row.holds(THIN)] == []
    text = DOCUMENT.read_text()
    missing = [row.figure for row in rows if f"| {row.figure} |" not in text]
    assert not missing, "run python -m suites.checks.simulations"


def test_a_broken_promise_is_told():
    row = Row("size", "p", 0.07, 0.038, 0.063, 2000)
    assert not row.holds()
    assert "| p | 7.0% | 3.8%–6.3% | 2,000 |" in tables([row])


def test_fewer_draws_have_wider_bounds():
    low, high = widened(*COVERAGE, 200, 10)
    assert 0.9 < low < COVERAGE[0] - 0.02
    assert COVERAGE[1] + 0.02 < high < 1
    assert widened(*COVERAGE, 2000, 1) == COVERAGE
    assert widened(0.0, 1.0, 20, 10) == (0, 1)
    assert not Row("size", "p", 0.12, 0.038, 0.063, 200).holds(10)
