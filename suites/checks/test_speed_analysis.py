"""How many blocks, goodput, and one load test against another: by simulation and by hand."""

import math
import re

import numpy as np
import pytest

from kvsuite.analysis.speed import _mean_ratio, _p95_ratio, blocks_needed, compare_loads, goodput, p95
from kvsuite.analysis.tables import changes
from kvsuite.analysis.trimmed import log_ratio_interval
from kvsuite.errors import UsageError
from kvsuite.readers.base import Load
from suites.checks.depth import depth
from suites.checks.drawn import drawn
from suites.checks.simulations import COVERAGE, widened

DRAWS = depth(500, 2000)
LOW, HIGH = widened(*COVERAGE, DRAWS, 2000 // DRAWS)
"""Coverage of 95 % intervals, STATISTICS.md."""


def load(ttft, itl=None, e2e=None, *, failed=0, source="load", tokens=100, duration=10.0, **setting):
    ttft = np.asarray(ttft, dtype=float)
    itl, e2e = (ttft / k if x is None else np.asarray(x, dtype=float) for k, x in ((10, itl), (0.1, e2e)))
    n = np.full(len(ttft), float(tokens))
    return Load(source, ttft, itl, e2e, n, n, np.arange(len(ttft)) / 1.0, failed, duration, setting)


class TestBlocks:
    SD, TRUE = 0.03, math.log(1.2)

    def test_a_number_fixed_by_a_pilot_covers_and_until_narrow_does_not(self):
        """Of the same blocks. The fixed numbers are enough 4 times of 5 at least: they are rounded up."""
        rng, width = np.random.default_rng(1), 0.02
        fixed, narrow, repeated = [], [], []
        for _ in range(DRAWS):
            n = blocks_needed(rng.normal(self.TRUE, self.SD, 6), width)
            blocks = rng.normal(self.TRUE, self.SD, max(n, 400))
            found = log_ratio_interval(blocks[:n])
            fixed.append(found.low <= 1.2 <= found.high)
            narrow.append(found.high / found.mean - 1 <= width)
            found = until_narrow(blocks, width)
            repeated.append(found.low <= 1.2 <= found.high)
        assert LOW <= np.mean(fixed) <= HIGH
        low, high = widened(0.8, 0.88, DRAWS, 2000 // DRAWS)
        assert low <= np.mean(narrow) <= high
        assert np.mean(repeated) < LOW

    def test_it_is_the_least_number(self):
        from scipy import stats

        pilot = np.array([0.1, 0.15, 0.12, 0.2, 0.11])
        for width in (0.01, 0.03, 0.1, 0.5):
            n = np.arange(6, 5000)
            upper = pilot.std(ddof=1) * np.sqrt(stats.f.ppf(0.8, n - 1, 4))
            reach = 1.06 * stats.t.ppf(0.975, 0.6 * n - 1) * upper / np.sqrt(n)  # 40 % are trimmed
            assert blocks_needed(pilot, width) == n[reach <= math.log1p(width)][0]

    def test_more_blocks_for_a_narrower_interval_a_wider_spread_and_a_shorter_pilot(self):
        pilot = np.array([0.1, 0.2, 0.1, 0.2, 0.1, 0.2])
        shorter = 0.15 + (pilot[:3] - pilot[:3].mean()) / pilot[:3].std(ddof=1) * pilot.std(ddof=1)
        needed = blocks_needed(pilot, 0.05)
        assert needed < blocks_needed(pilot, 0.04) < blocks_needed(pilot, 0.02)
        assert needed < blocks_needed(2 * pilot, 0.05)
        assert needed < blocks_needed(shorter, 0.05)
        assert needed == blocks_needed(pilot + 1, 0.05)
        assert blocks_needed(pilot, 1000.0) >= 2

    @pytest.mark.parametrize(
        ("pilot", "width", "said"),
        [
            ([0.1], 0.1, "two blocks at least"),
            ([0.1, math.nan], 0.1, "numbers"),
            ([0.1, 0.1], 0.1, "identical"),
            ([0.1, 0.2], 0.0, "half width"),
            ([0.1, 0.2], 1e-6, "more than"),
        ],
    )
    def test_refused(self, pilot, width, said):
        with pytest.raises(UsageError, match=said):
            blocks_needed(pilot, width)


def until_narrow(blocks, width):
    """The interval of the first blocks, three at least, that is narrow enough."""
    from scipy import stats

    n = np.arange(1, len(blocks) + 1)
    mean = np.cumsum(blocks) / n
    spread = np.maximum(np.cumsum(blocks**2) - n * mean**2, 0) / np.maximum(n - 1, 1)
    reach = stats.t.ppf(0.975, np.maximum(n - 1, 1)) * np.sqrt(spread / n)
    stop = int(np.flatnonzero((n >= 3) & (reach <= math.log1p(width)))[0]) + 1
    return log_ratio_interval(blocks[:stop])


class TestGoodput:
    TESTS = tuple((rate, load(np.full(50, slow), np.full(50, 0.02))) for rate, slow in ((8, 0.9), (1, 0.1), (4, 0.4)))

    def test_the_highest_rate_that_holds_and_the_next(self):
        found = goodput(self.TESTS, ttft=0.5, itl=0.05)
        assert (found.rate, found.missed, found.note) == (4, 8, "")
        assert [(c.rate, c.met) for c in found.cells] == [(1, True), (4, True), (8, False)]
        lowest = goodput(self.TESTS, ttft=0.5, itl=0.01)
        assert (lowest.rate, lowest.missed) == (None, 1)
        assert "lowest" in lowest.note
        assert goodput(self.TESTS, ttft=0.05, itl=0.05).missed == 1

    def test_not_reached(self):
        found = goodput(self.TESTS, ttft=1, itl=0.05)
        assert (found.rate, found.missed) == (8, None)
        assert "not reached" in found.note

    def test_a_rate_above_one_that_missed_does_not_count(self):
        tests = [(1, load([0.1])), (2, load([0.9])), (4, load([0.1]))]
        found = goodput(tests, ttft=0.5, itl=1)
        assert (found.rate, found.missed) == (1, 2)
        assert "again at 4" in found.note
        assert goodput([(1, load([0.1])), (1, load([0.9]))], 0.5, 1).rate is None

    def test_p95_and_failures(self):
        times = np.arange(1.0, 101)
        assert p95(times) == 95
        assert p95(np.append(times, math.nan)) == 95
        assert p95(times, failed=5) == 100
        assert p95(times, failed=6) == math.inf
        assert math.isnan(p95(np.array([math.nan])))
        tests = [(1, load(np.full(94, 0.1), failed=6))]
        assert goodput(tests, 0.5, 1).missed == 1
        assert goodput([(1, load(np.full(95, 0.1), failed=5))], 0.5, 1).missed is None

    @pytest.mark.parametrize(
        ("tests", "targets", "said"),
        [
            ([], (1, 1), "arrival rates"),
            ([(0, load([1]))], (1, 1), "arrival rates"),
            ([(1, load([1]))], (0, 1), "targets"),
            ([(1, load([1], [math.nan], source="x.json"))], (1, 1), "x.json does not say"),
        ],
    )
    def test_refused(self, tests, targets, said):
        with pytest.raises(UsageError, match=said):
            goodput(tests, *targets)


class TestLoads:
    def test_ratios(self):
        base = load(np.arange(1.0, 201), tokens=50)
        found = compare_loads(load(2 * np.arange(1.0, 201), duration=20, tokens=50), base)
        assert all(x.mean == pytest.approx(2) and x.low < 2 < x.high for x in found.ratios.values())
        assert list(found.ratios) == ["mean TTFT", "p95 TTFT", "mean ITL", "p95 ITL", "mean E2E", "p95 E2E"]
        assert found.throughput == pytest.approx(0.5)
        assert (found.answered, found.failed) == ((200, 200), (0, 0))
        assert "share a server" in found.notes[0]

    def test_mean_ratio_covers(self):
        rng = np.random.default_rng(9)
        hits = []
        for seed in range(DRAWS):
            found = _mean_ratio(1.3 * rng.lognormal(0, 0.5, 80), rng.lognormal(0, 0.5, 160), 400, seed)
            hits.append(found.low <= 1.3 <= found.high)
        assert LOW <= np.mean(hits) <= HIGH

    @pytest.mark.parametrize("sizes", [(2000, 2000), (1000, 3000)])
    def test_p95_ratio_covers(self, sizes):
        rng = np.random.default_rng(10)
        low, high = [], []
        for seed in range(DRAWS):
            found = _p95_ratio(
                *(k * rng.lognormal(0, 0.5, n) for k, n in zip((1.3, 1), sizes, strict=True)), 1000, seed
            )
            low.append(found.low <= 1.3)
            high.append(found.high >= 1.3)
        assert LOW <= np.mean(np.logical_and(low, high)) <= HIGH
        assert (
            min(np.mean(low), np.mean(high)) > widened(0.965, 1.0, DRAWS, 2000 // DRAWS)[0]
        )  # misses are as many on either side

    def test_few_requests_say_nothing_about_the_slowest(self):
        """Of 20 requests all may be below the true p95. Drawing among them covers 73 % here."""
        rng = np.random.default_rng(11)
        few, many = rng.lognormal(0, 0.5, 20), rng.lognormal(0, 0.5, 1000)
        assert compare_loads(load(few), load(many)).ratios["p95 TTFT"].high == math.inf
        assert compare_loads(load(many), load(few)).ratios["p95 TTFT"].low == 0
        assert compare_loads(load([1.0]), load([2.0])).ratios["mean TTFT"].high == math.inf

    def test_what_is_not_known_is_left_out_and_failures_are_told(self):
        one = load([1, 2, 3.0], [0.1, math.nan, 0.1], [math.nan] * 3, failed=2)
        found = compare_loads(one, load([1, 2, 3.0], [0.2, 0.2, math.nan], failed=1, tokens=math.nan))
        assert found.ratios["mean ITL"].mean == pytest.approx(0.5)
        assert "mean E2E" not in found.ratios
        assert found.failed == (2, 1)
        assert "2 and 1 requests failed" in found.notes[1]
        assert math.isnan(found.throughput)

    def test_what_is_drawn_of_them(self):
        times = np.arange(1.0, 201)
        rows = {what: rest for what, *rest in drawn(*changes.loads(load(times), load(2 * times, duration=20))).rows}
        assert rows["mean TTFT"][0] == "2.000"
        assert re.fullmatch(r"1\.\d{3}–2\.\d{3}", rows["mean TTFT"][1])
        assert rows["tokens per second"] == ["0.500", "-"]
        few = {what: rest for what, *rest in drawn(*changes.loads(load([1.0]), load([2.0]))).rows}
        assert few["mean TTFT"] == ["2.000", "–"]

    def test_other_settings_are_refused_by_name(self):
        one = load([1], source="a", rate=4, model="m", num_prompts=9)
        other = load([1], source="b", rate=8, model="m")
        with pytest.raises(UsageError, match=r"^a and b .*: rate \(4 and 8\), num_prompts \(9 and unknown\)$"):
            compare_loads(one, other)
        assert compare_loads(one, one).ratios
