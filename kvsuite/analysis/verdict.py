"""From estimates to verdicts over all that a run shows, and to how many samples would give one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kvsuite.analysis.shares import Side
from kvsuite.analysis.stats import FEW, LEVEL, Estimate, Interval, holm
from kvsuite.margins import Margins

Verdict = Literal["harmful", "within margin", "undecided", "not excluded", "capped", "cannot tell", "partial"]
"""*not excluded*: of an endpoint that can only convict, and does not. *capped*: answers end at the cap, so longer ones
could not be seen. *cannot tell*: what measured it cannot be believed enough to clear a method (`validity`).
*partial*: answers are missing. Those that are there may be the short ones, so they decide nothing."""
Limits = tuple[float, float]
"""Below the one and above the other it does harm; infinite where there is no such side."""
POWER = 0.8
SPEED = "speed"
"""Judged with the others, but no damage."""


@dataclass(frozen=True)
class Effect:
    """One endpoint of one method: what was seen, whether it matters, and what could have been seen."""

    endpoint: str
    estimate: Estimate
    limits: Limits
    n: int
    """Samples it rests on."""
    ratio: bool = False
    """1 is no effect, else 0 is."""
    lacking: tuple[int, int] | None = None
    """Of so many samples (or rounds) that were to be compared, those that could be; None where all could."""
    capped: bool = False
    """Whether the cap hides what would be harmful."""
    withheld: bool = False
    """Whether nothing good may be said of it, as what measured it cannot be believed."""
    veto: bool = False
    """Whether it can only convict."""
    adjusted: float | None = None
    """One-sided p of harm, after Holm's correction over all that was decided together."""
    verdict: Verdict = "undecided"
    levels: tuple[float, float] = (LEVEL, LEVEL)
    """One-sided, at which it is held against harm, and against being safe."""

    @property
    def judged(self) -> bool:
        """Whether it can be in a family of tests."""
        return self.verdict != "partial" and self.estimate.known

    @property
    def sides(self) -> list[Side]:
        """On which harm is."""
        both: tuple[Side, Side] = (-1, 1)
        return [side for side in both if math.isfinite(self.limits[side > 0])]

    def harm(self, side: Side) -> float:
        """One-sided p of harm on that side: small where the effect is beyond the limit."""
        return self.estimate.p(self.limits[side > 0], side)

    @property
    def safe(self) -> float:
        """p of being within all limits, each tested one-sided (TOST)."""
        return max(self.estimate.p(self.limits[s > 0], -1 if s > 0 else 1, safe=True) for s in self.sides)

    @property
    def margin(self) -> float:
        """The distance between no effect and a limit."""
        edge = self.limits[1] if math.isfinite(self.limits[1]) else self.limits[0]
        return abs(edge - self.ratio)

    @property
    def visible(self) -> float:
        """The smallest effect that this sample would have told from none, 4 times of 5: relative for a ratio."""
        found = self.estimate
        if not found.known or not math.isfinite(found.se) or (self.ratio and found.mean <= 0):
            return math.inf
        from scipy.special import nctdtrinc, ndtri  # of the noncentral t, and of the normal distribution

        def away(side: Side) -> float:
            end = found.bound(side, self.levels[0])
            return abs(math.log(end / found.mean) if self.ratio and end > 0 else end - found.mean)

        reach, se, power = max(away(1 if side < 0 else -1) for side in self.sides), found.se, float(ndtri(POWER))
        for _ in range(20 if found.pairs else 0):  # shares that had that effect would vary, also where these do not
            share = min(reach + power * se, 1.0)
            se = max(found.se, math.sqrt(share * (1 - share) / self.n))
        if not found.pairs and se > 0 and math.isfinite(reach):  # a spread that is estimated takes some power
            away_by = float(nctdtrinc(found.df, 1 - POWER, reach / se))
            power = away_by - reach / se if math.isfinite(away_by) else power
        seen = reach + power * se
        return math.expm1(seen) if self.ratio and seen < 100 else seen

    @property
    def decides(self) -> float:
        """Samples of this kind after which the effect, if it is as seen, is found harmful or within its margin 4 times
        of 5. Infinite for one at the margin's edge."""
        seen, (low, high) = self.estimate, self.limits
        if not math.isfinite(seen.se) or (self.ratio and seen.mean <= 0):
            return math.inf
        mean, low, high = (math.log(x) if self.ratio and x > 0 else x for x in (seen.mean, low, high))
        inside = min(mean - low, high - mean)
        if inside > 0:
            margin = math.expm1(min(inside, 9)) if self.ratio else inside
            return samples_needed(seen, self.n, margin, self.ratio, level=self.levels[1])
        from scipy.special import ndtri

        reach = float(ndtri(POWER) - ndtri(self.levels[0]))
        return max(self.n * (reach * seen.se / inside) ** 2, 2) if inside else math.inf

    @property
    def needed(self) -> float:
        """Samples of this kind after which a method without an effect is found within its margin 4 times of 5."""
        return samples_needed(
            self.estimate, self.n, self.margin, self.ratio, level=self.levels[1], sides=len(self.sides)
        )


def effect(
    endpoint: str,
    estimate: Estimate,
    margin: float,
    direction: Literal[-1, 0, 1],
    n: int,
    ratio: bool = False,
    compared: int = 0,
    asked: int = 0,
    capped: bool = False,
) -> Effect:
    """An endpoint before its verdict. Smaller (-1), larger (1), or both (0) are worse; a margin to both sides of a
    ratio is to x and to 1/x. Fewer ``compared`` than ``asked`` make it *partial*."""
    high = 1 + margin if ratio else margin
    low = -margin if not ratio else 1 / high if direction == 0 else 1 - margin
    limits = (-math.inf if direction > 0 else low, math.inf if direction < 0 else high)
    lacking = (compared, asked) if compared < asked else None
    verdict: Verdict = "partial" if lacking else "undecided"
    return Effect(endpoint, estimate, limits, n, ratio, lacking, capped, verdict=verdict)


def judge(interval: Interval, limits: Limits) -> Verdict:
    """harmful: all of the interval is beyond one limit; within margin: none of it is beyond any."""
    low, high = limits
    if interval.low > high or interval.high < low:
        return "harmful"
    return "within margin" if low <= interval.low and interval.high <= high else "undecided"


Named = tuple[str, Effect]
"""A method and one of its endpoints."""


def decide(found: Sequence[Named], margins: Margins | None = None) -> list[Named]:
    """All endpoints of all methods with their verdicts, adjusted p and interval ends, of which any *harmful* errs with
    probability ``LEVEL`` at most: Holm over the one-sided p of harm, those of both sides where both are worse. With r
    of m rejected, an end that could show harm has the level α / (m - r): it is beyond the limit where, and only where,
    harm is found.

    A method is within its margins where each of its endpoints is (TOST), Holm over methods, by its largest p; ends that
    could show that have the level this leaves. Endpoints in ``margins.veto`` are left out of it, and so is speed, of
    which methods are a family of their own."""
    veto = set(margins.veto) if margins else set()
    tests = [(at, e.harm(side)) for at, (_, e) in enumerate(found) if e.judged for side in e.sides]
    adjusted = holm([p for _, p in tests])
    harm = _level(adjusted)
    lowest: dict[int, float] = {}
    for (at, _), p in zip(tests, adjusted, strict=True):
        lowest[at] = min(p, lowest.get(at, 1.0))
    damage = _safe_level([x for x in found if x[1].endpoint != SPEED and x[1].endpoint not in veto])
    speed = _safe_level([x for x in found if x[1].endpoint == SPEED])
    decided = []
    for at, (name, e) in enumerate(found):
        if at in lowest:
            levels = (harm, speed if e.endpoint == SPEED else damage)
            e = _verdict(replace(e, adjusted=lowest[at], levels=levels, veto=e.endpoint in veto))
        decided.append((name, e))
    return decided


def _level(adjusted: Sequence[float]) -> float:
    """The one-sided level of Holm's step at which nothing more was rejected."""
    return LEVEL / max(sum(p > LEVEL for p in adjusted), 1)


def _safe_level(found: Sequence[Named]) -> float:
    """That at which no further method is within its margins."""
    largest: dict[str, float] = {}
    for name, e in found:
        safe = e.safe if e.judged and not (e.capped or e.withheld) else 1.0
        largest[name] = max(safe, largest.get(name, 0.0))
    return _level(holm(list(largest.values())))


def _verdict(e: Effect) -> Effect:
    assert e.adjusted is not None
    verdict: Verdict = "undecided"
    if e.adjusted <= LEVEL:
        verdict = "harmful"
    elif e.capped:
        verdict = "capped"
    elif e.veto:
        verdict = "not excluded"
    elif e.safe <= e.levels[1]:
        verdict = "cannot tell" if e.withheld else "within margin"
    return replace(e, verdict=verdict, estimate=replace(e.estimate, low=_end(e, -1), high=_end(e, 1)))


def _end(e: Effect, side: Side) -> float:
    """The low (-1) or high (1) end of the interval. An end is held against the limit on its own side, which it must not
    pass where the method is safe, and against the other, which it has passed where it is harmful."""
    harm, safe = e.estimate.bound(side, e.levels[0]), e.estimate.bound(side, e.levels[1], safe=True)
    here, there = e.limits[side > 0], e.limits[side < 0]
    if math.isinf(here):
        return harm
    passed = max(harm, safe) > there if side < 0 else min(harm, safe) < there
    return harm if passed else safe


def overall(effects: Sequence[Effect]) -> Verdict:
    """Of a method's decided endpoints: harmful if one is, within margin if all that must be are. Speed is no damage."""
    damage = [e for e in effects if e.endpoint != SPEED]
    if any(e.verdict == "harmful" for e in damage):
        return "harmful"
    deciding = {e.verdict for e in damage if not e.veto}
    return "within margin" if deciding == {"within margin"} else "undecided"


def samples_needed(
    seen: Estimate,
    n: int,
    margin: float,
    ratio: bool = False,
    power: float = POWER,
    level: float = LEVEL,
    sides: int = 1,
) -> float:
    """How many samples like these ``n`` decide a margin: a method without an effect is then found within it with
    probability ``power``. Infinite for a margin of 0, which no effect of 0 can keep away from."""
    if margin <= 0 or not math.isfinite(seen.se):
        return math.inf
    width = math.log1p(margin) if ratio else margin
    from scipy import stats

    z = float(stats.norm.isf(level))
    reach = z + float(stats.norm.ppf(1 - (1 - power) / sides))
    enough = max(n * reach**2 * (seen.se / width) ** 2, FEW if seen.room else 2)
    chance = 0.0
    while chance < power:
        se = seen.se * math.sqrt(n / enough)
        if not seen.room:  # so few may do that t is no normal distribution
            z = float(stats.t.isf(level, enough - 1))
        chance = 1 - sides * (1 - _passes(enough, seen, margin, (width / se if se else math.inf), z))
        enough *= 1.01
    return enough / 1.01


def _passes(n: float, seen: Estimate, margin: float, away: float, z: float) -> float:
    """The probability that ``n`` samples find a method without an effect within a limit that is ``away``, in standard
    errors: where fewer than ``FEW`` change much, it takes a share whose upper limit is within the margin."""
    from scipy import stats

    many = float(stats.norm.cdf(away - z))
    if not seen.room:
        return many
    k = np.arange(FEW)
    upper = (k + z**2 / 2 + z * np.sqrt(k * (n - np.minimum(k, n)) / n + z**2 / 4)) / (n + z**2)
    chance = stats.binom.pmf(k, round(n), min(seen.share, 1))
    return float(chance @ (upper <= margin / seen.room) + (1 - chance.sum()) * many)
