"""Intervals."""

from __future__ import annotations

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
