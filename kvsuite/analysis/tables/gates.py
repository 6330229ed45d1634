"""What a run's gates say, a row each, and whether it fails by them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from kvsuite.analysis.gates import Figure, Gate, Gates, Outcome, forgiven, judge
from kvsuite.analysis.speed import REFERENCE, speed_rows
from kvsuite.analysis.table import Cell, Column, Row, Severity, Table, infos
from kvsuite.analysis.tables.changes import WORDS, runs
from kvsuite.analysis.tables.decision import held
from kvsuite.analysis.tables.shared import without
from kvsuite.analysis.verdict import Named
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.records import Run, Timing

COLUMNS = (Column("state", "gate"), Column("value", "seen"), Column("bound", "bound"))
MEANING = (
    "passed: the bound keeps the limit (one-sided 95 %). failed: the limit is missed, after Holm over all gates, so "
    "that gates whose limits are kept fail in 5 % of runs at most. undecided: neither."
)
WORSE = WORDS["harmful"]


def outcomes(run: Run, asked: Gates, effects: Sequence[Named], today: date) -> list[Outcome]:
    """What every gate says of every method that it is about, and what an earlier run says."""
    if not (asked.gates or asked.against):
        return []
    methods = [m for m in run.facts["methods"] if m != run.baseline and not run.is_control(m)]
    gone, share = without(run), held(run)
    known = {(method, e.endpoint): e for method, e in effects}
    decoded = [r for r in run.records if isinstance(r, Timing) and r.phase == "decode"]
    timed = {(r.method, r.width, r.length): r for r in speed_rows(decoded)}

    def figure(gate: Gate, method: str) -> Figure:
        if gate.endpoint == "bytes":
            return share.get(method, "not measured")
        if gate.cell is None:
            return known.get((method, gate.endpoint), "not measured")
        row = timed.get((method, *gate.cell))
        if row is None or row.speedup is None:
            return "not measured" if row is None or not row.failed else f"failed: {row.error}"
        return "PyTorch computed it" if row.path.endswith(REFERENCE) else row.speedup

    found = judge(asked.gates, [m for m in methods if m not in gone], figure)
    found += [Outcome(g.text, m, "failed", why=why) for g in asked.gates for m, why in gone.items() if g.matches(m)]
    if asked.against is not None:
        found += _against(asked.against, run)
    return forgiven(found, asked.acknowledged, today)


def _against(before: Run, run: Run) -> list[Outcome]:
    """A row for each endpoint that is worse than in an earlier run beyond its margin, or one for all that are not."""
    gate = f"against {before.folder.name}"
    try:
        table = runs(before, run, Margins.of(run.facts))[0]
    except UsageError as error:
        return [Outcome(gate, "all", "undecided", why=str(error))]
    worse = [row for row in table.rows if row.cells["effect"].verdict == WORSE]
    if not worse:
        return [Outcome(gate, "all", "passed", why=f"of {len(table.rows)} figures none is worse beyond its margin")]
    return [Outcome(gate, row.key[0], "failed", why=f"{row.key[1]} is worse") for row in worse]


def gates(asked: Gates, found: Sequence[Outcome]) -> list[Table]:
    """The outcomes as a table; nothing where nothing was asked."""
    if not found:
        return []
    by = {state: sum(o.state == state for o in found) for state in ("failed", "undecided", "acknowledged", "passed")}
    title = f"gates: {', '.join(f'{count} {state}' for state, count in by.items() if count)}"
    order = {state: at for at, state in enumerate(by)}
    rows = [_row(asked, o) for o in sorted(found, key=lambda o: order[o.state])]
    shown = [c for c in COLUMNS if any(row.cells[c.key].value not in (None, "") for row in rows)]
    said = [f"{o.gate}, {o.method}: {o.why}." for o in found if o.why]
    notes = infos([*said, f"{MEANING} An undecided gate {asked.undecided}."])
    severity: Severity = "warning" if by["undecided"] and asked.undecided == "warns" else "info"
    if asked.failed(found):
        severity = "error"
    return [Table("gates", title, ("held", "method"), shown, rows, notes, severity)]


def _row(asked: Gates, o: Outcome) -> Row:
    state = Cell(o.state, state="failed" if asked.failed([o]) else "ok")
    cells = {"state": state, "value": Cell(o.value), "bound": Cell(o.bound)}
    return Row((o.gate, o.method), cells)
