"""A figure as SVG: axes, points, error bars, lines, bars, bands. Colours are the page's, by classes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from kvsuite.analysis.figure import MANY, Axis, Figure, Point, Series
from kvsuite.report.html.labels import Box, hidden, place
from kvsuite.report.html.scale import Scale, number

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 46
ROW, BAR, LABEL = 40, 13, 20
"""Heights: of a row, of a bar, and of the name above both."""
LANE = 11
"""Height that the mark of an arm takes below the points."""
COLOURS, MARKERS = 7, 8
LEADER = 14
"""Distance from which a line joins a name to its point."""
APART = 3.5
"""By how much the points of lines are moved aside, so that their intervals can be told apart."""
SHORT = 34
"""Characters of a name in a drawing."""
TOLD = 1500
"""Characters of a description."""
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z", "M-4-4h8v8h-8z", "M0-5.5L5 4h-10z", "M0-5.6L5.6 0 0 5.6-5.6 0z",
    "M0 5.5L5-4h-10z", "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "M0-5.5L5.2-1.7 3.2 4.5h-6.4L-5.2-1.7z", "M-5-3L-3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2-3 5-5 3-2 0z",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, everywhere on a page."""

    colour: str
    """A class of the page's style."""
    shape: str

    @classmethod
    def of(cls, arms: Sequence[str], controls: Sequence[str]) -> dict[str, Look]:
        """Of arms in their order: no two of 56 look alike. Controls are grey, with broken lines from the second on."""
        grey = {arm: cls("cn again" if at else "cn", SHAPES[at % MARKERS]) for at, arm in enumerate(controls)}
        return grey | {arm: cls(f"c{at % COLOURS}", SHAPES[at % MARKERS]) for at, arm in enumerate(arms)}


def look_of(series: Series, at: int, looks: Mapping[str, Look]) -> Look:
    """Of the series at this place of its figure."""
    return looks.get(series.arm, Look(f"c{at % COLOURS}", SHAPES[at % MARKERS]))


def short(name: str, most: int = SHORT) -> str:
    """A name that fits."""
    name = " ".join(name.split())
    return name if len(name) <= most else name[: most - 1] + "…"


def marker(look: Look) -> str:
    """A legend's sign."""
    return (
        f'<svg class="key {look.colour}" viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">'
        f'<path class="m" d="{look.shape}"/></svg>'
    )


def draw(figure: Figure, looks: Mapping[str, Look], name: str) -> str:
    """One ``<svg>``; ``name`` begins its ids. Empty where nothing can be placed."""
    canvas = _Canvas.of(figure, looks)
    if canvas is None:
        return ""
    parts = [*canvas.axes(), *canvas.bands()]
    for at, series in enumerate(figure.series):
        look = look_of(series, at, looks)
        parts.append(f'<g class="{look.colour}">{"".join(canvas.series(series, look, at))}</g>')
    parts += [*canvas.marks(), *canvas.labels()]
    title, said = escape(short(figure.title, 120)), escape(told(figure))
    return (
        f'<svg viewBox="0 0 {WIDTH} {canvas.height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{title}</title><desc id="{name}-d">{said}</desc>'
        f"{''.join(parts)}</svg>"
    )


def told(figure: Figure) -> str:
    """What a figure shows, for who does not see it."""
    said = [f"{figure.x.name} against {figure.y.name}." if not figure.y.rows else f"{figure.x.name}."]
    for s in figure.series:
        if s.draws in ("points", "line", "bars"):
            said.append(f"{short(s.name)}: {'; '.join(_numbers(p, figure.y) for p in s.points)}.")
    text = " ".join(said)
    return text if len(text) <= TOLD else text[:TOLD] + " …"


def _numbers(p: Point, y: Axis) -> str:
    own, at = (p.x, short(y.rows[int(p.y)])) if y.rows else (p.y, number(p.x))
    ends = "" if p.low is None or p.high is None else f" ({number(p.low)} to {number(p.high)})"
    return f"{at}: {number(own)}{ends}{f', {p.said}' if p.said else ''}"


def rules(style: str) -> str:
    """What a page's style says of colours and drawings, for a drawing that is a file by itself."""
    colours = style[style.index(":root") : style.index("* {")]
    return colours + "\n".join(line for line in style.splitlines() if re.match(r"svg |\.c\d", line))


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(short(said, 90))}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>'


def _rect(x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="band" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


@dataclass(frozen=True)
class _Canvas:
    """A figure and its scales."""

    figure: Figure
    looks: Mapping[str, Look]
    x: Scale
    y: Scale
    height: int
    row: float
    """Height of a row; 0 where the y axis has none."""
    bars: int
    """That share a row."""

    @classmethod
    def of(cls, figure: Figure, looks: Mapping[str, Look]) -> _Canvas | None:
        points = [p for s in figure.series for p in s.points]
        ends = [x for p in points for x in (p.low, p.high) if x is not None]
        rows, taken = figure.y.rows, Counter(p.y for s in figure.series if s.draws == "bars" for p in s.points)
        bars = max(taken.values(), default=0)
        row = max(ROW, LABEL + BAR * bars + 8) if rows else 0
        bands = [x for b in figure.bands for x in (b.low, b.high) if x is not None]
        height = TOP + round(row * len(rows)) + BOTTOM if rows else HEIGHT + LANE * len(figure.marks)
        wide = (LEFT if not rows else 14, WIDTH - RIGHT)
        along = [p.x for p in points] + [*figure.x.shown] + (bands if rows else [])
        x = Scale.over(along, ends if rows else (), *wide, figure.x.log)
        if rows:
            return (
                None
                if x is None
                else cls(figure, looks, x, Scale(0, len(rows), TOP, height - BOTTOM), height, row, bars)
            )
        across = [p.y for p in points] + [*figure.y.shown] + bands
        y = Scale.over(across, ends, height - BOTTOM - LANE * len(figure.marks), TOP, figure.y.log)
        return None if x is None or y is None else cls(figure, looks, x, y, height, 0, 0)

    @property
    def foot(self) -> float:
        """Where the x axis lies."""
        return self.height - BOTTOM

    def axes(self) -> Iterable[str]:
        """Grid lines, their numbers, and what the axes are."""
        for tick in self.x.ticks(6):
            at = self.x.at(tick)
            yield _line(at, TOP, at, self.foot, "grid")
            yield text(at, self.foot + 16, number(tick), "tick", "middle")
        yield text((self.x.start + self.x.end) / 2, self.height - 8, self.figure.x.name, "axis", "middle")
        if self.row:
            for at, name in enumerate(self.figure.y.rows):
                yield text(self.x.start, TOP + at * self.row + 14, short(name), "row")
            return
        yield text(4, 13, self.figure.y.name, "axis")
        for tick in self.y.ticks(6):
            yield _line(LEFT, self.y.at(tick), WIDTH - RIGHT, self.y.at(tick), "grid")
            yield text(LEFT - 7, self.y.at(tick) + 4, number(tick), "tick", "end")

    def bands(self) -> Iterable[str]:
        """Ranges and lines of values, with their names."""
        scale = self.x if self.row else self.y
        for band in self.figure.bands:
            one, other = (scale.at(band.low if x is None else x) for x in (band.low, band.high))
            low, size = min(one, other), max(abs(other - one), 2)
            if band.high is None:
                x1, y1, x2, y2 = (one, TOP, one, self.foot) if self.row else (LEFT, one, WIDTH - RIGHT, one)
                yield _line(x1, y1, x2, y2, "limit")
            elif self.row:
                yield _rect(low, TOP, size, self.foot - TOP)
            else:
                yield _rect(LEFT, low, WIDTH - RIGHT - LEFT, size)
            if not self.row:
                yield text(LEFT + 4, low - 4, band.name, "name")
            elif band.high is not None:
                yield text(low + size / 2, TOP - 6, band.name, "name", "middle")

    def series(self, series: Series, look: Look, at: int) -> Iterable[str]:
        """All points of one."""
        if series.draws == "steps":
            yield f'<path class="l" d="{self._steps(series.points)}"/>'
            yield from self._point(series, look, series.points[len(series.points) // 2], 0)
            return
        aside = self._aside(at)
        if series.draws == "line":
            path = "L".join(f"{self.x.at(p.x) + aside:g} {self.y.at(p.y):g}" for p in series.points)
            yield f'<path class="l" d="M{path}"/>'
        for place_, p in enumerate(series.points):
            if series.draws == "dots":
                off = (place_ * 0.618034 % 1 - 0.5) * 10  # spread, the same way every time
                yield f'<circle class="d" cx="{self.x.at(p.x):g}" cy="{self._track(p) + off:.1f}" r="2.4"/>'
            elif series.draws == "bars":
                yield from self._bar(series, p, at)
            else:
                yield from self._point(series, look, p, aside)

    def _aside(self, at: int) -> float:
        """By how much a series is moved to the right of its place, where another's intervals would hide its own."""
        all_, mine = self.figure.series, self.figure.series[at]
        if mine.draws == "line" and any(p.low is not None for p in mine.points):
            return APART * (at - (len(all_) - 1) / 2)
        if mine.draws != "points" or self.row or len(all_) > MANY:
            return 0.0
        here = self.x.at(mine.points[0].x)
        mates = [k for k, s in enumerate(all_) if s.draws == "points" and abs(self.x.at(s.points[0].x) - here) < APART]
        return 2 * APART * (mates.index(at) - (len(mates) - 1) / 2)

    def _steps(self, points: Sequence[Point]) -> str:
        path = [f"M{self.x.at(0):g} {self.y.at(0):g}"]
        for p in points:
            path.append(f"H{self.x.at(p.x):g}V{self.y.at(p.y):g}")
        return "".join(path)

    def _track(self, p: Point) -> float:
        """The middle of a row, below its name."""
        return TOP + p.y * self.row + LABEL + (self.row - LABEL) / 2 - 2

    def _bar(self, series: Series, p: Point, at: int) -> Iterable[str]:
        y = TOP + p.y * self.row + LABEL + (BAR * at if self.bars > 1 else 0)
        zero, end = self.x.at(0), self.x.at(p.x)
        yield (
            f'<rect class="b" x="{zero:g}" y="{y:g}" width="{max(end - zero, 1):g}" height="{BAR - 3}">'
            f"<title>{escape(f'{short(series.name)}: {_numbers(p, self.figure.y)}')}</title></rect>"
        )
        if p.low is not None and p.high is not None:
            yield _line(self.x.at(p.low), y + BAR / 2 - 1.5, self.x.at(p.high), y + BAR / 2 - 1.5, "w")

    def _point(self, series: Series, look: Look, p: Point, aside: float) -> Iterable[str]:
        x, y = self.x.at(p.x) + aside, self._track(p) if self.row else self.y.at(p.y)
        if p.low is not None and p.high is not None:
            low, high = ((self.x if self.row else self.y).at(v) for v in (p.low, p.high))
            yield _line(low, y, high, y, "w") if self.row else _line(x, low, x, high, "w")
        said = escape(f"{short(series.name)}: {_numbers(p, self.figure.y)}")
        yield f'<path class="m" transform="translate({x:g} {y:g})" d="{look.shape}"><title>{said}</title></path>'

    def marks(self) -> Iterable[str]:
        """Places on the x axis, each arm's on a line of its own."""
        for at, mark in enumerate(self.figure.marks):
            look, y = (
                self.looks.get(mark.arm, Look("cn", SHAPES[0])),
                self.foot - LANE * (len(self.figure.marks) - at) + 5,
            )
            ends = f"{number(mark.low)} to {number(mark.high)}"
            said = escape(f"{short(mark.arm)}: {self.figure.marked}: {number(mark.at)} ({ends})")
            whisker = _line(self.x.at(mark.low), y, self.x.at(mark.high), y, "w")
            sign = f'<path class="m" transform="translate({self.x.at(mark.at):g} {y:g}) scale(.8)" d="{look.shape}">'
            yield f'<g class="{look.colour}">{whisker}{sign}<title>{said}</title></path></g>'
        if self.figure.marks:
            top = self.foot - LANE * len(self.figure.marks) - 2
            yield _line(LEFT, top, WIDTH - RIGHT, top, "grid")
            yield text(WIDTH - RIGHT - 2, self.foot - 4, self.figure.marked, "name", "end")

    def labels(self) -> Iterable[str]:
        """Names beside lone points, where they hide as little as can be; of many, those that hide nothing."""
        if self.row:
            return
        alone = [(at, s, s.points[0]) for at, s in enumerate(self.figure.series) if s.draws == "points"]
        spots = [(self.x.at(p.x) + self._aside(at), self.y.at(p.y), self._whisker(p)) for at, _, p in alone]
        frame = Box(LEFT, TOP, WIDTH - RIGHT, self.foot)
        taken = [Box(x - 6, min(y - 6, low), x + 6, max(y + 6, high)) for x, y, (low, high) in spots]
        for (_, series, _), (x, y, _) in zip(alone, spots, strict=True):
            box = place(x, y, 7.2 * len(short(series.name)), taken, frame)
            if len(alone) > MANY and hidden(box, taken, frame) > 0:
                continue
            taken.append(box)
            near_x, near_y = min(max(x, box.left), box.right), min(max(y, box.top + 3), box.bottom - 3)
            if math.dist((x, y), (near_x, near_y)) > LEADER:
                yield _line(x, y, near_x, near_y, "leader")
            yield text(box.left, box.bottom - 3, short(series.name), "label")

    def _whisker(self, p: Point) -> tuple[float, float]:
        if p.low is None or p.high is None or math.isnan(p.low):
            return (self.y.at(p.y),) * 2
        one, other = self.y.at(p.low), self.y.at(p.high)
        return min(one, other), max(one, other)
