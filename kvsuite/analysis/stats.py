"""Estimates with intervals, exact tests, corrections: what every endpoint is made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvsuite.analysis.resample import DRAWS, Design, Floats, Mask, Rule, bootstrap, eligible

LEVEL = 0.05
"""Two-sided: intervals are 95 %."""
FEW = 10
"""Clusters with a large change below which an interval also holds what unseen changes could do."""
FEW_DF = 30
"""Degrees of freedom below which a bootstrap's percentiles are too narrow."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate(Interval):
    """An interval with what a planner needs."""

    se: float = math.nan
    """Standard error, of the logarithm where the figure is a ratio of sums."""
    df: float = 0
    unseen: float = 0.0
    """Where fewer than ``FEW`` clusters changed much: how far the share that does may be from the share that did."""
    room: float = 1.0
    """How far the figure would move if all changed as much as they can."""
    share: float = 1.0
    """Of the clusters, that changed much."""


@dataclass(frozen=True)
class Ratio:
    """A figure that is one weighted sum over another: a mean, a share of the eligible, a cost."""

    top: Floats
    """(n,)"""
    bottom: Floats | None = None
    """(n,); None counts samples."""
    eligible: bool = False
    """Over the samples whose baseline is at least its dataset's mean, recomputed in every draw."""
    log: bool = False
    """Its spread is that of its logarithm."""
    large: Mask | None = None
    """(n,): where a sample changed by half of ``room`` or more. With fewer than ``FEW`` such clusters the interval is
    widened: a few large losses weigh as much as all the small changes, and resampling cannot know those it never
    saw."""
    room: tuple[float, float] = (1.0, 1.0)
    """How far the figure would fall or rise if every sample changed as much as it can."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """What the figure can be at all."""


@dataclass
class Endpoints:
    """What the comparison of one method with its baseline asks of the common resampling, by the figures' names."""

    endpoints: dict[str, Ratio] = field(default_factory=dict)
    """Primary: these get a margin and a verdict."""
    findings: dict[str, Ratio] = field(default_factory=dict)
    """Exploratory."""
    flips: dict[str, Floats] = field(default_factory=dict)
    """(n,) differences whose signs are flipped for the p of a figure of that name."""
    pairs: dict[str, Floats] = field(default_factory=dict)
    """(n,): 1 where only the method shows something, -1 where only the other arm does: the exact p of a figure of that
    name."""

    def __or__(self, other: Endpoints) -> Endpoints:
        return Endpoints(
            *({**mine, **theirs} for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def only(self, names: Sequence[str]) -> Endpoints:
        """The figures of these names."""
        return Endpoints(*({name: x for name, x in found.items() if name in names} for found in vars(self).values()))


def estimate(
    design: Design,
    ratios: Sequence[Ratio],
    base: Floats | None = None,
    rule: Rule = "mean",
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Estimate]:
    """All figures from one cluster bootstrap, stratified by dataset. ``base``, (n,), is the baseline's score and says
    who is eligible."""
    ones = np.ones(sum(map(len, design.strata)))
    allowed = np.zeros_like(ones) if base is None else eligible(design, base, rule).astype(float)
    known: dict[tuple[int, bool], int] = {}
    columns: tuple[list[Floats], list[Floats]] = ([], [])
    places = []
    for ratio in ratios:
        pair = []
        for column in (ratio.top, ones if ratio.bottom is None else ratio.bottom):
            key = (id(column), ratio.eligible)
            if key not in known:
                known[key] = len(columns[ratio.eligible])
                columns[ratio.eligible].append(column)
            pair.append(known[key])
        places.append(pair)
    stacked = [np.column_stack(c) if c else np.empty((len(ones), 0)) for c in columns]
    drawn = bootstrap(design, stacked[0], base, stacked[1], rule, draws, seed)
    found = []
    for ratio, (top, bottom) in zip(ratios, places, strict=True):
        sums = drawn.eligible if ratio.eligible else drawn.sums
        weight = allowed if ratio.eligible else ones
        below = ones if ratio.bottom is None else ratio.bottom
        seen = _divided(np.array([weight @ ratio.top]), np.array([weight @ below]))[0]
        found.append(_estimate(design, ratio, float(seen), _divided(sums[:, top], sums[:, bottom]), weight))
    return found


def _divided(top: Floats, bottom: Floats) -> Floats:
    found: Floats = np.divide(top, bottom, out=np.full(len(top), math.nan), where=bottom != 0)
    return found


def _estimate(design: Design, ratio: Ratio, value: float, draws: Floats, weight: Floats) -> Estimate:
    """Percentiles of the draws, taken further out by as much as t is wider than the normal distribution (Hesterberg
    2015, What teachers should know about the bootstrap); below ``FEW_DF`` degrees of freedom t times their spread."""
    draws = draws[np.isfinite(draws)]
    df = 0.0 if math.isnan(value) else _freedom(design, ratio, value, weight)
    if df < 1 or not len(draws):
        return Estimate(value, *ratio.bounds, math.inf, df)
    log = ratio.log and value > 0 and bool((draws > 0).all())
    shown, middle = (np.log(draws), math.log(value)) if log else (draws, value)
    from scipy import stats

    reach = float(stats.t.ppf(1 - LEVEL / 2, df))
    se = float(shown.std())
    if df < FEW_DF:
        low, high = middle - reach * se, middle + reach * se
    else:
        tail = float(stats.norm.cdf(-reach))
        low, high = (float(x) for x in np.quantile(shown, (tail, 1 - tail)))
    if log:
        low, high = math.exp(low), math.exp(high)
    share, unseen = _unseen(design, ratio, weight)
    apart = float(np.clip((value - ratio.log) / share, -1, 1)) if share else 0.0  # nor need what changed stay changed
    low = min(low, value - unseen * (ratio.room[0] + max(apart, 0)))
    high = max(high, value + unseen * (ratio.room[1] + max(-apart, 0)))
    ends = max(low, ratio.bounds[0]), min(high, ratio.bounds[1])
    return Estimate(value, *ends, se if log == ratio.log else math.inf, df, unseen, max(ratio.room), share)


def _freedom(design: Design, ratio: Ratio, value: float, weight: Floats) -> float:
    """Degrees of freedom of the spread (Satterthwaite): where few clusters of one dataset make most of it, there are
    few, however many the others have. 0 where there is one cluster in all."""
    bottom = 1.0 if ratio.bottom is None else ratio.bottom
    apart = weight * (ratio.top - value * bottom)
    parts = np.array(
        [
            (count * np.bincount(clusters, apart[at], minlength=count).var(ddof=1), count - 1)
            for at, clusters, count in zip(design.strata, design.clusters, design.counts, strict=True)
            if count > 1
        ]
    ).reshape(-1, 2)
    if not parts[:, 0].any():
        return float(design.df)
    return float(parts[:, 0].sum() ** 2 / (parts[:, 0] ** 2 / parts[:, 1]).sum())


def _unseen(design: Design, ratio: Ratio, weight: Floats) -> tuple[float, float]:
    """The share of clusters that changed, and how far the true one may be from it, by Wilson's interval, where fewer
    than ``FEW`` did. A sample without a change has not shown that there are none, nor two that agree that all do."""
    if ratio.large is None:
        return 1.0, 0.0
    sums = design.per_cluster(np.column_stack([weight != 0, ratio.large & (weight != 0)]).astype(float))
    n, changed = int((sums[:, 0] > 0).sum()), int((sums[:, 1] > 0).sum())
    if changed >= FEW or not n:
        return changed / max(n, 1), 0.0
    found = wilson(changed, n)
    return found.mean, max(found.high - found.mean, found.mean - found.low)


def wilson(count: int, n: int) -> Interval:
    """Wilson's interval of a share."""
    from scipy import stats

    found = stats.binomtest(count, n).proportion_ci(1 - LEVEL, method="wilson")
    return Interval(count / n, float(found.low), float(found.high))


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean of scores from 0 to 1: Wilson's interval where all are 0 or 1, else from the bootstrap. One score that
    is not binary can be anywhere."""
    x = np.asarray(scores, dtype=float)
    if np.isin(x, (0.0, 1.0)).all():
        return wilson(int(x.sum()), len(x))
    return estimate(Design.alone(len(x)), [Ratio(x, bounds=(0, 1))])[0]


def log_ratio_interval(logs: Sequence[float]) -> Estimate:
    """The geometric mean of ratios given as logarithms, with the 95 % t-interval. One has none: (ratio, 0, inf)."""
    from scipy import stats

    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return Estimate(math.exp(middle), 0.0, math.inf, math.inf)
    se = statistics.stdev(logs) / math.sqrt(len(logs))
    half = float(stats.t.ppf(1 - LEVEL / 2, len(logs) - 1)) * se
    return Estimate(math.exp(middle), math.exp(middle - half), math.exp(middle + half), se, len(logs) - 1)


def log_change(before: Sequence[float], after: Sequence[float]) -> tuple[Estimate, float]:
    """The ratio of two geometric means given as logarithms, at least two each, with Welch's 95 % interval, and its
    p."""
    from scipy import stats

    middle = statistics.fmean(after) - statistics.fmean(before)
    spreads = [statistics.variance(x) / len(x) for x in (before, after)]
    if not sum(spreads):
        ratio = math.exp(middle)
        return Estimate(ratio, ratio, ratio, 0.0, len(after) - 1), float(middle == 0)
    test = stats.ttest_ind(after, before, equal_var=False)
    ends = test.confidence_interval(1 - LEVEL)
    low, high = (math.exp(float(x)) for x in (ends.low, ends.high))
    return Estimate(math.exp(middle), low, high, math.sqrt(sum(spreads)), int(test.df)), float(test.pvalue)


def counts(pairs: Floats) -> tuple[int, int]:
    """How many entries only the one has, and only the other."""
    return int((pairs > 0).sum()), int((pairs < 0).sum())


def discordant_p(only_one: int, only_other: int) -> float:
    """Exact two-sided p that changes go either way alike: McNemar's test of the discordant pairs, and the sign test."""
    from scipy import stats

    n = only_one + only_other
    return float(stats.binomtest(only_one, n).pvalue) if n else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: any of them below α errs with probability α at most, over all."""
    return _adjusted(p, "holm")


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p-values of exploratory figures: of those below α, a share of α is expected to be wrong."""
    return _adjusted(p, "fdr_bh")


def _adjusted(p: Sequence[float], method: str) -> list[float]:
    from statsmodels.stats.multitest import multipletests

    return [float(x) for x in multipletests(p, method=method)[1]] if len(p) else []
