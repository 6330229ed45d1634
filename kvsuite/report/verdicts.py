"""The verdict on every method of a run, endpoint by endpoint, with the controls' own rows beside."""

from __future__ import annotations

import math

from kvsuite.analysis.effects import Comparison, Finding, compare
from kvsuite.analysis.runs import broken, failures, noise, parts, speeds
from kvsuite.analysis.shortfall import evaluation_of, shares
from kvsuite.analysis.stats import LEVEL, Interval
from kvsuite.analysis.verdict import Effect, judge
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
    drawn = [cells(row.method, e) for row in methods for e in distinct(row)]
    drawn += _unanswered(run, methods)
    drawn += [cells(name, e) for name, e in fast.effects]
    drawn += [[name, "speed", "-", "-", "-", why, "-"] for name, why in fast.lost]
    if not drawn:
        return []
    drawn += [[name, "all", "-", "-", "", "BROKEN", "-"] for name in sorted(broken(run))]
    drawn += [[*cells(row.method, e)[:4], "", "noise" + _lacking(e), ""] for row in controls for e in distinct(row)]
    columns = ["method", "endpoint", "effect", "95 %", "p", "verdict", "needs"]
    partial = [PARTIAL] if any("partial" in row[5] or "/" in row[5] for row in drawn) else []
    where = [f"speed: {fast.where}."] if fast.where else []
    said = [*partial, *notes(methods), *failures(run), *where, f"{margins_text(margins)}."]
    return [Table("verdicts", columns, drawn, said, keys=2), *_beside([*methods, *controls])]


PARTIAL = (
    "partial a/b: only a of b samples (of speed: rounds or cells) could be compared, since others failed or are "
    "missing. Those that are there may be the short ones, so these figures decide nothing."
)


def distinct(row: Comparison) -> list[Effect]:
    """Its endpoints, without *broken* where that is *quality* with its sign turned: scores of 0 and 1, of which none
    healed and noise took none."""
    quality, broken = row.effect("quality"), row.effect("broken")
    if quality is None or broken is None or (broken.n, broken.verdict) != (quality.n, quality.verdict):
        return row.effects
    same = math.isclose(broken.estimate.mean, -quality.estimate.mean, abs_tol=1e-9)
    return [e for e in row.effects if e is not broken] if same else row.effects


def _unanswered(run: Run, compared: list[Comparison]) -> list[list[str]]:
    """A row for every method that was to be compared and has no answer in common with the baseline."""
    there = {(row.method, e.endpoint) for row in compared for e in row.effects}
    answered, found = shares(run), []
    for endpoint, evaluation in (("quality", "samples"), ("length", "length")):
        ok: dict[str, int] = {}
        asked: dict[str, int] = {}
        for task, arms in answered.items():
            if evaluation_of(run, task) != evaluation:
                continue
            for (method, repeat), share in arms.items():
                if not repeat:
                    ok[method] = ok.get(method, 0) + share.ok
                    asked[method] = asked.get(method, 0) + share.asked
        for method in ok:
            plain = method == run.baseline or run.is_control(method)
            if not plain and (method, endpoint) not in there and not (ok[method] and ok.get(run.baseline, 0)):
                found.append([method, endpoint, "-", "-", "-", f"partial 0/{asked[method]}", "-"])
    return found


BESIDE = ["net harm", "churn", "longer", "shorter", "cap hits", "empty", "loops"]


def _beside(rows: list[Comparison]) -> list[Table]:
    """Exploratory: on how many samples only the method shows something, and only the other arm."""
    shown = [name for name in BESIDE if any(row.finding(name) for row in rows)]
    drawn = []
    for row in rows:
        found = [row.finding(name) for name in shown]
        name = f"{row.method} (partial)" if any(e.verdict == "partial" for e in row.effects) else row.method
        drawn.append([name, *["-" if f is None or f.counts is None else _counted(f) for f in found]])
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
    """Method, endpoint, effect, interval, p, verdict, samples needed where these decide nothing."""
    most = e.needed if e.verdict == "undecided" else math.inf
    p = "-" if e.adjusted is None else f"{e.adjusted:.2g}"
    low, middle, high = shown(e)
    needed = "-" if math.isinf(most) else f"{most:,.0f}"
    return [method, e.endpoint, middle + UNITS[e.endpoint], f"{low}, {high}", p, e.verdict + _lacking(e), needed]


def _lacking(e: Effect) -> str:
    return f" {e.lacking[0]}/{e.lacking[1]}" if e.lacking else ""


DIGITS = 4
"""More than two ratios or points that differ at all."""


def shown(e: Effect, few: int | None = None) -> tuple[str, str, str]:
    """The interval's lower end, the estimate and the upper end in the endpoint's unit, with so many digits that the
    printed ends lie on the same sides of the margin as the ends themselves, ``few`` at least."""
    scale, sign, usual = (1, "", 2) if e.ratio else (100, "+", 1)
    few = usual if few is None else few
    ends, limit = (e.estimate.low, e.estimate.high), round(scale * e.limit, 9)
    for digits in range(few, few + DIGITS):
        low, middle, high = (f"{scale * x:{sign}.{digits}f}" for x in (ends[0], e.estimate.mean, ends[1]))
        if judge(Interval(0, float(low), float(high)), limit, e.worse) == judge(e.estimate, e.limit, e.worse):
            break
    return low, middle, high


def notes(rows: list[Comparison]) -> list[str]:
    """What must be read beside the verdicts."""
    said = [
        "harmful: all of the interval is beyond the margin; within margin: none of it. p: of no effect, after Holm "
        "over all rows but the noise (length: of the geometric mean). needs: samples with which a method without an "
        "effect is found within its margin 4 times of 5. broken: of the eligible, beyond what noise breaks; not shown "
        "where it is quality with the sign turned."
    ]
    broken, scored = ({e.endpoint for row in rows for e in row.effects} & {x} for x in ("broken", "quality"))
    if scored and not broken:
        said.append("broken beyond noise: no floor measured; no control changed an answer of those compared.")
    return said
