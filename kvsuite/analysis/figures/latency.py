"""How long a reader waits for a whole answer: of servers as it was timed, here as lengths and speed give it."""

from __future__ import annotations

from collections.abc import Mapping

from kvsuite.analysis.figure import Axis, Figure, Point, Series, thinned
from kvsuite.analysis.length import beside
from kvsuite.analysis.requests import paces
from kvsuite.analysis.requests import requests as joined_requests
from kvsuite.analysis.serving import timed
from kvsuite.analysis.table import Note, Table
from kvsuite.analysis.validity import unranked
from kvsuite.readers.run import answers
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
    hidden, series = unranked(run), []
    for arm, own in arms.items():
        seconds = thinned(_seconds(own), STEPS)
        if not seconds or arm in hidden:
            continue
        answered = len(_seconds(own)) / len(own)
        points = [Point(x, 100 * answered * (at + 1) / len(seconds)) for at, x in enumerate(seconds)]
        control = arm == run.baseline or run.is_control(arm)
        series.append(Series(arm, arm, points, "steps", control))
    said = "All requests of all blocks; one that failed is never answered. The A/A arm shows what no effect looks like."
    x = Axis("seconds to the end of an answer", "s", shown=(0.0,))
    y = Axis("requests answered, %", "%", shown=(0.0, 100.0))
    return Figure(f"latency:{cell}", f"End-to-end latency, {cell}", x, y, series, notes=[Note(said)])


def requests(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """One a task of chats: the share of the requests that take so many seconds at most, by what is tabled of them."""
    width, known = paces(run)
    found = []
    for task in (key.removeprefix("requests:") for key in tables if key.startswith("requests:")):
        own = [a for a in answers(run, "length", references=True) if a.task == task]
        series = []
        for arm in beside(own, run.baseline):
            joined = joined_requests(arm, known, run.baseline)
            if joined is not None and not run.is_control(arm.method):
                seconds = thinned(joined.seconds.tolist(), STEPS)
                points = [Point(x, 100 * (at + 1) / len(seconds)) for at, x in enumerate(seconds)]
                series.append(Series(arm.name, arm.name, points, "steps", arm.method == run.baseline))
        said = "The length of every answer, at the speed measured in this run. Other seed: the baseline's own noise."
        x = Axis("seconds to the end of an answer", "s", shown=(0.0,))
        y = Axis("requests answered, %", "%", shown=(0.0, 100.0))
        title = f"End-to-end latency, {task}, batch {width}"
        found.append(Figure(f"requests:{task}", title, x, y, series, notes=[Note(said)]))
    return found


def _seconds(found: list[Served]) -> list[float]:
    return [r.e2e for r in found if r.status == "ok"]
