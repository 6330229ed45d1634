"""The verdict on every method of a run, endpoint by endpoint, with the controls' own rows beside."""

from __future__ import annotations

import math

from kvsuite.analysis.effects import Comparison, Finding, compare
from kvsuite.analysis.runs import broken, failures, noise, parts, speeds
from kvsuite.analysis.stats import LEVEL
from kvsuite.analysis.verdict import Effect
from kvsuite.margins import Margins
from kvsuite.records import Run
from kvsuite.report.table import Table

UNITS = {"quality": " pt", "broken": " %", "length": " ×", "speed": " ×"}
"""Of each endpoint: points of the score, share of the eligible, multiples of the baseline."""


def verdicts(run: Run) -> list[Table]:
    """One row per method and primary endpoint, and what stands beside them; none for a run without answers."""
    margins = Margins(**run.facts.get("margins", {}))
    methods, controls = compare(parts(run), margins), compare(noise(run), margins)
    fast = speeds(run, margins)
    if not methods and not fast:
        return []
    drawn = [cells(row.method, e) for row in methods for e in row.effects]
    drawn += [cells(name, e) for name, e in fast]
    drawn += [[name, "all", "-", "-", "", "BROKEN", "-"] for name in sorted(broken(run))]
    drawn += [[*cells(row.method, e)[:4], "", "noise", ""] for row in controls for e in row.effects]
    columns = ["method", "endpoint", "effect", "95 %", "p", "verdict", "needs"]
    said = [*notes(methods), *failures(run), f"{margins_text(margins)}."]
    return [Table("verdicts", columns, drawn, said, keys=2), *_beside([*methods, *controls])]


BESIDE = ["net harm", "churn", "longer", "shorter", "cap hits", "empty", "loops"]


def _beside(rows: list[Comparison]) -> list[Table]:
    """Exploratory: on how many samples only the method shows something, and only the other arm."""
    shown = [name for name in BESIDE if any(row.finding(name) for row in rows)]
    drawn = []
    for row in rows:
        found = [row.finding(name) for name in shown]
        drawn.append([row.method, *["-" if f is None or f.counts is None else _counted(f) for f in found]])
    note = (
        "Samples that only the method : only the other arm shows it on; * p < 5 % after Benjamini and Hochberg. net "
        "harm: broke, healed. churn, longer (3/2), shorter (2/3): beyond the control's. cap hits, empty, loops: full's."
    )
    return [Table("beside the verdicts, exploratory", ["method", *shown], drawn, [note])] if shown else []


def _counted(found: Finding) -> str:
    assert found.counts is not None
    star = "*" if found.adjusted is not None and found.adjusted < LEVEL else ""
    return f"{found.counts[0]}:{found.counts[1]}{star}"


def margins_text(margins: Margins) -> str:
    """The margins, in words."""
    speed = f", speed -{100 * margins.speed:g} %" if margins.speed else ""
    quality, broken, length = (f"{100 * x:g}" for x in (margins.quality, margins.broken, margins.length))
    return f"margins: quality -{quality} points, broken +{broken} %, length +{length} %{speed}"


def cells(method: str, e: Effect) -> list[str]:
    """Method, endpoint, effect, interval, p, verdict, samples needed."""
    needed = "-" if math.isinf(e.needed) else f"{e.needed:,.0f}"
    p = "-" if e.adjusted is None else f"{e.adjusted:.2g}"
    low, middle, high = (shown(e, x) for x in (e.estimate.low, e.estimate.mean, e.estimate.high))
    return [method, e.endpoint, middle + UNITS[e.endpoint], f"{low}, {high}", p, e.verdict, needed]


def shown(e: Effect, value: float) -> str:
    """A value in the endpoint's unit."""
    return f"{value:.2f}" if e.ratio else f"{100 * value:+.1f}"


def notes(rows: list[Comparison]) -> list[str]:
    """What must be read beside the verdicts."""
    said = [
        "harmful: all of the interval is beyond the margin; within margin: none of it. p: of no effect, after Holm "
        "over all rows but the noise (length: of the geometric mean). needs: samples with which a method without an "
        "effect is found within its margin 4 times of 5. broken: of the eligible, beyond what noise breaks."
    ]
    broken, scored = ({e.endpoint for row in rows for e in row.effects} & {x} for x in ("broken", "quality"))
    if scored and not broken:
        said.append("broken beyond noise: no floor measured; noise changed no answer of those compared.")
    return said
