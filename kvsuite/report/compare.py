"""``kvsuite compare``: what changed from one result to another beyond noise, endpoint by endpoint."""

from __future__ import annotations

import math

from kvsuite import records
from kvsuite.analysis.effects import Part, compare
from kvsuite.analysis.length import same_caps
from kvsuite.analysis.runs import broken, changes, lost, speed_changes
from kvsuite.analysis.samples import same_answers
from kvsuite.analysis.shortfall import interrupted
from kvsuite.analysis.speed import compare_loads
from kvsuite.analysis.stats import LEVEL, Interval
from kvsuite.analysis.verdict import Effect, corrected
from kvsuite.columns import Arm, align
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.readers import Load
from kvsuite.records import Run
from kvsuite.report.table import Table
from kvsuite.report.verdicts import PARTIAL, cells, distinct, margins_text

WORDS = {"harmful": "worse", "within margin": "not worse"}
"""A verdict on the later result."""
Named = list[tuple[str, Effect]]


def runs(one: Run, other: Run, margins: Margins) -> list[Table]:
    """Every method that both runs measured. Raises UsageError for runs of different models, texts or settings."""
    if reason := records.refusal(one, other):
        raise UsageError(reason)
    for run in (one, other):
        if run.torn:
            raise UsageError(
                f"{run.folder}/records.jsonl is cut off at its end: {run.torn} line; remove that line to go on"
            )
    shared = changes(one, other)
    for part in shared:
        for arm in part.methods.values():
            same_caps(arm, part.base)
    alike = {id(part): next(iter(part.methods)) for part in shared if _same(part)}
    answers = compare([part for part in shared if id(part) not in alike], margins)
    effects = [(row.method, e) for row in answers for e in distinct(row)]
    said = [f"The same answers in both: {', '.join(dict.fromkeys(alike.values()))}."] if alike else []
    said += [f"partial: {run.folder} was interrupted." for run in (one, other) if interrupted(run)]
    said += [*lost(one, other), *lost(other, one)]
    said += [
        f"BROKEN {arm}: in {run.folder} its answers are no answers." for run in (one, other) for arm in broken(run)
    ]
    speeds = speed_changes(one, other, margins)
    if not shared and not speeds:
        raise UsageError(f"{one.folder} and {other.folder} have no method in common that answered or was timed")
    if speeds:
        said.append(
            "Speed is each run's own ratio to its baseline (the baseline itself: its seconds; of servers per token). "
            "One session a side does not show how much sessions differ, so it gets an interval of its rounds and no "
            "verdict: repeat both runs in turn."
        )
    return [_table(f"{other.folder} against {one.folder}", effects + speeds, margins, said)]


def arms(one: Arm, other: Arm, margins: Margins, allow_missing: bool) -> list[Table]:
    """Two results of the same samples. Raises UsageError where they have neither scores nor lengths in common."""
    (base, later), left_out = align([one, other], allow_missing)
    found = [("answers", e) for row in compare([Part(base, {"": later})], margins) for e in distinct(row)]
    if not found:
        raise UsageError(f"{one.source} and {other.source} have neither scores nor lengths for all their samples")
    return [_table(f"{other.source} against {one.source}", found, margins, left_out)]


def loads(one: Load, other: Load) -> list[Table]:
    """Two load tests of the same setting."""
    found = compare_loads(other, one)
    rows = [[what, f"{x.mean:.3f} ×", _between(x)] for what, x in found.ratios.items()]
    if not math.isnan(found.throughput):
        rows.append(["tokens per second", f"{found.throughput:.3f} ×", "one figure a test"])
    answered, failed = ("{1:,} and {0:,}".format(*x) for x in (found.answered, found.failed))
    notes = [
        f"Requests answered: {answered}; failed: {failed}.",
        *(f"{note[0].upper()}{note[1:]}." for note in found.notes),
    ]
    return [Table(f"{other.source} against {one.source}", ["what", "change", "95 %"], rows, notes)]


def _between(x: Interval) -> str:
    return "too few requests" if math.isinf(x.high) else f"{x.low:.3f} to {x.high:.3f}"


def _table(title: str, found: Named, margins: Margins, said: list[str]) -> Table:
    effects = corrected([e for _, e in found])
    named = [(name, e) for (name, _), e in zip(found, effects, strict=True)]
    changed = [f"{name}: {e.endpoint}" for name, e in named if e.adjusted is not None and e.adjusted < LEVEL]
    headline = (
        f"Changed (p < 5 % after Holm): {'; '.join(changed)}." if changed else "Nothing changed that can be told."
    )
    columns = ["what", "endpoint", "change", "95 %", "p", "the later is", "needs"]
    rows = [_cells(name, e) for name, e in named]
    said = [*([PARTIAL] if any(e.verdict == "partial" for e in effects) else []), *said]
    return Table(
        title, columns, rows, [headline, *said, *([HOW + f" {margins_text(margins)}."] if rows else [])], keys=2
    )


def _same(part: Part) -> bool:
    return all(same_answers(part.base, arm) for arm in part.methods.values())


HOW = (
    "p: of no change, after Holm over all rows (length: of the geometric mean). worse: all of the interval is beyond "
    "the margin; not worse: none of it. needs: samples with which no change is found within the margin 4 times of 5;"
)


def _cells(name: str, e: Effect) -> list[str]:
    *shown, verdict, needed = cells(name, e)
    return [
        *shown,
        WORDS.get(verdict, verdict) if e.endpoint != "speed" else "-",
        needed if e.endpoint != "speed" else "-",
    ]
