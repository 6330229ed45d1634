"""Ratios of speeds from blocks, as trimmed means: one block that something held up counts for little."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from kvsuite.analysis.stats import Estimate

TRIMMED = 0.2
"""Of the blocks, at either end: one that something else held up counts for little."""
UNTRIMMED = 6
"""Blocks from which on some are trimmed: the interval of fewer would be too narrow."""


def log_ratio_interval(logs: Sequence[float]) -> Estimate:
    """The geometric mean of ratios given as logarithms, with the 95 % interval: both trimmed (``_trimmed``). One has
    none: (ratio, 0, inf)."""
    middle, variance, df = _trimmed(logs)
    return Estimate.of(math.exp(middle), math.sqrt(variance), df, log=True, bounds=(0.0, math.inf))


def log_change(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The ratio of two geometric means given as logarithms, at least two each, both trimmed (``_trimmed``), with
    Welch's degrees of freedom and 95 % interval."""
    (first, one, few), (later, other, many) = _trimmed(before), _trimmed(after)
    parts = one**2 / few + other**2 / many
    df = (one + other) ** 2 / parts if parts else many
    return Estimate.of(math.exp(later - first), math.sqrt(one + other), df, log=True, bounds=(0.0, math.inf))


def _trimmed(x: Sequence[float]) -> tuple[float, float, float]:
    """The trimmed mean, the square of its standard error from the winsorized variance, and its degrees of freedom (Yuen
    1974, The two-sample trimmed t for unequal population variances)."""
    n = len(x)
    cut = int(TRIMMED * n) if n >= UNTRIMMED else 0
    if n < 2:
        return statistics.fmean(x), math.inf, 0
    ordered, left = np.sort(np.asarray(x, dtype=float)), n - 2 * cut
    winsorized = np.clip(ordered, ordered[cut], ordered[n - 1 - cut])
    variance = float(winsorized.var(ddof=1)) * (n - 1) / (left * (left - 1))
    return float(ordered[cut : n - cut].mean()), variance, left - 1
