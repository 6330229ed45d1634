"""The analysis keeps its promises on data whose truth is known: sizes, coverage, power (docs/statistics.md)."""

import pytest

from suites.checks.simulations import DOCUMENT, WORLDS, Row, quick, tables


@pytest.fixture(autouse=True, scope="module")
def quickly():
    with quick():
        yield


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_what_is_promised_holds(world):
    rows = world()
    assert rows
    assert [row for row in rows if not row.holds] == []
    text = DOCUMENT.read_text()
    missing = [row.figure for row in rows if f"| {row.figure} |" not in text]
    assert not missing, "run python -m suites.checks.simulations"


def test_a_broken_promise_is_told():
    row = Row("size", "p", 0.07, 0.038, 0.063, 2000)
    assert not row.holds
    assert "| p | 7.0% | 3.8%–6.3% | 2,000 |" in tables([row])
