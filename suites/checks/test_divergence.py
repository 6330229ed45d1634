"""Teacher-forced divergence and where answers part: by simulation and by hand."""

import math

import numpy as np
import pytest

from kvsuite.analysis.divergence import Positions, divergence, first_difference, parting
from kvsuite.errors import UsageError
from suites.checks.depth import depth
from suites.checks.simulations import COVERAGE, DRAWS, widened

THIN = depth(10, 1)
KL, FLIPS, CHANGE = 0.02, 0.05, 0.1
SPREAD = 0.3


def positions(prompts, each, kl, flip, loss, **more):
    names = [f"p{i}" for i in range(prompts) for _ in range(each)]
    return Positions(names, *(np.asarray(x, dtype=float) for x in (kl, flip, loss)), **more)


def drawn(rng, prompts, each, noise=0.0):
    """A method whose prompts differ by 30 %, and a control that adds what both share."""
    n = prompts * each
    level = np.repeat(rng.gamma(SPREAD**-2, SPREAD**2, prompts), each)
    shared = noise * rng.exponential(1, n)
    kl, change = (mean * level * rng.exponential(1, n) for mean in (KL, CHANGE))
    flip = rng.random(n) < FLIPS * level
    method = positions(prompts, each, kl + shared, flip, change + shared)
    return method, positions(prompts, each, shared, rng.random(n) < 0.02, shared)


def test_intervals_cover():
    """Of means, percentiles and the excess; prompts are resampled, not positions."""
    rng = np.random.default_rng(1)
    many = drawn(rng, 20_000, 50, 0.01)[0]
    truth = {"kl": KL + 0.01, "flips": FLIPS, "change": CHANGE + 0.01}
    truth |= {"p50": np.quantile(many.kl, 0.5), "p99": np.quantile(many.kl, 0.99)}
    beyond = {"kl": KL, "flips": FLIPS - 0.02, "change": CHANGE}
    hits = []
    for seed in range(DRAWS // THIN):
        found = divergence(*drawn(rng, 60, 12, 0.01), draws=1000, seed=seed)
        pairs = [(getattr(found, name), true) for name, true in truth.items()]
        pairs += [(found.excess[name], true) for name, true in beyond.items()]
        hits.append([x.low <= true <= x.high for x, true in pairs])
    covered = np.mean(hits, axis=0)
    low, high = widened(*COVERAGE, len(hits), THIN)
    assert (covered >= low).all(), covered
    assert (covered <= high).all(), covered


def test_figures():
    method = positions(2, 2, [0.0, 0.1, 0.2, 0.5], [0, 1, 0, 1], [0.3, 0.1, 0.0, 0.4])
    control = positions(2, 2, [0.0, 0.1, 0.1, 0.1], [0, 1, 0, 0], [0.1, 0.1, 0.0, 0.1])
    found = divergence(method, control)
    assert (found.n, found.prompts, found.largest) == (4, 2, 0.5)
    assert (found.kl.mean, found.flips.mean, found.change.mean) == pytest.approx((0.2, 0.5, 0.2))
    assert (found.p50.mean, found.p99.mean) == (0.1, 0.5)
    assert {k: x.mean for k, x in found.excess.items()} == pytest.approx({"kl": 0.125, "flips": 0.25, "change": 0.125})
    assert found.perplexity.mean == pytest.approx(math.exp(0.2))
    assert found.perplexity.low < found.perplexity.mean < found.perplexity.high
    assert found.p99.high == math.inf
    assert found.note == ""


def test_positions_count_alike_however_long_their_prompt():
    columns = np.array([1.0, 1, 1, 5]), np.array([1, 1, 1, 0]), np.array([2.0, 2, 2, 6])
    found = divergence(Positions(["a", "a", "a", "b"], *columns))
    assert (found.kl.mean, found.flips.mean, found.change.mean) == (2, 0.75, 3)


def test_prompts_are_resampled_not_positions():
    """The same numbers say less if they come from fewer prompts."""
    rng = np.random.default_rng(2)
    level = np.repeat(rng.gamma(1, 1, 40), 50)
    columns = (level, rng.random(2000) < 0.1, level)
    few = divergence(positions(40, 50, *columns))
    many = divergence(positions(2000, 1, *columns))
    assert few.kl.se > 4 * many.kl.se
    assert few.p50.high - few.p50.low > 3 * (many.p50.high - many.p50.low)


def test_datasets_are_strata():
    kl = np.repeat([1.0, 1.1, 0.9, 9.0, 9.1, 8.9], 5)
    names = np.repeat(["a", "b"], 15).tolist()
    one, two = (divergence(positions(6, 5, kl, kl > 5, kl, **m)) for m in ({}, {"dataset": names}))
    assert one.kl.mean == two.kl.mean
    assert two.kl.se < one.kl.se / 10


def test_no_flips_seen_is_not_none():
    """What unseen prompts could still do: a flip or as many as the worst prompt had."""
    zero = np.zeros(30 * 20)
    none = divergence(positions(30, 20, zero + 0.01, zero, zero + 0.01)).flips
    assert none.low == none.mean == 0
    assert 0 < none.high < 0.05
    zero[:20] = 1
    one = divergence(positions(30, 20, zero + 0.01, zero, zero + 0.01)).flips
    assert one.mean == pytest.approx(1 / 30)
    assert one.high > 1 / 30 + 0.1


def test_a_control_without_noise_is_no_floor():
    method = positions(3, 2, np.ones(6), np.ones(6), np.ones(6))
    found = divergence(method, positions(3, 2, *np.zeros((3, 6))))
    assert found.excess == {}
    assert "no floor measured" in found.note
    assert "noise is not known" in divergence(method).note


def test_one_prompt_has_no_interval():
    found = divergence(positions(1, 50, np.linspace(0, 1, 50), np.zeros(50), np.ones(50)))
    assert (found.kl.low, found.kl.high, found.p50.high) == (0, math.inf, math.inf)
    assert found.p50.low == 0


@pytest.mark.parametrize(
    ("kl", "flip", "loss", "said"),
    [
        ([0.1], [0, 1], [0.1, 0.1], "one length"),
        ([0.1, math.nan], [0, 1], [0.1, 0.1], "not a number"),
        ([0.1, -0.2], [0, 1], [0.1, 0.1], "below 0"),
        ([0.1, 0.2], [0, 0.5], [0.1, 0.1], "neither"),
    ],
)
def test_columns_are_refused(kl, flip, loss, said):
    with pytest.raises(UsageError, match=said):
        positions(1, 2, kl, flip, loss)


def test_a_control_of_other_positions_is_refused():
    method = positions(2, 2, *np.ones((3, 4)))
    with pytest.raises(UsageError, match="position 1 belongs to prompt p0 of the method but p1"):
        divergence(method, positions(4, 1, *np.ones((3, 4))))
    with pytest.raises(UsageError, match="4 positions, its control 2"):
        divergence(method, positions(1, 2, *np.ones((3, 2))))


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([5], [6, 7], 0),
        ([1, 2], [1, 2, 3], None),
        ([], [1], None),
    ],
)
def test_first_difference(one, other, place):
    assert first_difference(one, other) == first_difference(other, one) == place


def pair(at, length):
    """Two answers of that many tokens which differ at a place, or not at all."""
    return [0] * length, [int(i == at) for i in range(length)]


def test_median_counts_what_did_not_part_as_later():
    found = parting([pair(1, 9), pair(3, 9), pair(4, 9), pair(None, 9), pair(None, 9)])
    assert (found.n, found.diverged.mean, found.median.mean) == (5, 0.6, 4)
    assert parting([pair(1, 9), pair(None, 9), pair(None, 9)]).median.mean == math.inf
    assert parting([pair(None, 2)] * 3).median.mean == math.inf
    # a pair that ended at 2 tokens says nothing about later ones: half of the other four parted by 5
    assert parting([pair(None, 2), pair(3, 9), pair(5, 9), pair(6, 9), pair(None, 9)]).median.mean == 6
    assert parting([pair(0, 5)] * 3).median.mean == 0
    with pytest.raises(UsageError, match="no pairs"):
        parting([])


def test_the_last_equal_token_was_still_seen():
    """A pair cut off after n equal tokens was at risk at place n - 1 and not at n."""
    assert parting([pair(None, 3), pair(2, 9), pair(3, 9), pair(7, 9)]).median.mean == 3
    assert parting([pair(None, 4), pair(3, 9), pair(3, 9), pair(7, 9)]).median.mean == 7


def test_the_median_covers_with_answers_of_any_length():
    """Each token parts with 3 %, answers end with 2 %: one of 40 pairs that end is no sign of agreement."""
    rng = np.random.default_rng(3)
    true = math.ceil(math.log(0.5) / math.log(0.97)) - 1
    hits, medians = [], []
    for _ in range(DRAWS // THIN):
        parts, ends = rng.geometric(0.03, 80) - 1, rng.geometric(0.02, 80)
        pairs = [pair(int(p) if p < e else None, int(e)) for p, e in zip(parts, ends, strict=True)]
        found = parting(pairs).median
        hits.append(found.low <= true <= found.high)
        medians.append(found.mean)
    assert np.median(medians) == pytest.approx(true, abs=1)
    assert np.mean(hits) >= widened(*COVERAGE, len(hits), THIN)[0]  # places are whole numbers, so it may cover more
