"""``kvsuite compare``: what changed from one result to another beyond noise, endpoint by endpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from kvsuite import records
from kvsuite.analysis.effects import Part, compare, decided
from kvsuite.analysis.length import same_caps
from kvsuite.analysis.runs import broken, changes, elsewhere, lost, speed_changes
from kvsuite.analysis.samples import same_answers
from kvsuite.analysis.shortfall import interrupted
from kvsuite.analysis.speed import compare_loads
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, errors, infos
from kvsuite.analysis.tables.verdicts import COLUMNS, distinct, effect_row, endpoints, margins_text, needs, partial
from kvsuite.analysis.verdict import Effect, Named
from kvsuite.columns import Arm, align
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.readers import Load
from kvsuite.records import Run

WORDS = {"harmful": "worse", "within margin": "not worse"}
"""A verdict on the later result."""
RENAMED = {"effect": "change", "verdict": "the later is"}
SPEED = (
    "Speed is each run's own ratio to its baseline (the baseline itself: its seconds; of servers per token). One "
    "session a side does not show how much sessions differ, so it gets an interval of its rounds and no verdict: "
    "repeat both runs in turn."
)


def runs(one: Run, other: Run, margins: Margins) -> list[Table]:
    """Every method that both runs measured. Raises UsageError for runs of different models, texts or settings."""
    if reason := records.refusal(one, other):
        raise UsageError(reason)
    shared = changes(one, other)
    for part in shared:
        for arm in part.methods.values():
            same_caps(arm, part.base)
    alike = {id(part): next(iter(part.methods)) for part in shared if _same(part)}
    answers, _ = decided(compare([part for part in shared if id(part) not in alike], margins), margins)
    effects = [(row.method, e) for row in answers for e in distinct(row)]
    notes = infos([f"The same answers in both: {', '.join(dict.fromkeys(alike.values()))}."] if alike else [])
    notes += errors([f"partial: {run.folder} was interrupted." for run in (one, other) if interrupted(run)])
    notes += errors([_torn(run) for run in (one, other) if run.torn])
    notes += [Note(said, "warning") for said in (*lost(one, other), *lost(other, one))]
    notes += errors(
        [f"BROKEN {arm}: in {run.folder} its answers are no answers." for run in (one, other) for arm in broken(run)]
    )
    speeds = speed_changes(one, other, margins)
    if not shared and not speeds:
        raise UsageError(f"{one.folder} and {other.folder} have no method in common that answered or was timed")
    if speeds:
        notes += infos([SPEED, *elsewhere(one, other)])
    return [_table(f"{other.folder} against {one.folder}", effects + speeds, margins, notes)]


def _torn(run: Run) -> str:
    lines = "1 line" if run.torn == 1 else f"{run.torn} lines"
    return f"partial: {lines} of {run.folder}/records.jsonl was cut off while being written."


def arms(one: Arm, other: Arm, margins: Margins, left_out: Sequence[str] = ()) -> Table:
    """Two results of the same samples. Raises UsageError where they have neither scores nor lengths in common."""
    (base, later), _ = align([one, other])
    rows, _ = decided(compare([Part(base, {"": later})], margins), margins)
    found = [("answers", e) for row in rows for e in distinct(row)]
    if not found:
        raise UsageError(f"{one.source} and {other.source} have neither scores nor lengths for all their samples")
    return _table(f"{other.source} against {one.source}", found, margins, infos(left_out))


def loads(one: Load, other: Load) -> list[Table]:
    """Two load tests of the same setting."""
    found = compare_loads(other, one)
    rows = [Row((what,), {"change": Cell.estimated(x)}) for what, x in found.ratios.items()]
    if not math.isnan(found.throughput):
        rows.append(Row(("tokens per second",), {"change": Cell(found.throughput)}))
    answered, failed = ("{1:,} and {0:,}".format(*x) for x in (found.answered, found.failed))
    said = [
        f"Requests answered: {answered}; failed: {failed}.",
        "95 %: – with too few requests, or one figure a test. On what hardware both ran is not known to be the same.",
        *(f"{note[0].upper()}{note[1:]}." for note in found.notes),
    ]
    columns = [Column("change", "change, ×", "×"), Column("change", "95 %", "×", "ends")]
    title = f"{other.source} against {one.source}"
    return [Table("loads", title, ("what",), columns, rows, infos(said), detail=True)]


def _table(title: str, found: Sequence[Named], margins: Margins, notes: Sequence[Note]) -> Table:
    worse = [f"{name}: {e.endpoint}" for name, e in found if e.verdict == "harmful"]
    headline = f"Worse (p < 5 % after Holm): {'; '.join(worse)}." if worse else "Nothing is worse that can be told."
    columns = [replace(c, name=RENAMED.get(c.name, c.name)) for c in COLUMNS]
    rows = [_row(name, e) for name, e in found]
    how = [
        "p: of no harm beyond the margin, one-sided, after Holm over all rows. worse: all of the interval is beyond "
        f"the margin; not worse: none of it; undecided: neither.{needs(rows)}",
        endpoints(rows),
        f"{margins_text(margins)}.",
    ]
    notes = [Note(headline), *partial(rows), *notes, *(infos(how) if rows else [])]
    return Table("changes", title, ("what", "endpoint"), columns, rows, notes)


def _same(part: Part) -> bool:
    return all(same_answers(part.base, arm) for arm in part.methods.values())


def _row(name: str, e: Effect) -> Row:
    row = effect_row(name, e)
    cell = row.cells["effect"]
    if e.endpoint == "speed":  # what sessions differ by is not known
        return Row(row.key, {"effect": replace(cell, verdict="")})
    return Row(row.key, row.cells | {"effect": replace(cell, verdict=WORDS.get(cell.verdict, cell.verdict))})
