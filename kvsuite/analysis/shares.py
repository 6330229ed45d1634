"""Shares of few samples: Tango's score test of paired shares, and what a share that was seen leaves open (Wilson)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Side = Literal[-1, 1]
"""Below or above."""
Pairs = tuple[int, int, int]
"""Pairs only the one has, pairs only the other has, all pairs."""
EDGE = 1 - 1e-9
"""The largest difference of shares that is looked at."""


def tango_z(pairs: Pairs, difference: float) -> float:
    """How many standard errors the observed difference of two paired shares lies above a true one: the score
    statistic of Tango (1998, Statistics in Medicine 17:891, equations 8 to 10)."""
    one, other, n = pairs
    a, b, c = 2 * n, (2 * n - one + other) * difference - one - other, -other * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 4 * a * c, 0)) - b) / (2 * a)  # the other's share, as likely as can be
    variance = n * (2 * max(q, 0, -difference) + difference * (1 - difference))
    away = one - other - n * difference
    return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away)


def tango_p(pairs: Pairs, limit: float, side: Side) -> float:
    """One-sided p, small where the difference lies above (1) or below (-1) a limit."""
    from scipy.special import ndtr  # the normal distribution

    return float(ndtr(-side * tango_z(pairs, limit)))


def tango_bound(pairs: Pairs, side: Side, level: float) -> float:
    """The end, low (-1) or high (1), of the interval with that one-sided level."""
    from scipy.optimize import brentq
    from scipy.special import ndtri

    wanted = side * float(ndtri(level))

    def beyond(difference: float) -> float:
        return tango_z(pairs, difference) - wanted

    if beyond(-EDGE) <= 0:
        return -1.0
    return 1.0 if beyond(EDGE) >= 0 else float(brentq(beyond, -EDGE, EDGE, xtol=1e-12))


@dataclass(frozen=True)
class Unseen:
    """What unseen changes could do: a sample without a change has not shown that there are none, nor two that agree
    that all do. The share of clusters that change may be as far from the one seen as Wilson's limit."""

    changed: int
    """Clusters that changed much."""
    clusters: int
    room: tuple[float, float]
    """How far the figure would fall and rise if all changed as much as they can."""

    def reach(self, side: Side, level: float) -> float:
        """How far beyond the figure it may be, at a one-sided level."""
        from scipy.special import ndtri

        z, n = -float(ndtri(level)), self.clusters
        share = self.changed / n
        middle = (self.changed + z**2 / 2) / (n + z**2)
        half = z * math.sqrt(n * share * (1 - share) + z**2 / 4) / (n + z**2)
        return (half + abs(middle - share)) * self.room[side > 0]

    def p(self, side: Side, distance: float) -> float:
        """The level at which ``reach`` is that distance."""
        from scipy.special import ndtr

        if distance <= 0:
            return 1.0
        room, share = self.room[side > 0], self.changed / self.clusters
        further = distance / room if room > 0 else 1.0
        at = share + further if share <= 0.5 else share - further
        return float(ndtr(-further / math.sqrt(at * (1 - at) / self.clusters))) if 0 < at < 1 else 0.0
