"""Many methods and models in one table: decisions of our runs, and scores that others measured, marked as theirs."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.effects import Part, compare, decided
from kvsuite.analysis.report import Report
from kvsuite.analysis.table import Cell, Note, Row, Table, errors, infos
from kvsuite.analysis.tables.decision import COLUMNS
from kvsuite.columns import Arm, kinds
from kvsuite.errors import UsageError
from kvsuite.margins import Margins

ORDER = {"within margin": 0, "undecided": 1, "harmful": 2}
WORDS = {"within margin": "no damage to its scores", "harmful": "damaged: tasks {:+.0f} pt"}
THEIRS = "theirs"
MEANING = (
    "Rows of one model are ordered by decision, then by bytes; what the columns mean stands in each run's own report. "
    "Speeds and bytes are of each run's machine. theirs: others measured these scores; only the tasks are known."
)


def leaderboard(reports: Sequence[Report], theirs: Sequence[Row] = ()) -> Table:
    """A row for each method of each run, and those of others. Raises UsageError where there is none."""
    rows, left_out = list(theirs), []
    for report in reports:
        run = report.run
        table = next((table for table in report.tables if table.key == "decision"), None)
        if table is None:
            left_out.append(f"{run.folder}: no method in process was decided there; left out.")
            continue
        model = str(run.facts["model"]["name"])
        partial = report.shortfall is not None
        for row in table.rows:
            cells = dict(row.cells)
            if partial:
                cells["decision"] = Cell(f"{cells['decision'].value} (partial)", verdict="undecided")
            rows.append(Row((model, row.key[0], run.folder.name), cells))
    if not rows:
        raise UsageError(" ".join(left_out) or "name runs, or --baseline and --candidate")
    columns = [c for c in COLUMNS if any(row.cells.get(c.key, Cell()).value is not None for row in rows)]
    notes: list[Note] = [*errors(left_out), *infos([MEANING])]
    return Table("leaderboard", "leaderboard", ("model", "method", "run"), columns, sorted(rows, key=_order), notes)


def _order(row: Row) -> tuple[str, int, float]:
    held = row.cells.get("held", Cell()).value
    return row.key[0], ORDER.get(row.cells["decision"].verdict, 1), held if isinstance(held, float) else 1.0


def others(model: str, arms: Sequence[Arm], names: Sequence[str], margins: Margins) -> list[Row]:
    """Rows of results that were read (``kvsuite negatives`` reads the same): aligned arms, the baseline first, and the
    methods' ``names``. Raises UsageError for one without scores."""
    parts = [Part(base, dict(zip(names, methods, strict=True))) for base, *methods in kinds(arms).values()]
    rows, _ = decided(compare(parts, margins), margins)
    found = []
    for row in rows:
        quality = row.effect("quality")
        if quality is None:
            raise UsageError(f"{row.method} has no scores")
        change = 100 * quality.estimate.mean
        said = WORDS.get(quality.verdict, "cannot tell").format(change)
        cells = {"decision": Cell(said, verdict=quality.verdict), "quality": Cell(change)}
        found.append(Row((model, row.method, THEIRS), cells))
    return found
