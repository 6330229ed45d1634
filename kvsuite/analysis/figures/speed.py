"""Decode speed over the length of the context, and from which length on it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsuite.analysis.figure import Axis, Band, Figure, Mark, Point, Series
from kvsuite.analysis.speed import REFERENCE, break_evens, speed_rows
from kvsuite.analysis.table import Note, Table
from kvsuite.records import Run, Timing

BEYOND = 1.25
"""Times the longest length that was timed, up to which a break-even is marked."""


def figures(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """One a batch; nothing where no kernel ran, or one length only was timed."""
    timings = [r for r in run.records if isinstance(r, Timing) and r.phase == "decode" and r.method != "transformers"]
    timings = [t for t in timings if not (t.path.endswith(REFERENCE) or run.is_control(t.method))]
    return [f for width in sorted({t.width for t in timings}) for f in _width(run, timings, width)]


def _width(run: Run, timings: Sequence[Timing], width: int) -> list[Figure]:
    lines: dict[str, list[Point]] = {}
    for row in speed_rows([t for t in timings if t.width == width]):
        if row.speedup is not None:
            point = Point(
                row.length, row.speedup.mean, row.speedup.low, row.speedup.high, f"{row.rate or 0:,.0f} tok/s"
            )
            lines.setdefault(row.method, []).append(point)
    series = [
        Series(arm, arm, sorted(points, key=lambda p: p.x), "line", arm == run.baseline)
        for arm, points in lines.items()
    ]
    longest = max((p.x for s in series for p in s.points), default=0.0)
    if not any(len(s.points) > 1 for s in series if not s.control):
        return []
    marks = []
    for (arm, own), even in break_evens(timings).items():
        near = even.length is not None and even.length <= BEYOND * longest
        if own == width and near and even.pieces and even.length is not None:
            marks.append(Mark(arm, even.length, even.pieces[0][0], even.pieces[-1][1]))
    x = Axis("tokens of context", "tokens", shown=(0.0, *(m.at for m in marks)))
    y = Axis("decode speed, × the uncompressed cache's", "×", shown=(1.0,))
    said = "Bars: 95 % intervals of rounds that ran in turn; methods timed at one length stand side by side."
    notes = [Note(f"{said} The uncompressed cache against itself is this machine's noise.")]
    if marks:
        notes.append(
            Note("Break-even: where the line through a method's lengths crosses that of the uncompressed cache.")
        )
    title = f"Speed against length, batch {width}"
    marked = "break-even length, 95 % interval" if marks else ""
    return [Figure(f"speed:{width}", title, x, y, series, [Band("as fast", 1.0)], marks, marked, notes)]
