"""How long servers let a reader wait for a whole answer."""

from __future__ import annotations

from collections.abc import Mapping

from kvsuite.analysis.figure import Axis, Figure, Point, Series, thinned
from kvsuite.analysis.runs import broken
from kvsuite.analysis.serving import timed
from kvsuite.analysis.table import Note, Table
from kvsuite.records import Run, Served

STEPS = 100
"""Of a line, at most."""


def figures(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """One a load: the share of the requests that were answered within so many seconds."""
    cells: dict[str, dict[str, list[Served]]] = {}
    for r in timed(run):
        cells.setdefault(r.cell, {}).setdefault(r.method, []).append(r)
    return [_cell(run, cell, arms) for cell, arms in cells.items() if any(_seconds(own) for own in arms.values())]


def _cell(run: Run, cell: str, arms: Mapping[str, list[Served]]) -> Figure:
    left_out, series = broken(run), []
    for arm, own in arms.items():
        seconds = thinned(_seconds(own), STEPS)
        if not seconds or arm in left_out:
            continue
        answered = len(_seconds(own)) / len(own)
        points = [Point(x, 100 * answered * (at + 1) / len(seconds)) for at, x in enumerate(seconds)]
        control = arm == run.baseline or run.is_control(arm)
        series.append(Series(arm, arm, points, "steps", control))
    said = "All requests of all blocks; one that failed is never answered. The A/A arm shows what no effect looks like."
    x = Axis("seconds to the end of an answer", "s", shown=(0.0,))
    y = Axis("requests answered, %", "%", shown=(0.0, 100.0))
    return Figure(f"latency:{cell}", f"End-to-end latency, {cell}", x, y, series, notes=[Note(said)])


def _seconds(found: list[Served]) -> list[float]:
    return [r.e2e for r in found if r.status == "ok"]
