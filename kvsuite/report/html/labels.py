"""Where names stand beside points: the first place that hides nothing, or the one that hides least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TALL = 14
"""Height of a name."""
AWAY = (10, 22, 36)
"""Distances from the point that are tried."""


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def common(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0) * max(tall, 0)

    @property
    def area(self) -> float:
        """Of all of it."""
        return (self.right - self.left) * (self.bottom - self.top)


def hidden(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """What a name hides of others and of points; what lies outside the frame counts three times."""
    return sum(map(box.common, taken)) + 3 * (box.area - box.common(frame))


def place(x: float, y: float, wide: float, taken: Sequence[Box], frame: Box) -> Box:
    """The box of a name ``wide`` units wide beside the point (x, y)."""
    tried = []
    for away in AWAY:
        beside = [(x + away, y + off) for off in (0, -away, away)] + [
            (x - away - wide, y + off) for off in (0, -away, away)
        ]
        for left, middle in (*beside, (x - wide / 2, y - away - 4), (x - wide / 2, y + away + 4)):
            tried.append(Box(left, middle - TALL / 2, left + wide, middle + TALL / 2))
    return min(tried, key=lambda box: hidden(box, taken, frame))  # the first of equal ones, which are the nearest
