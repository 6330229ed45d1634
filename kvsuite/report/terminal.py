"""Report plugin: the summary at the end of a run in the terminal."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TextIO

import rich.table
from rich.console import Console

from kvsuite.records import Run
from kvsuite.report.table import RATIO, Table
from kvsuite.report.tables import provenance, tables

LOUD = ("FAILED", "BROKEN", "COMPRESSED", "MISSING", "partial")
"""How notes and titles begin that must not be overlooked."""
WIDE = 100
"""Columns from which headers stay on one line."""
NARROW = 15
"""Characters that a row's name keeps on a line."""


def pytest_kv_report(run: Run, terminalreporter: Any) -> None:
    """Print all tables of the run."""
    writer = terminalreporter._tw
    write(tables(run), writer._file, writer.fullwidth, provenance(run.records))
    terminalreporter.write_line(f"records and report: {run.folder}")


def write(found: Sequence[Table], file: TextIO, width: int, last: str = "") -> None:
    """Draw tables for a window of ``width`` columns."""
    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False)
    for table in found:
        console.print()
        console.print(table.title, style="red" if table.title.startswith(LOUD) else "italic")
        for part in _fitting(table, console) if table.rows else ():
            console.print(_drawn(part, width))
        for note in table.notes:
            console.print(note, style="red" if note.startswith(LOUD) else "dim")
    if last:
        console.print()
        console.print(last, style="bold")


def _fitting(table: Table, console: Console) -> list[Table]:
    """The table, or several of its columns at a time where it is wider than the window."""
    endless = Console(file=io.StringIO(), width=10_000, markup=False, emoji=False)

    def width(of: Table) -> int:
        return endless.measure(_drawn(of, console.width)).maximum

    if width(table) <= console.width:
        return [table]
    folded, narrow = (_folded(table, fold) for fold in (max(NARROW, console.width // 4), NARROW))
    for whole in (folded, narrow):
        if width(whole) <= console.width:
            return [whole]
    groups: list[list[int]] = [[]]
    for unit in _units(table):
        if groups[-1] and width(_some(folded, [*groups[-1], *unit])) > console.width:
            groups.append([])
        groups[-1] += unit
    return [_some(folded, group) for group in groups]


def _folded(table: Table, fold: int) -> Table:
    """The table with its rows' names in lines of so many characters."""
    return replace(table, rows=[["\n".join(textwrap.wrap(row[0], fold)), *row[1:]] for row in table.rows])


def _units(table: Table) -> list[list[int]]:
    """The columns after the keys; a ratio stays with the value before it."""
    units: list[list[int]] = []
    for column in range(table.keys, len(table.columns)):
        if units and table.columns[column] == RATIO:
            units[-1].append(column)
        else:
            units.append([column])
    return units


def _some(table: Table, columns: Sequence[int]) -> Table:
    """The table's keys and these columns."""
    chosen = [*range(table.keys), *columns]
    rows = [[row[at] for at in chosen] for row in table.rows]
    return Table("", [table.columns[at] for at in chosen], rows, keys=table.keys)


def _drawn(table: Table, width: int) -> rich.table.Table:
    gap = " " if width >= WIDE else "\n"
    drawn = rich.table.Table(box=None, pad_edge=False, padding=(0, 1))
    for at, name in enumerate(table.columns):
        if at < table.keys:
            drawn.add_column(name)
        else:
            drawn.add_column(name.replace(" tok", gap + "tok"), justify="right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
