"""Estimates and tests beside slow loops, scipy's and statsmodels' own."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from kvsuite.analysis.resample import Design, bootstrap, eligible, sign_flip
from kvsuite.analysis.stats import Ratio, benjamini_hochberg, discordant_p, estimate, holm, mean_interval, wilson


def mean_of(x, clusters=None, datasets=None, **more):
    clusters = range(len(x)) if clusters is None else clusters
    design = Design.of(datasets or ["d"] * len(x), list(map(str, clusters)))
    return estimate(design, [Ratio(np.asarray(x, float))], **more)[0]


# resampling


def test_draws_take_whole_clusters_of_every_dataset():
    clusters = [d + c for d, c in zip("aaaaaabbbbcc", "001122001100", strict=True)]
    weights = bootstrap(Design.of(list("aaaaaabbbbcc"), clusters), np.eye(12), draws=200).sums
    assert np.allclose(weights[:, :6].sum(1), 6)
    assert np.allclose(weights[:, 6:].sum(1), 6), "a dataset of one document is drawn with the smallest other"
    assert (weights[:, 0::2] == weights[:, 1::2]).all()
    for column in (0, 10):
        assert set(np.unique((weights[:, column] * 2 / 3).round(9))) == {0, 1, 2}, "two of three are drawn, for 3/2"
    assert not (weights[:, 0] == weights[:, 6]).all(), "a cluster belongs to its dataset"


def test_a_document_in_two_datasets_is_drawn_once():
    design = Design.of(list("aaabbbcc"), ["1", "2", "3", "1", "2", "3", "x", "y"])
    weights = bootstrap(design, np.eye(8), draws=200).sums
    assert (weights[:, :3] == weights[:, 3:6]).all()
    assert [len(at) for at in design.datasets] == [3, 3, 2]
    assert sorted(design.counts) == [2, 3]


def test_no_draw_depends_on_how_many_are_held_at_once(monkeypatch):
    def all_of_it(seed=0):
        design, columns = Design.alone(30), np.eye(30)
        return bootstrap(design, columns, draws=100, seed=seed).sums, sign_flip(Design.alone(13), columns[:13] + 1)

    whole = all_of_it()
    assert not (all_of_it(1)[0] == whole[0]).all()
    monkeypatch.setattr("kvsuite.analysis.resample.CHUNK", 333)
    assert all((x == y).all() for x, y in zip(all_of_it(), whole, strict=True))


def test_the_variance_is_unbiased_with_few_per_dataset():
    # Rao and Wu: Σ n_h s_h² / n² with s² over n_h - 1, also for datasets of 2, 3 and 5 samples
    draw, sizes = np.random.default_rng(0), (2, 3, 5, 2)
    x = [draw.normal(h, 1 + h, n) for h, n in enumerate(sizes)]
    found = mean_of(np.concatenate(x), datasets=[str(h) for h, n in enumerate(sizes) for _ in range(n)])
    se = math.sqrt(sum(n * np.var(h, ddof=1) for n, h in zip(sizes, x, strict=True))) / 12
    assert found.se == pytest.approx(se, rel=0.03)
    assert found.high - found.mean == pytest.approx(oracle.t.ppf(0.975, found.df) * se, rel=0.03)


def test_degrees_of_freedom_are_welchs():
    draw = np.random.default_rng(1)
    x, y = draw.normal(0, 5, 4), draw.normal(0, 1, 30)
    difference = Ratio(np.append(x / 4, -y / 30))
    found = estimate(Design.of(["x"] * 4 + ["y"] * 30, [str(i) for i in range(34)]), [difference])[0]
    assert found.df == pytest.approx(oracle.ttest_ind(x, y, equal_var=False).df)


def test_datasets_of_one_sample_are_one_stratum():
    x = np.random.default_rng(1).normal(size=20)
    alone = mean_of(x, datasets=[f"d{i}" for i in range(20)])
    assert (alone.se, alone.df) == pytest.approx((mean_of(x).se, 19))
    mixed = mean_of(x, datasets=["d"] * 12 + [f"d{i}" for i in range(8)])
    se = math.sqrt(12 * np.var(x[:12], ddof=1) + 8 * np.var(x[12:], ddof=1)) / 20
    assert mixed.se == pytest.approx(se, rel=0.03)
    assert not math.isfinite(mean_of([0.5]).se)


@pytest.mark.parametrize("n", [8, 40, 300])
def test_the_interval_of_a_mean_is_scipys_and_the_formulas(n):
    x = np.random.default_rng(n).gamma(2, size=n)
    found, se, reach = mean_of(x), x.std(ddof=1) / math.sqrt(n), oracle.t.ppf(0.975, n - 1)
    assert (found.mean, found.df) == pytest.approx((x.mean(), n - 1))
    assert found.se == pytest.approx(se, rel=0.03)
    if n < 30:  # too few for percentiles
        assert (found.low, found.high) == pytest.approx((x.mean() - reach * se, x.mean() + reach * se), rel=0.03)
        return
    level = 1 - 2 * oracle.norm.cdf(-reach)
    how = {"method": "percentile", "n_resamples": 20000, "confidence_level": level, "rng": np.random.default_rng(0)}
    ends = np.array(oracle.bootstrap((x,), np.mean, **how).confidence_interval)
    low, high = x.mean() + math.sqrt(n / (n - 1)) * (ends - x.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * se)


def test_clusters_of_unequal_sizes_have_the_formulas_error():
    draw = np.random.default_rng(7)
    clusters = np.repeat(np.arange(60), draw.integers(1, 6, 60))
    x = draw.normal(size=60)[clusters] + draw.normal(size=len(clusters))
    apart = np.bincount(clusters, x - x.mean())
    se = math.sqrt(60 / 59 * (apart**2).sum()) / len(x)
    assert mean_of(x, clusters).se == pytest.approx(se, rel=0.04)
    assert mean_of(x).se < 0.8 * se, "samples of one cluster are not independent"


scores = st.integers(-100, 100).map(lambda x: x / 100)


@given(st.lists(scores, min_size=2, max_size=15), st.randoms(use_true_random=False))
def test_samples_of_a_cluster_count_once_and_have_no_order(x, rnd):
    names = list(range(len(x)))
    found, twice = mean_of(x, draws=500), mean_of([*x, *x], names + names, draws=500)
    assert (twice.mean, twice.low, twice.high) == pytest.approx((found.mean, found.low, found.high), abs=1e-9)
    order = rnd.sample(names, len(x))
    mixed = [x[i] for i in order]
    assert mean_of(mixed, order, draws=500).mean == pytest.approx(found.mean, abs=1e-12)
    one, other = (sign_flip(Design.alone(len(x)), np.array([y]).T)[0] for y in (x, mixed))
    assert other == pytest.approx(one, abs=0.05 if len(x) > 13 else 0)


def test_order_moves_an_interval_by_the_noise_of_the_draws_and_more_samples_narrow_it():
    x, datasets = np.random.default_rng(2).normal(size=200), ["a"] * 120 + ["b"] * 80
    found, mixed = mean_of(x, datasets=datasets), mean_of(x[::-1], datasets=datasets[::-1])
    assert (mixed.low, mixed.high) == pytest.approx((found.low, found.high), abs=0.1 * found.se)
    twice = mean_of([*x, *x], datasets=datasets * 2)
    assert (found.high - found.low) / (twice.high - twice.low) == pytest.approx(math.sqrt(2), rel=0.03)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_who_is_eligible_is_asked_again_in_every_draw(rule):
    datasets = list("aaaaaaabbbbbcde")
    clusters = [d + c for d, c in zip(datasets, "012234500123000", strict=True)]
    base = np.append(np.random.default_rng(4).choice([0, 0.25, 0.5, 1], 12), [0.25, 0.5, 0])
    design = Design.of(datasets, clusters)
    found = bootstrap(design, np.eye(15), base, np.eye(15), rule, draws=300)
    for weights, among in zip(found.sums, found.eligible, strict=True):
        for name, scale in {"a": 6 / 5, "b": 4 / 3, "c": 3 / 2, "d": 3 / 2, "e": 3 / 2}.items():
            mine = [i for i in range(15) if datasets[i] == name]
            drawn = [base[i] for i in mine for _ in range(round(weights[i] / scale))]
            level = getattr(np, rule)(drawn) if drawn else 0  # of a dataset of one sample always its own score
            assert [among[i] for i in mine] == [weights[i] * (base[i] > 0 and base[i] >= level) for i in mine]
    top, bottom = found.eligible @ base, found.eligible.sum(1)
    mine = estimate(design, [Ratio(base, eligible=True)], base, rule, draws=300)[0]
    shares = (top / np.where(bottom, bottom, np.nan))[bottom > 0]
    assert (mine.mean, mine.se) == pytest.approx((base[eligible(design, base, rule)].mean(), shares.std()))


@pytest.mark.parametrize("score", [0.1, 0.7, 1 / 3])
def test_equal_scores_are_all_eligible_in_every_draw(score):
    base = np.full(7, score)
    found = bootstrap(Design.alone(7), np.eye(7), base, np.eye(7), draws=300)
    assert (found.eligible == found.sums).all()
    assert eligible(Design.alone(7), base).all()


def test_an_interval_ends_where_the_figure_must():
    assert mean_interval([1, 1, 1, 1, 0.9, 0.2]).high == 1
    assert mean_interval([0, 0, 0, 0, 0.1, 0.8]).low == 0
    assert (mean_interval([0.5]).low, mean_interval([0.5]).high) == (0, 1)
    assert mean_interval([1] * 8).low == pytest.approx(wilson(8, 8).low), "eight hits are no certainty"


def test_a_cost_turned_round_is_its_inverse():
    mine, theirs = np.random.default_rng(5).integers(5, 90, (2, 40)).astype(float)
    apart = mine / mine.sum() - theirs / theirs.sum()
    there, back = estimate(Design.alone(40), [Ratio(mine, theirs, log=True), Ratio(theirs, mine, log=True)])
    assert (back.mean, back.low, back.high) == pytest.approx((1 / there.mean, 1 / there.high, 1 / there.low))
    assert there.mean == mine.sum() / theirs.sum()
    assert there.se == pytest.approx(math.sqrt(40 / 39 * (apart**2).sum()), rel=0.05)


# tests


@pytest.mark.parametrize("n", [2, 5, 12, 13, 14, 40])
def test_sign_flips_are_scipys(n):
    x, exact = np.random.default_rng(n).normal(0.3, 1, (n, 2)).round(1), n <= 13
    for mine, column in zip(sign_flip(Design.alone(n), x), x.T, strict=True):
        how = {"n_resamples": np.inf if exact else 20000, "rng": np.random.default_rng(0)}
        difference = (lambda a, b, axis: (a - b).sum(axis), column, 0 * column)
        theirs = oracle.permutation_test(difference[1:], difference[0], permutation_type="samples", **how).pvalue
        assert mine == pytest.approx(theirs, abs=1e-12 if exact else 0.02)


def test_signs_flip_by_cluster_and_random_flips_never_say_never():
    def p(x, clusters):
        return sign_flip(Design.of(["d"] * len(x), list(map(str, clusters))), np.array([x], float).T, draws=99)[0]

    assert p([1] * 5, range(5)) == 2 / 32
    assert p([1] * 5, [0, 0, 1, 1, 1]) == 2 / 4
    assert p([0] * 5, range(5)) == p([0] * 20, range(20)) == p([1, -1], [0, 0]) == 1
    assert p([1] * 60, range(60)) == 1 / 100


@given(st.integers(0, 40), st.integers(0, 40))
def test_discordant_pairs_are_tested_exactly(one, other):
    p = discordant_p(one, other)
    assert p == discordant_p(other, one)
    assert p == pytest.approx(min(mcnemar([[7, one], [other, 9]]).pvalue, 1) if one + other else 1)


def test_corrections_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert (holm([0.5, 0.6]), holm([]), benjamini_hochberg([])) == ([1, 1], [], [])
    p = np.random.default_rng(0).random(30) ** 4
    for mine, theirs in ((holm, "holm"), (benjamini_hochberg, "fdr_bh")):
        assert mine(p) == pytest.approx(multipletests(p, method=theirs)[1])


@pytest.mark.parametrize(("count", "n"), [(0, 8), (3, 20), (20, 20)])
def test_wilsons_interval_is_statsmodels(count, n):
    found = wilson(count, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(count, n, method="wilson"), abs=1e-12)
