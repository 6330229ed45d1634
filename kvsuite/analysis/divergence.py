"""Teacher-forced divergence: how far a method's next-token distribution is from the baseline's, on the baseline's text.

The baseline's tokens are forced through the method's decode path, so positions correspond and thousands of them come
from one prompt. KL is of the baseline against the method, in nats, as in llama.cpp's tables of KL divergence
(tools/perplexity/README.md), whose "same top" is 1 less the share of flips here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from kvsuite.analysis.resample import DRAWS, Design, Floats, Places
from kvsuite.analysis.stats import LEVEL, Estimate, Interval, Ratio, estimate, wilson
from kvsuite.errors import UsageError

BELOW = 1e-4
"""By how much rounding may carry a KL below 0."""
SHARES = (0.5, 0.99)
"""The percentiles of the KL that are shown."""


@dataclass(frozen=True)
class Positions:
    """What was seen at every forced position; all columns are (n,). Raises UsageError for columns that do not fit
    together or hold what cannot be."""

    prompt: Sequence[str]
    """Which prompt it belongs to: positions of one prompt are not independent."""
    kl: Floats
    flip: Floats
    """1 where the most likely token differs, else 0."""
    loss: Floats
    """By how much the log probability of the forced token fell, nats."""
    dataset: Sequence[str] = ()
    """Where the prompt is from; empty where all are from one."""

    def __post_init__(self) -> None:
        sizes = {f.name: len(getattr(self, f.name)) for f in fields(self) if f.name != "dataset" or self.dataset}
        if len(set(sizes.values())) > 1 or not len(self.kl):
            said = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise UsageError(f"positions of teacher forcing need columns of one length over 0, not {said}")
        if not all(np.isfinite(x).all() for x in (self.kl, self.flip, self.loss)):
            raise UsageError("a divergence is not a number")
        if (self.kl < -BELOW).any() or not np.isin(self.flip, (0, 1)).all():
            raise UsageError("a KL is below 0, or a flip is neither 0 nor 1")

    @property
    def change(self) -> Floats:
        """|Δ log p| of the forced token."""
        return np.abs(self.loss)


@dataclass(frozen=True)
class _Prompts:
    """Positions summed within prompts, which are what is resampled: thousands of positions cost what one does."""

    design: Design
    codes: Places
    """(positions,): whose they are."""
    sizes: Floats
    """(prompts,): positions of each."""

    @classmethod
    def of(cls, at: Positions) -> _Prompts:
        keys = list(zip(at.dataset or [""] * len(at.prompt), at.prompt, strict=True))
        known = {key: code for code, key in enumerate(dict.fromkeys(keys))}
        codes = np.array([known[key] for key in keys], dtype=np.intp)
        design = Design.of([dataset for dataset, _ in known], [prompt for _, prompt in known])
        return cls(design, codes, np.bincount(codes).astype(float))

    def mean(self, column: Floats, bounds: tuple[float, float]) -> Ratio:
        return Ratio(self._sums(column), self.sizes, bounds=bounds, skewed=True)

    def share(self, column: Floats, bounds: tuple[float, float]) -> Ratio:
        """Of flips. Where fewer than ten prompts had any, others still could: as much as the worst that was seen, one
        position of the longest at least."""
        changed = self._sums(np.abs(column))
        worst = max(float((changed / self.sizes).max()), 1 / float(self.sizes.max()))
        return Ratio(self._sums(column), self.sizes, large=changed != 0, room=(worst, worst), bounds=bounds)

    def below(self, column: Floats, share: float) -> Ratio:
        """The share of positions at or below a percentile of theirs."""
        edge = np.quantile(column, share, method="inverted_cdf")
        return self.mean((column <= edge).astype(float), (0, 1))

    def _sums(self, column: Floats) -> Floats:
        return np.asarray(np.bincount(self.codes, weights=column), dtype=np.float64)


@dataclass(frozen=True)
class Divergence:
    """A method against the baseline over all positions; intervals are 95 %, of prompts resampled."""

    n: int
    """Positions."""
    prompts: int
    kl: Estimate
    """Mean."""
    flips: Estimate
    """Share."""
    change: Estimate
    """Mean |Δ log p|."""
    perplexity: Estimate
    """Of the forced text, as a multiple of the baseline's."""
    p50: Interval
    """Of the KL."""
    p99: Interval
    largest: float
    """KL; the largest to come has no upper limit."""
    excess: dict[str, Estimate]
    """kl, flips and change beyond the control's on the same positions; empty where no floor was measured."""
    note: str
    """Why there is no excess."""


def divergence(method: Positions, control: Positions | None = None, draws: int = DRAWS, seed: int = 0) -> Divergence:
    """The figures of a method, and their excess over a control that differs from the baseline by noise alone. Raises
    UsageError where the control's positions are not the method's."""
    prompts = _Prompts.of(method)
    asked = _asked(prompts, method.kl, method.flip, method.change, 0.0)
    asked += [prompts.mean(method.loss, (-math.inf, math.inf))]
    asked += [prompts.below(method.kl, share) for share in SHARES]
    note = "no control, so the noise is not known"
    if control is not None:
        _same(method, control)
        note = "no floor measured: the control gave the baseline's very distributions"
        if control.kl.any() or control.flip.any() or control.change.any():
            note = ""
            differences = (method.kl - control.kl, method.flip - control.flip, method.change - control.change)
            asked += _asked(prompts, *differences, -math.inf)
    kl, flips, change, loss, p50, p99, *excess = estimate(prompts.design, asked, draws=draws, seed=seed)
    return Divergence(
        n=len(method.kl),
        prompts=len(prompts.sizes),
        kl=kl,
        flips=flips,
        change=change,
        perplexity=Estimate.of(math.exp(loss.mean), loss.se, loss.df, log=True, bounds=(0.0, math.inf), skew=loss.skew),
        p50=_percentile(method.kl, SHARES[0], p50),
        p99=_percentile(method.kl, SHARES[1], p99),
        largest=float(method.kl.max()),
        excess=dict(zip(("kl", "flips", "change"), excess, strict=False)),
        note=note,
    )


def _asked(prompts: _Prompts, kl: Floats, flip: Floats, change: Floats, least: float) -> list[Ratio]:
    """``least`` is how low a mean can be: 0, or -∞ for a difference."""
    means = [prompts.mean(column, (least, math.inf)) for column in (kl, change)]
    return [means[0], prompts.share(flip, (max(least, -1.0), 1.0)), means[1]]


def _same(method: Positions, control: Positions) -> None:
    for at, (mine, theirs) in enumerate(zip(method.prompt, control.prompt, strict=False)):
        if mine != theirs:
            raise UsageError(f"position {at} belongs to prompt {mine} of the method but {theirs} of the control")
    if len(method.prompt) != len(control.prompt):
        raise UsageError(f"the method has {len(method.prompt)} positions, its control {len(control.prompt)}")


def _percentile(column: Floats, share: float, below: Estimate) -> Interval:
    """Woodruff's interval (1952, Confidence intervals for medians and other position measures): the places in order
    that are t standard errors of the share ``below`` away, those of independent positions at least. ∞ where there is
    no place so far up."""
    from scipy.special import stdtrit  # quantile of t

    ordered, n = np.sort(column), len(column)
    se = max(below.se, math.sqrt(share * (1 - share) / n))
    reach = float(stdtrit(below.df, 1 - LEVEL / 2)) * se if below.df else math.inf
    first = max(math.ceil((share - reach) * n), 1) - 1 if reach < share else 0
    last = math.floor((share + reach) * n) if reach < 1 else n
    seen = float(np.quantile(column, share, method="inverted_cdf"))
    return Interval(seen, float(ordered[first]), float(ordered[last]) if last < n else math.inf)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """t_div, the place of the first differing token, from 0. None where the answers are equal or one begins with the
    other: as a stop token belongs to its answer, the shorter one was then cut off, and no difference was seen."""
    if one == other:
        return None
    return next((at for at, differs in enumerate(map(operator.ne, one, other)) if differs), None)


@dataclass(frozen=True)
class Parting:
    """When the answers of two arms part."""

    n: int
    """Pairs."""
    diverged: Interval
    """The share of pairs with a difference, as long as they were; Wilson's interval."""
    median: Interval
    """Tokens before the first difference in half of the pairs. ∞ where fewer than half parted."""


def parting(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Parting:
    """Of pairs of answers, tokens with their stop token, one pair a prompt. Raises UsageError where there is none.

    The median is Kaplan and Meier's: a pair without a difference, after the tokens both have, counts as parting later,
    at the rate of those that go on. For pairs that agreed up to their stop token that is a supposition; ``diverged``
    needs none. Its interval is made from log(-log) of the curve.
    """
    if not pairs:
        raise UsageError("there are no pairs of answers to compare")
    places = [first_difference(one, other) for one, other in pairs]
    # without a difference all of the common tokens were equal, so the pair was last seen at the last of them
    times = [min(map(len, pair)) - 1 if at is None else at for at, pair in zip(places, pairs, strict=True)]
    parted = np.array([at is not None for at in places])
    share = wilson(int(parted.sum()), len(pairs))
    if not parted.any():
        return Parting(len(pairs), share, Interval(math.inf, 0.0, math.inf))
    from statsmodels.duration.survfunc import SurvfuncRight

    with np.errstate(divide="ignore", invalid="ignore"):  # where the curve is 1 or 0
        curve = SurvfuncRight(np.array(times, dtype=float), parted.astype(float))
        middle, (low, high) = float(curve.quantile(0.5)), curve.quantile_ci(0.5)
    ends = (0.0 if math.isnan(low) else float(low), math.inf if math.isnan(high) else float(high))
    return Parting(len(pairs), share, Interval(math.inf if math.isnan(middle) else middle, *ends))
