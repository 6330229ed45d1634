"""What is drawn of a run, as numbers: axes, series of points with the ends of their intervals, and what lies beside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvsuite.analysis.table import Note

Drawn = Literal["points", "line", "steps", "dots", "bars"]
MANY = 24
"""Lone points with a name each: of more of them not all are named."""
DOTS = 60
"""Points that stand for a distribution at most."""


@dataclass(frozen=True)
class Axis:
    """One direction. Where it has ``rows`` its values are their places, from 0 at the top; else they are numbers."""

    name: str
    unit: str = ""
    log: bool = False
    rows: tuple[str, ...] = ()
    shown: tuple[float, ...] = ()
    """Values that must be in view."""


@dataclass(frozen=True)
class Point:
    """A value, with the ends of its 95 % interval where it has one: of y, or of x where the y axis has rows."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    said: str = ""
    """What a reader is told who points at it, beside its numbers."""


@dataclass(frozen=True)
class Series:
    """Points of one arm: an estimate each, a line through them, steps of a distribution, single observations, bars."""

    name: str
    arm: str
    """Who is drawn: the same arm looks alike in all figures."""
    points: Sequence[Point]
    draws: Drawn = "points"
    control: bool = False
    """Whether this is the baseline or noise, which other series are held against."""


@dataclass(frozen=True)
class Band:
    """A range of values (those of y, or of x where the y axis has rows): what noise alone does. Without a ``high`` it
    is a line."""

    name: str
    low: float
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """A place on the x axis of one arm, with the ends of its interval, infinite where it is open."""

    arm: str
    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One plot. Its key is stable; figures of several runs with the same key show the same."""

    key: str
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()
    marked: str = ""
    """What the marks are."""
    notes: Sequence[Note] = ()


@dataclass(frozen=True)
class Tile:
    """A ratio in one field of a map."""

    column: int
    row: int
    ratio: float
    mark: str = ""
    """Beside the number: what must be known of it."""
    faint: bool = False
    """Whether it says less than the others."""
    measured: bool = True


@dataclass(frozen=True)
class Map:
    """Ratios over two directions, both in steps: where they are above 1 and where below."""

    key: str
    title: str
    x: Axis
    y: Axis
    """Both have ``rows``."""
    tiles: Sequence[Tile]
    notes: Sequence[Note] = ()


def thinned(values: Iterable[float], most: int = DOTS) -> list[float]:
    """Sorted values; of more than ``most`` as many quantiles, each of which stands for the same number of values."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return ordered
    places = (np.arange(most) + 0.5) / most
    return [float(x) for x in np.quantile(ordered, places, method="inverted_cdf")]


def stand_for(n: int, what: str) -> str:
    """What a dot is, of a distribution of ``n``."""
    return f"Each dot is one {what}." if n <= DOTS else f"{DOTS} dots stand for {n:,} {what}s in equal parts."
