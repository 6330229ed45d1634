"""Intervals: a mean's, a ratio of paired sums', a speed ratio's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean of at least one score: Wilson's interval where all are 0 or 1, else percentile bootstrap (10,000 draws,
    seeded). One score that is not binary has no interval: (mean, -inf, inf)."""
    from scipy import stats

    x = np.asarray(scores, dtype=float)
    if np.isin(x, (0.0, 1.0)).all():
        found = stats.binomtest(int(x.sum()), len(x)).proportion_ci(method="wilson")
        return Interval(float(x.mean()), float(found.low), float(found.high))
    if len(x) == 1:
        return Interval(float(x[0]), float("-inf"), float("inf"))
    generator = np.random.default_rng(0)
    drawn = stats.bootstrap((x,), np.mean, n_resamples=10_000, method="percentile", rng=generator).confidence_interval
    return Interval(float(x.mean()), float(drawn.low), float(drawn.high))


def ratio_interval(mine: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Σ mine / Σ theirs over pairs, percentile bootstrap over the pairs (10,000 draws, seeded). One pair has no
    interval: (ratio, 0, inf)."""
    from scipy import stats

    a, b = np.asarray(mine, dtype=float), np.asarray(theirs, dtype=float)
    ratio = float(a.sum() / b.sum())
    if len(a) < 2:
        return Interval(ratio, 0.0, math.inf)
    if (a * b.sum() == b * a.sum()).all():  # every draw is the same ratio
        return Interval(ratio, ratio, ratio)

    def statistic(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(x.sum(axis) / y.sum(axis))

    generator = np.random.default_rng(0)
    drawn = stats.bootstrap(
        (a, b), statistic, paired=True, n_resamples=10_000, method="percentile", rng=generator
    ).confidence_interval
    return Interval(ratio, float(drawn.low), float(drawn.high))


def log_ratio_interval(logs: Sequence[float]) -> Interval:
    """The geometric mean of ratios given as logarithms, with the 95 % t-interval. One has none: (ratio, 0, inf)."""
    from scipy import stats

    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return Interval(math.exp(middle), 0.0, math.inf)
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half))
