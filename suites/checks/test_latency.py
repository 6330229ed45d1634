"""Lines over length and where they cross: by simulation and by hand."""

import math

import numpy as np
import pytest

from kvsuite.analysis.latency import break_even, fit, itl_fit, ttft_fit
from kvsuite.errors import UsageError
from suites.checks.depth import depth
from suites.checks.simulations import COVERAGE, widened

DRAWS = depth(500, 2000)
LOW, HIGH = widened(*COVERAGE, DRAWS, 2000 // DRAWS)
"""Coverage of 95 % intervals, STATISTICS.md."""
LENGTHS = np.repeat([256.0, 512, 1024, 2048, 4096], 3)


def line(rng, intercept, slope, sd, lengths=LENGTHS):
    return intercept + slope * lengths + rng.normal(0, sd, len(lengths))


class TestFits:
    def test_intervals_cover(self):
        """Of coefficients, the curve at a length not measured, and one more measurement there."""
        rng = np.random.default_rng(2)
        true = (0.02, 3e-6)
        hits = []
        for _ in range(DRAWS):
            found = itl_fit(LENGTHS, line(rng, *true, 0.001))
            more, at = line(rng, *true, 0.001, np.array([8192.0]))[0], found.at(8192)
            single = found.at(8192, single=True)
            hits.append(
                [
                    *(c.low <= t <= c.high for c, t in zip(found.coefficients, true, strict=True)),
                    at.low <= true[0] + true[1] * 8192 <= at.high,
                    single.low <= more <= single.high,
                ]
            )
        covered = np.mean(hits, axis=0)
        assert (covered >= LOW).all()
        assert (covered <= HIGH).all()

    def test_quadratic_intervals_cover(self):
        rng = np.random.default_rng(3)
        true = np.array([0.05, 2e-5, 4e-9])
        hits = []
        for _ in range(DRAWS):
            noise = rng.normal(0, 0.01, len(LENGTHS))
            found = ttft_fit(LENGTHS, LENGTHS[:, None] ** np.arange(3) @ true + noise)
            at = found.at(3000)
            ends = [c.low <= t <= c.high for c, t in zip(found.coefficients, true, strict=True)]
            hits.append([*ends, at.low <= true @ [1, 3000, 3000**2] <= at.high])
        covered = np.mean(hits, axis=0)
        assert (covered >= LOW).all()
        assert (covered <= HIGH).all()

    def test_residual_is_the_spread_of_one_measurement(self):
        x = np.repeat(LENGTHS, 200)
        found = itl_fit(x, line(np.random.default_rng(4), 0.02, 3e-6, 0.001, x))
        assert found.residual == pytest.approx(0.001, rel=0.05)
        assert (found.n, found.df, found.lengths) == (3000, 2998, (256, 4096))

    def test_exact_curves_at_lengths_far_apart(self):
        x = np.array([16.0, 1000, 30_000, 131_072, 1_000_000])
        found = ttft_fit(x, 0.05 + 2e-5 * x + 4e-12 * x**2)
        assert [c.mean for c in found.coefficients] == pytest.approx([0.05, 2e-5, 4e-12], rel=1e-6)
        assert found.at(500).mean == pytest.approx(0.05 + 0.01 + 1e-6)

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda: itl_fit([256, 256, 256, 256], [1, 2, 1, 2]), "3 measurements at 2 lengths or more, not 4 at 1"),
            (lambda: itl_fit([256, 512], [1, 2]), "3 measurements at 2 lengths or more, not 2 at 2"),
            (lambda: ttft_fit([1, 2, 2, 2], [1, 2, 3, 3]), "4 measurements at 3 lengths or more, not 4 at 2"),
            (lambda: itl_fit([1, 2, 3], [1, 2]), "3 lengths and 2 times"),
            (lambda: itl_fit([1, 2, 3], [1, 2, 0]), "over 0 seconds"),
            (lambda: itl_fit([1, 2, math.nan], [1, 2, 3]), "not a number"),
            (lambda: break_even(ttft_fit([1, 2, 3, 4], [1, 2, 3, 5])), "no lines"),
        ],
    )
    def test_refused(self, call, said):
        with pytest.raises(UsageError, match=said):
            call()


class TestBreakEven:
    @pytest.mark.parametrize(
        ("slope", "sd", "base_sd"),
        [(1.5e-6, 0.0005, 0.0005), (1.5e-6, 0.001, 0.0002), (2.9e-6, 0.001, 0.0004)],
    )
    def test_fieller_covers(self, slope, sd, base_sd):
        """Also where the slopes nearly agree and most intervals have no end. The lines cross at 2,000."""
        rng = np.random.default_rng(5)
        hits = []
        for _ in range(DRAWS):
            base = itl_fit(LENGTHS, line(rng, 0.02, 3e-6, base_sd))
            method = itl_fit(LENGTHS, line(rng, 0.02 + 2000 * (3e-6 - slope), slope, sd))
            hits.append(break_even(method, base).holds(2000))
        assert LOW <= np.mean(hits) <= HIGH

    def test_paired_differences_cover_and_are_narrower(self):
        """What both share, a slow machine, is gone."""
        rng = np.random.default_rng(6)
        hits, narrower = [], 0
        for draw in range(DRAWS):
            shared = rng.normal(0, 0.002, len(LENGTHS))
            base = line(rng, 0.02, 3e-6, 0.0005) + shared
            method = line(rng, 0.024, 1e-6, 0.0005) + shared
            paired = break_even(fit(LENGTHS, method - base, 1))
            hits.append(paired.holds(2000))
            if draw < 100:
                narrower += width(paired) < width(break_even(itl_fit(LENGTHS, method), itl_fit(LENGTHS, base)))
        assert LOW <= np.mean(hits) <= HIGH
        assert narrower > 90

    def test_the_set_is_where_the_difference_is_within_its_interval(self):
        """The definition, length by length, for every shape of the set."""
        rng = np.random.default_rng(7)
        shapes = set()
        for gaps in ((0.002, -2e-6), (0.002, -3e-7), (0.0007, 0), (0.002, 2e-6), (0.004, -2e-6)):
            for _ in range(20):
                gap = fit(LENGTHS, line(rng, *gaps, 0.001), 1)
                found = break_even(gap)
                shapes.add((len(found.pieces), *(math.isinf(high) for _, high in found.pieces)))
                for length in (0, 100, 800, 1500, 2000, 2500, 4000, 9000, 50_000, 1e7):
                    at = gap.at(length)
                    assert found.holds(length) == (at.low <= 0 <= at.high)
        assert shapes == {(0,), (1, False), (1, True), (2, False, True)}

    @pytest.mark.parametrize(
        ("method", "side", "length"),
        [
            ((0.03, 1e-6), "longer", 5000),
            ((0.01, 5e-6), "shorter", 5000),
            ((0.01, 3e-6), "everywhere", None),
            ((0.01, 2e-6), "everywhere", None),
            ((0.03, 3e-6), "nowhere", None),
            ((0.03, 4e-6), "nowhere", None),
        ],
    )
    def test_side(self, method, side, length):
        x = np.array([256.0, 1024, 2048, 8192])
        found = break_even(itl_fit(x, method[0] + method[1] * x), itl_fit(x, 0.02 + 3e-6 * x))
        assert found.faster == side
        assert found.length == (None if length is None else pytest.approx(length))
        for at in (1, 4000, 6000, 100_000):
            faster = method[0] + method[1] * at < 0.02 + 3e-6 * at
            assert faster == {"everywhere": True, "nowhere": False, "longer": at > 5000, "shorter": at < 5000}[side]
        if length is None and method[1] != 3e-6:  # parallel ones may meet far away
            assert found.pieces == ()
            assert side in found.note

    def test_notes(self):
        rng = np.random.default_rng(8)
        base = itl_fit(LENGTHS, line(rng, 0.02, 3e-6, 1e-5))
        sure = break_even(itl_fit(LENGTHS, line(rng, 0.024, 1e-6, 1e-5)), base)
        assert (sure.note, len(sure.pieces)) == ("", 1)
        assert sure.pieces[0][0] < sure.length < sure.pieces[0][1]
        far = break_even(itl_fit(LENGTHS, line(rng, 0.04, 1e-6, 1e-5)), base)
        assert "256 to 4,096" in far.note
        assert far.length == pytest.approx(10_000, rel=0.05)
        alike = break_even(itl_fit(LENGTHS, line(rng, 0.02, 3e-6, 0.01)), base)
        assert alike.pieces == ((0, math.inf),)
        assert "any length" in alike.note


def width(found):
    return sum(high - low for low, high in found.pieces)
