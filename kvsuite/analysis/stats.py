"""Estimates with intervals, exact tests, corrections: what every endpoint is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvsuite.analysis.resample import DRAWS, Design, Floats, Mask, Rule, bootstrap, eligible
from kvsuite.analysis.shares import Pairs, Side, Unseen, tango_bound, tango_p

LEVEL = 0.05
"""Of a family of one-sided tests; an interval that is in no family is 95 %, two-sided."""
FEW = 10
"""Clusters with a large change below which an interval also holds what unseen changes could do."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate(Interval):
    """A figure of which one-sided p and bounds are known at any level: from t, or of paired shares from Tango's
    score."""

    se: float = math.nan
    """Standard error, of the logarithm where ``log`` says so."""
    df: float = 0
    """Degrees of freedom; below 1 nothing is known of the spread."""
    log: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """What the figure can be at all."""
    unseen: Unseen | None = None
    """What clusters could still do, where fewer than ``FEW`` changed much."""
    pairs: Pairs | None = None
    """Of paired shares: the samples that show something in one arm alone."""
    extremes: tuple[Estimate, Estimate] | None = None
    """What it would be at least and at most, were all failed answers as low or as high as can be. Its bounds are the
    least one's lower and the other's upper, and its p likewise."""
    share: float = 1.0
    """Of the clusters, that changed much."""
    room: float = 0.0
    """How far the figure would move if all changed as much as they can; 0 where all did, as far as they do."""
    skew: float = 0.0
    """Of the figure's own distribution, where safe ends are corrected for it; on the scale of ``se``."""

    @classmethod
    def of(cls, mean: float, se: float, df: float, **more: Any) -> Estimate:
        """With the ends of its 95 % interval, which hold what was not seen, too."""
        bare = cls(mean, math.nan, math.nan, se, df, **more)
        return replace(bare, low=bare.bound(-1, LEVEL / 2, safe=True), high=bare.bound(1, LEVEL / 2, safe=True))

    @property
    def known(self) -> bool:
        """Whether anything is known of its spread."""
        return self.df >= 1 and not math.isnan(self.mean)

    def p(self, limit: float, side: Side, safe: bool = False) -> float:
        """One-sided p, small where the true figure lies above (1) or below (-1) a limit. ``safe``: not to be trusted
        where unseen changes could take it there. They matter, too, where nothing has a spread."""
        if self.extremes:
            return self.extremes[side < 0].p(limit, side, safe)
        if not self.known:
            return 1.0
        if self.pairs:
            return tango_p(self.pairs, limit, side)
        from scipy.special import stdtr  # Student's t

        away = side * (math.log(self.mean / limit) if self.log else self.mean - limit)
        z, skew = -away / self.se if self.se > 0 else math.nan, self._skewed(-side) if safe else 0.0
        z += skew * (z**2 / 3 + 1 / 6) + skew**2 * z**3 / 27
        p = float(stdtr(self.df, z)) if self.se > 0 else float(away <= 0)
        if self.unseen and (safe or not self.se):
            p = max(p, self.unseen.p(-1 if side > 0 else 1, side * (self.mean - limit)))
        return p

    def bound(self, side: Side, level: float, safe: bool = False) -> float:
        """The low (-1) or high (1) end of the interval with that one-sided level: the limit at which ``p`` is it."""
        if self.extremes:
            return self.extremes[side > 0].bound(side, level, safe)
        if not self.known:
            return self.bounds[side > 0]
        if self.pairs:
            return tango_bound(self.pairs, side, level)
        from scipy.special import stdtrit  # quantile of t

        z, skew = float(stdtrit(self.df, level)), self._skewed(side) if safe else 0.0
        if skew:
            z = 3 / skew * (math.cbrt(1 + skew * (z - skew / 6)) - 1)
        reach = -side * z * self.se
        end = self.mean * math.exp(min(reach, 700)) if self.log else self.mean + reach
        if self.unseen and (safe or not self.se):
            unseen = self.mean + side * self.unseen.reach(side, level)
            end = max(end, unseen) if side > 0 else min(end, unseen)
        return min(max(end, self.bounds[0]), self.bounds[1])

    def _skewed(self, side: float) -> float:
        """What Hall's transformation (1992, On the removal of skewness by transformation) corrects an end on that side
        by: where the long tail is there, few clusters seldom show it, and t is too sure. 0 where the tail is opposite:
        that end is no less safe than it was."""
        return max(side * self.skew, 0.0)


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
    """(n,): where a sample changed by half of ``room`` or more. With fewer than ``FEW`` such clusters no bound is safe
    without what unseen ones could do: a few large losses weigh as much as all the small changes, and resampling cannot
    know those it never saw."""
    room: tuple[float, float] = (1.0, 1.0)
    """How far the figure would fall or rise if every sample changed as much as it can."""
    paired: bool = False
    """Whether ``top`` is 1 where only the method shows something, -1 where only the other arm does, else 0."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """What the figure can be at all."""
    skewed: bool = False
    """Whether safe ends are corrected for the skew of clusters."""


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
    places: list[list[int]] = []
    for ratio in ratios:
        places.append([])
        sums = (ratio.top, ones if ratio.bottom is None else ratio.bottom)
        for column in () if ratio.paired and design.independent else sums:
            key = (id(column), ratio.eligible)
            if key not in known:
                known[key] = len(columns[ratio.eligible])
                columns[ratio.eligible].append(column)
            places[-1].append(known[key])
    stacked = [np.column_stack(c) if c else np.empty((len(ones), 0)) for c in columns]
    if not known:
        return [_pairs(ratio, allowed if ratio.eligible else ones) for ratio in ratios]
    drawn = bootstrap(design, stacked[0], base, stacked[1], rule, draws, seed)
    found = []
    for ratio, place in zip(ratios, places, strict=True):
        weight = allowed if ratio.eligible else ones
        if not place:
            found.append(_pairs(ratio, weight))
            continue
        below = ones if ratio.bottom is None else ratio.bottom
        seen = _divided(np.array([weight @ ratio.top]), np.array([weight @ below]))[0]
        resampled = (drawn.eligible if ratio.eligible else drawn.sums)[:, place]
        found.append(_estimate(design, ratio, float(seen), _divided(*resampled.T), weight))
    return found


def _pairs(ratio: Ratio, weight: Floats) -> Estimate:
    mine = weight * ratio.top
    n = round(float((weight if ratio.bottom is None else weight * ratio.bottom).sum()))
    if not n:
        return Estimate(math.nan, *ratio.bounds)
    one, other = counts(mine)
    mean, changed = (one - other) / n, (one + other) / n
    se = math.sqrt(max(changed - mean**2, 0) / n)
    return Estimate.of(mean, se, n - 1, bounds=ratio.bounds, pairs=(one, other, n), share=changed, room=1.0)


def _divided(top: Floats, bottom: Floats) -> Floats:
    found: Floats = np.divide(top, bottom, out=np.full(len(top), math.nan), where=bottom != 0)
    return found


def _estimate(design: Design, ratio: Ratio, value: float, draws: Floats, weight: Floats) -> Estimate:
    """The spread of the draws, or of their logarithms."""
    draws = draws[np.isfinite(draws)]
    df = 0.0 if math.isnan(value) else _freedom(design, ratio, value, weight)
    if df < 1 or not len(draws):
        return Estimate(value, *ratio.bounds, math.inf, bounds=ratio.bounds)
    log = ratio.log and value > 0 and bool((draws > 0).all())
    se = float((np.log(draws) if log else draws).std())
    changed, clusters = _changed(design, ratio, weight)
    unseen, share = None, changed / clusters
    if ratio.large is not None and changed < FEW:
        apart = float(np.clip((value - ratio.log) / share, -1, 1)) if share else 0.0  # nor need what changed stay so
        unseen = Unseen(changed, clusters, (ratio.room[0] + max(apart, 0), ratio.room[1] + max(-apart, 0)))
    more = {"unseen": unseen, "share": share, "room": 0.0 if ratio.large is None else max(ratio.room)}
    more["skew"] = _skew(design, ratio, value, weight) if ratio.skewed else 0.0
    return Estimate.of(value, se, df, log=log, bounds=ratio.bounds, **more)


def _freedom(design: Design, ratio: Ratio, value: float, weight: Floats) -> float:
    """Degrees of freedom of the spread (Satterthwaite): where few clusters of one dataset make most of it, there are
    few, however many the others have; and few where some hold most samples (Kish's effective number of clusters)."""
    apart, parts = _apart(ratio, value, weight), []
    for at, clusters, count in zip(design.strata, design.clusters, design.counts, strict=True):
        if count > 1:
            sizes = np.bincount(clusters, minlength=count).astype(float)
            kish = float(sizes.sum() ** 2 / (sizes**2).sum())
            parts.append((count * np.bincount(clusters, apart[at], minlength=count).var(ddof=1), max(kish - 1, 1e-9)))
    variance, df = np.array(parts).reshape(-1, 2).T
    return float(variance.sum() ** 2 / (variance**2 / df).sum()) if variance.any() else float(df.sum())


def _skew(design: Design, ratio: Ratio, value: float, weight: Floats) -> float:
    """Of the figure: the third cumulant of its clusters' sum over the power of the second, strata summed."""
    apart, second, third = _apart(ratio, value, weight), 0.0, 0.0
    for at, clusters, n in zip(design.strata, design.clusters, design.counts, strict=True):
        if n > 2:
            sums = np.bincount(clusters, apart[at], minlength=n)
            off = sums - sums.mean()
            second += n / (n - 1) * float((off**2).sum())
            third += n**2 / ((n - 1) * (n - 2)) * float((off**3).sum())
    return third / second**1.5 if second > 0 else 0.0


def _apart(ratio: Ratio, value: float, weight: Floats) -> Floats:
    """(n,): how far every sample takes the figure's sum from where its value would have it."""
    found: Floats = weight * (ratio.top - value * (1.0 if ratio.bottom is None else ratio.bottom))
    return found


def _changed(design: Design, ratio: Ratio, weight: Floats) -> tuple[int, int]:
    """How many clusters changed much, of how many; where that is not asked, all."""
    large = weight != 0 if ratio.large is None else ratio.large & (weight != 0)
    sums = design.per_cluster(np.column_stack([weight != 0, large]).astype(float))
    return int((sums[:, 1] > 0).sum()), max(int((sums[:, 0] > 0).sum()), 1)


def wilson(count: int, n: int) -> Interval:
    """Wilson's interval of a share."""
    from scipy import stats

    found = stats.binomtest(count, n).proportion_ci(1 - LEVEL, method="wilson")
    return Interval(count / n, float(found.low), float(found.high))


def mean_interval(scores: Sequence[float] | Floats) -> Interval:
    """The mean of scores from 0 to 1: Wilson's interval where all are 0 or 1, else from the bootstrap. One score that
    is not binary can be anywhere."""
    return mean_intervals([scores])[0]


def mean_intervals(several: Sequence[Sequence[float] | Floats]) -> list[Interval]:
    """`mean_interval` of each; those of as many scores from the same draws, which take longer than all else."""
    arrays = [np.asarray(scores, dtype=float) for scores in several]
    found = {i: wilson(int(x.sum()), len(x)) for i, x in enumerate(arrays) if np.isin(x, (0.0, 1.0)).all()}
    for n in {len(x) for i, x in enumerate(arrays) if i not in found}:
        alike = [i for i, x in enumerate(arrays) if i not in found and len(x) == n]
        found |= zip(alike, estimate(Design.alone(n), [Ratio(arrays[i], bounds=(0, 1)) for i in alike]), strict=True)
    return [found[i] for i in range(len(arrays))]


def counts(pairs: Floats) -> tuple[int, int]:
    """How many entries only the one has, and only the other."""
    return int((pairs > 0).sum()), int((pairs < 0).sum())


def discordant_p(only_one: int, only_other: int) -> float:
    """Exact two-sided p that changes go either way alike: McNemar's test of the discordant pairs, and the sign test."""
    from scipy import stats

    n = only_one + only_other
    return float(stats.binomtest(only_one, n).pvalue) if n else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: any below α errs with probability α at most. (statsmodels' collects garbage.)"""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted.tolist()


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p-values of exploratory figures: of those below α, a share of α is expected to be wrong."""
    from scipy import stats

    return [float(x) for x in stats.false_discovery_control(p)] if len(p) else []
