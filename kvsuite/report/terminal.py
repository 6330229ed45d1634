"""Report plugin: the summary at the end of a run in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

import rich.table
from rich.console import Console

from kvsuite.records import Run
from kvsuite.report.table import Table
from kvsuite.report.tables import provenance, tables

WIDE = 100
"""Columns from which headers stay on one line."""


def pytest_kv_report(run: Run, terminalreporter: Any) -> None:
    """Print all tables of the run."""
    writer = terminalreporter._tw
    write(tables(run), writer._file, writer.fullwidth, provenance(run.records))
    terminalreporter.write_line(f"records and report: {run.folder}")


def write(found: Sequence[Table], file: TextIO, width: int, last: str = "") -> None:
    """Draw tables for a window of ``width`` columns."""
    console = Console(file=file, width=width, highlight=False)
    for table in found:
        console.print()
        console.print(_drawn(table, width) if table.rows else table.title, style="" if table.rows else "italic")
        for note in table.notes:
            console.print(note, style="red" if note.startswith("FAILED") else "dim")
    if last:
        console.print()
        console.print(last, style="bold")


def _drawn(table: Table, width: int) -> rich.table.Table:
    gap = " " if width >= WIDE else "\n"
    drawn = rich.table.Table(title=table.title, box=None, title_justify="left", pad_edge=False, padding=(0, 1))
    first, *others = table.columns
    drawn.add_column(first, overflow="fold", min_width=15)
    for name in others:
        drawn.add_column(name.replace(" tok", gap + "tok"), justify="right", no_wrap=width >= WIDE or len(name) < 20)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
