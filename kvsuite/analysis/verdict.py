"""From an interval to a verdict, and to how many samples would give one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kvsuite.analysis.stats import FEW, LEVEL, Estimate, Interval, holm

Verdict = Literal["harmful", "within margin", "undecided", "partial"]
"""*partial*: answers are missing. Those that are there may be the short ones, so they decide nothing."""
POWER = 0.8


@dataclass(frozen=True)
class Effect:
    """One endpoint of one method: what was seen, whether it matters, and what could have been seen."""

    endpoint: str
    estimate: Estimate
    limit: float
    """The value from which it does harm: the margin's edge."""
    worse: Literal[-1, 1]
    """Whether smaller or larger is worse."""
    n: int
    """Samples it rests on."""
    p: float | None = None
    """Of no difference at all."""
    adjusted: float | None = None
    """That p after Holm's correction over all primary endpoints of all methods."""
    verdict: Verdict = "undecided"
    ratio: bool = False
    """1 is no effect, else 0 is."""
    lacking: tuple[int, int] | None = None
    """Of so many samples (or rounds) that were to be compared, those that could be; None where all could."""

    @property
    def visible(self) -> float:
        """The smallest effect that this sample would have told from none, 4 times of 5: relative for a ratio."""
        reach = max(_reach(self.estimate.df) * self.estimate.se, self.estimate.unseen * self.estimate.room)
        return math.expm1(reach) if self.ratio and reach < 100 else reach

    @property
    def needed(self) -> float:
        """Samples of this kind after which a method without an effect is found within its margin 4 times of 5."""
        return samples_needed(self.estimate, self.n, abs(self.limit - 1) if self.ratio else abs(self.limit), self.ratio)


def judge(interval: Interval, limit: float, worse: Literal[-1, 1]) -> Verdict:
    """harmful: all of the interval is beyond the limit; within margin: none of it is."""
    best, worst = (interval.low, interval.high) if worse > 0 else (-interval.high, -interval.low)
    edge = limit * worse
    if best > edge:
        return "harmful"
    return "within margin" if worst <= edge else "undecided"


def effect(
    endpoint: str,
    estimate: Estimate,
    margin: float,
    worse: Literal[-1, 1],
    n: int,
    p: float | None,
    ratio: bool = False,
    compared: int = 0,
    asked: int = 0,
) -> Effect:
    """An endpoint with its verdict, which is *partial* where fewer than were ``asked`` could be ``compared``."""
    limit = (1 if ratio else 0) + worse * margin
    verdict: Verdict = "undecided" if math.isnan(estimate.mean) else judge(estimate, limit, worse)
    lacking = (compared, asked) if compared < asked else None
    if lacking:
        verdict = "partial"
    return Effect(endpoint, estimate, limit, worse, n, p, verdict=verdict, ratio=ratio, lacking=lacking)


def overall(effects: list[Effect]) -> Verdict:
    """Of several endpoints: harmful if one is, within margin if all are."""
    found = {e.verdict for e in effects}
    if "harmful" in found:
        return "harmful"
    return "within margin" if found == {"within margin"} else "undecided"


def corrected(effects: list[Effect]) -> list[Effect]:
    """The same with Holm's p over all of them."""
    adjusted = iter(holm([e.p for e in effects if e.p is not None]))
    return [e if e.p is None else replace(e, adjusted=next(adjusted)) for e in effects]


def samples_needed(seen: Estimate, n: int, margin: float, ratio: bool = False, power: float = POWER) -> float:
    """How many samples like these ``n`` decide a margin: a method without an effect is then found within it with
    probability ``power``. Infinite for a margin of 0, which no effect of 0 can keep away from."""
    if margin <= 0 or not math.isfinite(seen.se):
        return math.inf
    width = math.log1p(margin) if ratio else margin
    from scipy import stats

    reach = float(stats.norm.ppf(1 - LEVEL / 2)) + float(stats.norm.ppf(power))
    enough = max(n * reach**2 * (seen.se / width) ** 2, FEW)
    while seen.room and _passes(enough, seen.share, margin / seen.room, seen.se * math.sqrt(n / enough), width) < power:
        enough *= 1.01
    return enough


def _passes(n: float, share: float, edge: float, se: float, width: float) -> float:
    """The probability that ``n`` samples of which a ``share`` changes much find a method without an effect within its
    margin: where fewer than ``FEW`` do, it takes a share whose upper limit is within the ``edge``."""
    from scipy import stats

    k, z = np.arange(FEW), float(stats.norm.ppf(1 - LEVEL / 2))
    upper = (k + z**2 / 2 + z * np.sqrt(k * (n - np.minimum(k, n)) / n + z**2 / 4)) / (n + z**2)
    chance = stats.binom.pmf(k, round(n), min(share, 1))
    many = float(stats.norm.cdf(width / se - z)) if se > 0 else 1.0
    return float(chance @ (upper <= edge) + (1 - chance.sum()) * many)


def chances(
    seen: Estimate, n: int, planned: int, effect: float, margin: float, ratio: bool = False
) -> dict[Verdict, float]:
    """The probability of every verdict on a method with a true ``effect`` (bad is positive; relative for a ratio) from
    ``planned`` samples with the spread of these ``n``."""
    from scipy import stats

    true, edge = (math.log1p(effect), math.log1p(margin)) if ratio else (effect, margin)
    away = (edge - true) / (seen.se * math.sqrt(n / planned))
    reach = float(stats.t.ppf(1 - LEVEL / 2, max(planned - 1, 1)))
    within, harmful = float(stats.norm.cdf(away - reach)), float(stats.norm.cdf(-away - reach))
    return {"harmful": harmful, "within margin": within, "undecided": 1 - within - harmful}


def _reach(df: float) -> float:
    """Standard errors between no effect and one that is found with ``POWER``."""
    from scipy import stats

    return float(stats.t.ppf(1 - LEVEL / 2, df) + stats.norm.ppf(POWER)) if df else math.inf
