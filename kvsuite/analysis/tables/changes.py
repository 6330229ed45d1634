"""``kvsuite compare``: what changed from one result to another beyond noise, endpoint by endpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvsuite import records
from kvsuite.analysis.effects import Part, compare, decided
from kvsuite.analysis.forced import Shift, asked, references, shift
from kvsuite.analysis.length import same_caps
from kvsuite.analysis.runs import changes, elsewhere, lost, speed_changes
from kvsuite.analysis.samples import same_answers
from kvsuite.analysis.shortfall import interrupted
from kvsuite.analysis.speed import compare_loads
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, errors, infos, span
from kvsuite.analysis.tables.shared import without
from kvsuite.analysis.tables.verdicts import COLUMNS, distinct, effect_row, endpoints, margins_text, needs, partial
from kvsuite.analysis.verdict import Effect, Named
from kvsuite.columns import Arm
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.readers import Load
from kvsuite.readers.run import Documents, documents
from kvsuite.records import Run

WORDS = {"harmful": "worse", "within margin": "not worse"}
"""A verdict on the later result."""
DOCUMENTS = "forced documents"
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
    read, texts, known = _read(one, other)
    shifts = _shifts(read, texts)
    beside = [(arm, e) for arm, found in shifts.items() for e in found.effects(margins)]
    beside += references({arm: (after, before) for arm, (before, after) in read.items()}, margins, known)
    answers, beside = decided(compare([part for part in shared if id(part) not in alike], margins), margins, beside)
    effects = [(row.method, e) for row in answers for e in distinct(row)] + beside
    notes = infos([f"The same answers in both: {', '.join(dict.fromkeys(alike.values()))}."] if alike else [])
    notes += errors([f"partial: {run.folder} was interrupted." for run in (one, other) if interrupted(run)])
    notes += errors([f"partial: in {run.folder} {run.lost}." for run in (one, other) if run.torn])
    notes += [Note(said, "warning") for said in (*lost(one, other), *lost(other, one))]
    notes += errors([f"{arm}: in {run.folder} {why}." for run in (one, other) for arm, why in without(run).items()])
    speeds = speed_changes(one, other, margins)
    if not (shared or speeds or beside or shifts):
        raise UsageError(f"{one.folder} and {other.folder} have no method in common that answered or was timed")
    if speeds:
        notes += infos([SPEED, *elsewhere(one, other)])
    title = f"{other.folder} against {one.folder}"
    return [_table(title, effects + speeds, margins, notes), *_forced(title, shifts)]


def _read(one: Run, other: Run) -> tuple[dict[str, tuple[Documents, Documents]], int, int]:
    """By arm, its forced documents before and after; and how many documents and reference answers there were to be."""
    before, after = documents(one), documents(other)
    texts, answers = (max(x) for x in zip(asked(one), asked(other), strict=True))
    return {arm: (before[arm], after[arm]) for arm in before if arm in after}, texts, answers


def _shifts(read: Mapping[str, tuple[Documents, Documents]], asked: int = 0) -> dict[str, Shift]:
    """By arm, what became of its forced documents."""
    found = {arm: shift(*both, asked) for arm, both in read.items()}
    return {arm: changed for arm, changed in found.items() if changed is not None}


def arms(
    title: str,
    pairs: Mapping[str, Sequence[Arm]],
    forced: tuple[Documents, Documents],
    margins: Margins,
    left_out: Sequence[str] = (),
) -> list[Table]:
    """Two results of the same samples, aligned and apart as ``columns.kinds`` has them, and of the same documents.
    Raises UsageError for a pair that has neither scores nor lengths, and where nothing is the same."""
    shifts = _shifts({DOCUMENTS: forced})
    beside = [(name, e) for name, changed in shifts.items() for e in changed.effects(margins)]
    beside += references({DOCUMENTS: forced[::-1]}, margins, 0)
    if not (pairs or beside or shifts):
        raise UsageError(f"{title}: they have no document in common")
    parts = [Part(one, {what: other}) for what, (one, other) in pairs.items()]
    rows, beside = decided(compare(parts, margins), margins, beside)
    for (one, other), row in zip(pairs.values(), rows, strict=True):
        if not row.effects:
            raise UsageError(f"{one.source} and {other.source} have neither scores nor lengths for all their samples")
    found = [(row.method, e) for row in rows for e in distinct(row)] + beside
    return [_table(title, found, margins, infos(left_out)), *_forced(title, shifts)]


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
        endpoints(rows).replace("beyond the control's", "less the earlier's"),
        f"{margins_text(margins)}.",
    ]
    notes = [Note(headline), *partial(rows), *notes, *(infos(how) if rows else [])]
    return Table("changes", title, ("what", "endpoint"), columns, rows, notes)


def _forced(title: str, shifts: Mapping[str, Shift]) -> list[Table]:
    """KL and flips of either side, each from its own baseline, and what became of them."""
    if not shifts:
        return []
    columns = [Column("before", "KL before", "nats"), Column("after", "after", "nats")]
    columns += [Column("kl", "change", "nats"), Column("kl", "95 %", "nats", "ends")]
    columns += [Column("flipped", "flips before, %", "%"), Column("flips", "after", "%")]
    columns.append(Column("perplexity", "perplexity", "×", "range"))
    rows = []
    for arm, found in shifts.items():
        by = found.divergence
        cells = {"before": Cell(found.mean("kl")), "after": Cell(by.kl.mean), "kl": Cell.estimated(found.kl)}
        cells |= {"flipped": Cell(100 * found.mean("flips")), "flips": Cell(100 * by.flips.mean)}
        rows.append(Row((arm,), {**cells, "perplexity": Cell.estimated(by.perplexity)}))
    n = span([len(found.before) for found in shifts.values()])
    note = (
        f"{n} documents, position by position. KL and flips: from each side's own baseline. perplexity: of the "
        "later, as a multiple of the earlier's."
    )
    return [Table("forced", f"{DOCUMENTS}, {title}", ("what",), columns, rows, [Note(note)], detail=True)]


def _same(part: Part) -> bool:
    return all(same_answers(part.base, arm) for arm in part.methods.values())


def _row(name: str, e: Effect) -> Row:
    row = effect_row(name, e)
    cell = row.cells["effect"]
    if e.endpoint == "speed":  # what sessions differ by is not known
        return Row(row.key, {"effect": replace(cell, verdict="")})
    return Row(row.key, row.cells | {"effect": replace(cell, verdict=WORDS.get(cell.verdict, cell.verdict))})
