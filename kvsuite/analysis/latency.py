"""Seconds over length: lines and parabolas with their intervals, and the length from which a method pays.

One measurement is one cell or one block, not one token: tokens of a step are no independent measurements. Intervals are
those of ordinary least squares with t: they hold where the spread does not depend on the length. Where it is a part of
the time (3 % at 256 to 4,096 tokens, simulated) a slope's interval covers 92 % and a parabola's last one 90 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvsuite.analysis.resample import Floats
from kvsuite.analysis.stats import LEVEL, Estimate, Interval
from kvsuite.errors import UsageError

Side = Literal["longer", "shorter", "everywhere", "nowhere"]
Piece = tuple[float, float]
PARALLEL = 1e-9
"""Relative difference of two slopes that is rounding."""


@dataclass(frozen=True)
class Fit:
    """Seconds = Σ coefficient_k · length^k by least squares, of ``n`` measurements."""

    coefficients: tuple[Estimate, ...]
    """Lowest power first: seconds, seconds per token, seconds per token²; with 95 % t-intervals."""
    covariance: Floats
    """(k, k), of the coefficients."""
    residual: float
    """Standard deviation of one measurement around the curve, seconds."""
    df: int
    n: int
    lengths: tuple[float, float]
    """The shortest and the longest that were measured."""

    def at(self, length: float, single: bool = False) -> Interval:
        """Seconds at a length, with the 95 % interval of the curve – or, if ``single``, of one more measurement."""
        powers = float(length) ** np.arange(len(self.coefficients))
        middle = float(powers @ [c.mean for c in self.coefficients])
        spread = float(powers @ self.covariance @ powers) + single * self.residual**2
        reach = _t(self.df) * math.sqrt(max(spread, 0.0))
        return Interval(middle, middle - reach, middle + reach)


def itl_fit(lengths: Sequence[float] | Floats, seconds: Sequence[float] | Floats) -> Fit:
    """Seconds of a step, or between tokens, over the tokens in the cache: intercept + slope · length. Both (n,). Raises
    UsageError for fewer than 2 distinct lengths and for times that are not over 0."""
    return fit(lengths, _times(seconds), 1)


def ttft_fit(lengths: Sequence[float] | Floats, seconds: Sequence[float] | Floats) -> Fit:
    """Seconds to the first token over the prompt's tokens, quadratic because attention is. Both (n,). Raises UsageError
    for fewer than 3 distinct lengths and for times that are not over 0."""
    return fit(lengths, _times(seconds), 2)


def fit(lengths: Sequence[float] | Floats, seconds: Sequence[float] | Floats, degree: int) -> Fit:
    """A polynomial through (n,) measurements, which may be paired differences of two methods. Raises UsageError for
    fewer than ``degree`` + 1 distinct lengths, and for so few measurements that any polynomial would pass exactly."""
    x, y = np.asarray(lengths, dtype=float), np.asarray(seconds, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise UsageError(f"there are {x.size} lengths and {y.size} times; each measurement has one of both")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x >= 0).all()):
        raise UsageError("a length or a time is not a number, or a length is below 0")
    distinct = len(np.unique(x))
    if distinct <= degree or len(x) < degree + 2:
        shape = {1: "line", 2: "parabola"}.get(degree, f"polynomial of degree {degree}")
        raise UsageError(
            f"a {shape} over length needs {degree + 2} measurements at {degree + 1} lengths or more, not {len(x)} at "
            f"{distinct}"
        )
    from statsmodels.regression.linear_model import OLS

    powers = np.arange(degree + 1)
    found = OLS(y, (x[:, None] / x.max()) ** powers).fit()  # lengths as parts of the longest: squares stay near 1
    unit = x.max() ** -powers.astype(float)
    ends = np.asarray(found.conf_int(LEVEL)) * unit[:, None]
    rows = zip(found.params * unit, ends, found.bse * unit, strict=True)
    df = int(found.df_resid)
    coefficients = tuple(Estimate(float(m), float(e[0]), float(e[1]), float(se), df) for m, e, se in rows)
    covariance = np.asarray(found.cov_params()) * np.outer(unit, unit)
    return Fit(coefficients, covariance, math.sqrt(found.scale), df, len(x), (float(x.min()), float(x.max())))


def _times(seconds: Sequence[float] | Floats) -> Floats:
    column = np.asarray(seconds, dtype=float)
    if not (column > 0).all():
        raise UsageError("a measured time is not over 0 seconds")
    return column


def _t(df: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(1 - LEVEL / 2, df))


@dataclass(frozen=True)
class BreakEven:
    """Where a method's line crosses the baseline's, among lengths from 0 on."""

    length: float | None
    """Where the two lines cross; None where they do not."""
    pieces: tuple[Piece, ...]
    """Fieller's 95 % set: the lengths that the measurements do not exclude as the crossing. It has a piece with two
    ends, pieces without an end, or is everything, (0, ∞), where the slopes cannot be told apart; it is empty where the
    lines surely cross nowhere."""
    faster: Side
    """Where the method is the faster one, by the two lines: at longer or shorter lengths than ``length``, at every one
    or at none."""
    note: str
    """What keeps ``pieces`` from being a plain interval; empty where nothing does."""

    def holds(self, length: float) -> bool:
        """Whether a length can be the crossing."""
        return any(low <= length <= high for low, high in self.pieces)


def break_even(method: Fit, base: Fit | None = None) -> BreakEven:
    """From which length on, or up to which, a method's step takes less time than the baseline's. Works for any two
    lines over length. Without ``base``, ``method`` is the line of paired differences, method less baseline, which is
    better where both were timed in turn. Raises UsageError for what is no line.

    The interval is that of Fieller (1954, Some problems in interval estimation): all lengths at which the difference of
    the lines is within t standard errors of 0; a ratio ± standard errors would miss that it may be unbounded. Degrees
    of freedom of two lines are Satterthwaite's at the crossing.
    """
    fits = [method] if base is None else [method, base]
    if any(len(f.coefficients) != 2 for f in fits):
        raise UsageError("a break-even length is where two lines cross; these are no lines")
    unit = max(f.lengths[1] for f in fits)
    scale = np.array([1.0, unit])
    sign = (1, -1)
    gap = scale * sum(s * np.array([c.mean for c in f.coefficients]) for s, f in zip(sign, fits, strict=False))
    spreads = [f.covariance * np.outer(scale, scale) for f in fits]
    if abs(gap[1]) <= PARALLEL * unit * max(abs(f.coefficients[1].mean) for f in fits) and base is not None:
        gap[1] = 0.0
    crossing = None if gap[1] == 0 else -gap[0] / gap[1]
    point = np.array([0.0, 1.0] if crossing is None else [1.0, crossing])
    found = _fieller(gap, sum(spreads, np.zeros((2, 2))), _t(_satterthwaite(point, spreads, [f.df for f in fits])))
    pieces = tuple((max(low, 0.0) * unit, high * unit) for low, high in found if high >= 0)
    there = crossing is not None and crossing >= 0
    faster = _side(gap, there)
    measured = (min(f.lengths[0] for f in fits), unit)
    cut = any(low < 0 for low, _ in found)
    length = float(crossing * unit) if there and crossing is not None else None
    return BreakEven(length, pieces, faster, _note(pieces, cut, faster, measured))


def _satterthwaite(point: Floats, spreads: Sequence[Floats], df: Sequence[int]) -> float:
    parts = [float(point @ spread @ point) for spread in spreads]
    if sum(parts) <= 0:
        return float(min(df))
    return float(sum(parts) ** 2 / sum(p**2 / d for p, d in zip(parts, df, strict=True)))


def _fieller(gap: Floats, spread: Floats, reach: float) -> list[Piece]:
    """The real x with (gap₀ + gap₁·x)² ≤ reach² · (1, x) spread (1, x)ᵀ, that is c + 2·b·x + a·x² ≤ 0."""
    c, b, a = (
        float(gap[i] * gap[j] - reach**2 * (spread[i, j] + spread[j, i]) / 2) for i, j in ((0, 0), (0, 1), (1, 1))
    )
    if a == 0:
        if b == 0:
            return [(-math.inf, math.inf)] if c <= 0 else []
        end = -c / (2 * b)
        return [(-math.inf, end)] if b > 0 else [(end, math.inf)]
    inside = b * b - a * c
    if a < 0 and inside <= 0:
        return [(-math.inf, math.inf)]
    root = math.sqrt(max(inside, 0.0))  # over 0 but for rounding: the crossing itself is always in the set
    low, high = sorted(((-b - root) / a, (-b + root) / a))
    return [(low, high)] if a > 0 else [(-math.inf, low), (high, math.inf)]


def _side(gap: Floats, crosses: bool) -> Side:
    if crosses:
        return "longer" if gap[1] < 0 else "shorter"
    return "everywhere" if gap[0] < 0 else "nowhere"


def _note(pieces: Sequence[Piece], cut: bool, faster: Side, measured: Piece) -> str:
    span = f"{measured[0]:,.0f} to {measured[1]:,.0f} tokens"
    if not pieces:
        return f"the lines cross at no length: the method is faster {faster}"
    if pieces[0] == (0, math.inf):
        return "the two lines cannot be told apart: any length can be the break-even, or none"
    if len(pieces) > 1 or pieces[-1][1] == math.inf:
        return "the slopes cannot be told apart: the break-even length has no upper limit, and there may be none"
    if cut:
        return "the lines may cross at no length at all"
    if pieces[0][1] > measured[1] or pieces[0][0] < measured[0]:
        return f"reaches beyond the lengths measured, {span}: it holds if the lines stay straight"
    return ""
