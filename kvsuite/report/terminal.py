"""Report plugin: the summary at the end of a run in the terminal."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

import rich.table
from rich.console import Console
from rich.text import Text as Styled

from kvsuite.analysis.report import Report
from kvsuite.analysis.table import Note, Severity, Table
from kvsuite.errors import printable
from kvsuite.report.text import Text, body, header

STYLES: dict[Severity, str] = {"info": "dim", "warning": "yellow", "error": "red"}
WIDE = 100
"""Columns from which headers stay on one line."""
NARROW = 15
"""Characters that a row's name keeps on a line."""


FIRST = ("shortfall", "gates", "headline", "decision")
"""Tables that are printed without ``-v``, where a run has a decision."""


def pytest_kv_report(report: Report, terminalreporter: Any) -> None:
    """Print what decides, and with ``-v`` all tables of the run; last, where the page is."""
    writer, tables, notes = terminalreporter._tw, report.tables, report.notes
    brief = terminalreporter.verbosity < 1 and any(table.key == "decision" for table in tables)
    if brief:
        loud = [note for table in tables for note in table.notes if note.severity == "error"]
        tables = [_brief(table) for table in tables if table.key in FIRST]
        notes = [*dict.fromkeys(loud), *notes]
    write(tables, writer._file, writer.fullwidth, notes, brief)
    page = report.run.folder / "report.html"  # drawn after this, as it takes longest
    terminalreporter.write_line(f"report: {page}{' (all tables: -v)' if brief else ''}")


def _brief(table: Table) -> Table:
    """A table under the headline needs no title, and no explanation of its words."""
    title = "" if table.key == "decision" else table.title
    return replace(table, title=title, notes=[note for note in table.notes if note.severity == "warning"])


def show(tables: Sequence[Table], last: Sequence[Note] = ()) -> None:
    """Draw tables, and ``last`` notes, in the window of whoever asked."""
    write(tables, sys.stdout, shutil.get_terminal_size().columns, last)


def write(tables: Sequence[Table], file: TextIO, width: int, last: Sequence[Note] = (), brief: bool = False) -> None:
    """Draw tables, and ``last`` notes, for a window of ``width`` columns; ``brief``: those columns that fit at once."""
    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False)
    for table in tables:
        if table.title:
            console.print()
            console.print(
                printable(table.title), style="italic" if table.severity == "info" else STYLES[table.severity]
            )
        for part in _fitting(_Grid.of(table), console) if table.rows else ():
            console.print(part if isinstance(part, str) else _drawn(part, width))
            if brief and not isinstance(part, str):
                break
        for note in table.notes:
            console.print(printable(note.text), style=STYLES[note.severity])
    if last and not brief:
        console.print()
    for note in last:
        console.print(printable(note.text), style="bold" if note.severity == "info" else STYLES[note.severity])


@dataclass(frozen=True)
class _Grid:
    """What is drawn of a table, or of some of its columns."""

    names: list[str]
    rows: list[list[Text]]
    heads: int
    """So many leading columns say what a row is; they come again where a table is too wide for its window."""
    beside: frozenset[int]
    """Columns that stay with the one before them."""

    @classmethod
    def of(cls, table: Table) -> _Grid:
        beside = (at for at, column in enumerate(table.columns, len(table.heads)) if column.beside)
        names = list(map(printable, header(table)))
        rows = [[replace(cell, text=printable(cell.text)) for cell in row] for row in body(table)]
        return cls(names, rows, len(table.heads), frozenset(beside))

    def some(self, columns: Sequence[int]) -> _Grid:
        """These columns alone."""
        rows = [[row[at] for at in columns] for row in self.rows]
        beside = frozenset(place for place, at in enumerate(columns) if at in self.beside)
        return _Grid([self.names[at] for at in columns], rows, sum(at < self.heads for at in columns), beside)

    def shorter(self) -> tuple[list[str], _Grid]:
        """What the names of all rows have in common, and the table without it; each row keeps its last name."""
        names = [{row[at].text for row in self.rows} for at in range(self.heads - 1)]
        common = {at: next(iter(texts)) for at, texts in enumerate(names) if len(texts) == 1}
        rest = self.some([at for at in range(len(self.names)) if at not in common])
        return [f"{self.names[at]}: {text}" for at, text in common.items()], rest

    def folded(self, fold: int) -> _Grid:
        """With the first of the rows' names in lines of so many characters."""
        rows = [[Text("\n".join(textwrap.wrap(row[0].text, fold))), *row[1:]] for row in self.rows]
        return replace(self, rows=rows)

    def units(self) -> list[list[int]]:
        """The columns after the heads, those together that must be."""
        found: list[list[int]] = []
        for at in range(self.heads, len(self.names)):
            if at in self.beside:
                found[-1].append(at)
            else:
                found.append([at])
        return found


def _fitting(grid: _Grid, console: Console) -> list[str | _Grid]:
    """The table; where it is wider than the window what its rows have in common, then as many columns at a time as
    fit."""
    endless = Console(file=io.StringIO(), width=10_000, markup=False, emoji=False)

    def fits(some: _Grid) -> bool:
        return endless.measure(_drawn(some, console.width)).maximum <= console.width

    if fits(grid):
        return [grid]
    common, grid = grid.shorter()
    folded, narrow = (grid.folded(fold) for fold in (max(NARROW, console.width // 4), NARROW))
    whole = next((some for some in (grid, folded, narrow) if fits(some)), None)
    if whole:
        return [*common, whole]
    heads = list(range(grid.heads))
    groups = [heads]
    for unit in grid.units():
        if groups[-1] != heads and not fits(folded.some([*groups[-1], *unit])):
            groups.append(heads)
        groups[-1] = [*groups[-1], *unit]
    return [*common, *map(folded.some, groups)]


def _drawn(grid: _Grid, width: int) -> rich.table.Table:
    gap = " " if width >= WIDE else "\n"
    drawn = rich.table.Table(box=None, pad_edge=False, padding=(0, 1))
    for at, name in enumerate(grid.names):
        if at < grid.heads:
            drawn.add_column(name, overflow="fold")
        else:
            drawn.add_column(name.replace(" tok", gap + "tok"), justify="right", no_wrap=True)
    for row in grid.rows:
        drawn.add_row(*(Styled(cell.text, style="red" if cell.loud else "") for cell in row))
    return drawn
