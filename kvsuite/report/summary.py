"""A run in short, as markdown: for the summary of a CI job, or a comment on a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.report import Report
from kvsuite.analysis.table import Table
from kvsuite.analysis.tables import changes
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.records import Run
from kvsuite.report import markdown

FIRST = ("shortfall", "headline", "decision", "headlines")
"""Tables that decide."""


def render(report: Report, against: Run | None = None, page: str = "") -> str:
    """What decides, what changed against an earlier run, and a link to the page. Runs that cannot be compared cost
    the comparison only."""
    facts = report.run.facts
    parts = [markdown.plain(f"# kvsuite · {facts['model']['name']}"), *map(markdown.table, _first(report.tables))]
    if against is not None:
        parts += _changes(against, report.run)
    parts += [markdown.plain(f"**{note.text}**") for note in report.notes if note.severity != "info"]
    parts += [f"[All tables](<{page}>)"] if page else []
    end = f"{facts['started']} · `{report.run.folder}` · It speaks of this model, these texts and this machine."
    parts.append(markdown.plain(end))
    return "\n\n".join(parts) + "\n"


def _first(tables: Sequence[Table]) -> list[Table]:
    """What decides; of a run without a decision the verdicts, else the first table of figures."""
    found = [t for t in tables if t.key in FIRST]
    if not any(t.key == "decision" for t in found):
        rest = [t for t in tables if t.key not in FIRST]
        found += ([t for t in rest if t.key == "verdicts"] or rest)[:1]
    return found


def _changes(against: Run, run: Run) -> list[str]:
    try:
        margins = Margins.of(run.facts)
        return [markdown.table(t) for t in changes.runs(against, run, margins)]
    except UsageError as error:
        return [markdown.plain(f"**Not compared with {against.folder}: {error}.**")]
