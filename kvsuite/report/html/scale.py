"""From numbers to places in a drawing, and which numbers stand beside an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

PAD = 0.08
"""Of an axis, left free at either end."""
STEPS = (1, 2, 5, 10)
WIDEST = 1.0
"""How far intervals may widen an axis, as a part of what its points take; they are cut beyond."""


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high``, drawn from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], ends: Iterable[float], start: float, end: float, log: bool = False
    ) -> Scale | None:
        """Around all values and, as far as there is room, the ``ends`` of their intervals; None where there is no value
        that it could show."""
        known, beyond = (
            [math.log10(x) if log else x for x in xs if math.isfinite(x) and (x > 0 or not log)]
            for xs in (values, ends)
        )
        if not known:
            return None
        low, high = min(known), max(known)
        room = WIDEST * (high - low or abs(high) or 1)
        low, high = max(min([low, *beyond]), low - room), min(max([high, *beyond]), high + room)
        pad = PAD * (high - low) or 0.5
        low, high = (x if x == 0 and not log else x + side * pad for x, side in ((low, -1), (high, 1)))
        return cls(10**low, 10**high, start, end, True) if log else cls(low, high, start, end)

    def at(self, x: float) -> float:
        """The place of a value; one that is outside lies at the edge."""
        low, high, x = (math.log10(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, x))
        part = min(max((x - low) / (high - low), 0.0), 1.0)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on the axis."""
        return self._powers(most) if self.log else self._linear(most)

    def _linear(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * s for s in STEPS if power * s >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _powers(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for kept in ((1, 2, 5), (1, 3), (1,)):
            found = [k * 10.0**d for d in decades for k in kept if self.low <= k * 10.0**d <= self.high]
            if len(found) <= most:
                break
        return found[:: max(1, math.ceil(len(found) / most))] if len(found) > 1 else self._linear(most)


def number(x: float) -> str:
    """A number beside an axis or in a sentence."""
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if x and abs(x) < 1e-3:
        power = math.floor(math.log10(abs(x)))
        return f"{x / 10**power:.2g}e{power}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
