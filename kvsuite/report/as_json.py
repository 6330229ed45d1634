"""The report as JSON: every cell as numbers, for a program.

The document is ``{"schema", "run", "tables", "notes"}``; ``run`` says what was measured: ``folder``, ``started``,
``model``, ``baseline``. A table has ``key`` (stable), ``title``, ``severity``, ``heads`` (the names of the parts of a
row's key), ``columns``, ``rows`` and ``notes``. A column has the ``key`` of the cells it shows, its ``name``, and which
part of a cell stands there (``shows``). A row has its ``key``, its ``names`` (as it is written) and ``cells`` by key. A
note has its ``text`` and ``severity``: info, warning or error.

A cell has ``state``: ok, partial, failed, missing, not measured, broken, differs or cannot tell. It has ``value``: a
number in ``unit``, a word, or null where there is none. The rest is there where it applies: ``low`` and ``high``, the
ends of the interval; ``of``, how many a count is out of, or in the unit ``pairs`` the count of the other arm; ``p``;
``verdict``; ``limits``, the margin's edges: values below the first and above the second do harm, and null is no limit;
``lacking``, how many samples of how many were compared. Numbers are in full. An interval that is open at one end has
null there; so has what is not a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from kvsuite.analysis.report import Report
from kvsuite.analysis.table import Cell, Note, Row, Table

SCHEMA = 2
"""Version of the document's shape; grows when a reader would have to change."""

CONTROLS = {code: f"\\u{code:04x}" for code in (*range(127, 160), *range(0xD800, 0xE000))}
"""Characters that JSON holds as they are, and that terminals take for commands or UTF-8 cannot hold."""


def render(report: Report) -> str:
    """The whole report as JSON."""
    facts = report.run.facts
    run = {"folder": str(report.run.folder), "started": facts["started"], "model": facts["model"]["name"]}
    found = {
        "schema": SCHEMA,
        "run": run | {"baseline": report.run.baseline},
        "tables": [_table(table) for table in (*report.tables, *report.appendix)],
        "notes": _notes(report.notes),
    }
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False).translate(CONTROLS)


def _table(table: Table) -> dict[str, Any]:
    return {
        "key": table.key,
        "title": table.title,
        "severity": table.severity,
        "heads": table.heads,
        "columns": [{"key": c.key, "name": c.name, "shows": c.shows} for c in table.columns],
        "rows": [_row(table, row) for row in table.rows],
        "notes": _notes(table.notes),
    }


def _row(table: Table, row: Row) -> dict[str, Any]:
    units = {column.key: table.unit(row, column) for column in table.columns}
    cells = {key: _cell(row.cells.get(key, Cell()), unit) for key, unit in units.items()}
    return {"key": row.key, "names": row.names or row.key, "cells": cells}


def _cell(cell: Cell, unit: str) -> dict[str, Any]:
    found: dict[str, Any] = {"state": cell.state, "value": _finite(cell.value), "unit": unit}
    if cell.low is not None:
        found |= {"low": _finite(cell.low), "high": _finite(cell.high)}
    if cell.limits is not None:
        found["limits"] = [_finite(x) for x in cell.limits]
    rest = {"of": cell.of, "p": cell.p, "verdict": cell.verdict or None, "lacking": cell.lacking}
    return found | {key: value for key, value in rest.items() if value is not None}


def _finite(value: float | str | None) -> float | str | None:
    return value if isinstance(value, str) or value is None or math.isfinite(value) else None


def _notes(notes: Sequence[Note]) -> list[dict[str, str]]:
    return [{"text": note.text, "severity": note.severity} for note in notes]
