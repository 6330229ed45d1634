"""Typed tables as the words that are drawn of them, for the checks of what a report says."""

from types import SimpleNamespace

from kvsuite.analysis.report import analyse
from kvsuite.report import text


def drawn(table):
    rows = [[cell.text for cell in row] for row in text.body(table)]
    notes = [note.text for note in table.notes]
    return SimpleNamespace(title=table.title, columns=text.header(table), rows=rows, notes=notes)


def tables(run):
    """All of a run that a terminal shows."""
    return [drawn(table) for table in analyse(run).tables]


def words(tables):
    """All words of the tables' cells and headers."""
    return [word for t in map(drawn, tables) for row in [t.columns, *t.rows] for cell in row for word in cell.split()]
