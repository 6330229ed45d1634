"""Report plugin: ``report.md`` in the run's folder."""

from __future__ import annotations

import shlex
from typing import Any

from kvsuite.analysis.speed import speed_rows
from kvsuite.records import Run, Timing
from kvsuite.report.table import Table
from kvsuite.report.tables import NOT_MEASURED, formats, missing, provenance, shortfall, tables


def pytest_kv_report(run: Run, terminalreporter: Any) -> None:
    """Write the report beside the records."""
    (run.folder / "report.md").write_text(render(run))


def render(run: Run) -> str:
    """The whole report as markdown."""
    facts, where = run.facts, run.facts["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    git = where["git"]
    commit = "no checkout" if git is None else git["commit"][:12] + (", with changes" if git["dirty"] else "")
    reason = f" ({where['dtype_reason']})" if where.get("dtype_reason") else ""
    how = f"{where['threads']} threads, {formats(run)}{reason} · " if where["threads"] else ""
    short = f" · {found[0].title}" if (found := shortfall(run)) else ""
    parts = [
        f"# kvsuite report · {facts['model']['name']}{short}",
        f"{facts['started']} · `{shlex.join(['pytest', *facts['command']])}` · preset {facts['preset']}",
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores, {how}"
        f"Python {where['python']}, {packages} · kvsuite {where['kvsuite']} ({commit})",
        "It speaks of this model, these texts and this machine.",
        *[_table(table) for table in tables(run)],
    ]
    cells = [t for t in run.records if isinstance(t, Timing)]
    if cells:
        parts.append(_table(_cells(cells, run)))
    if said := provenance(run.records):
        parts.append(f"**{said}**")
    if run.torn:
        parts.append(f"{run.torn} record lines were cut off while being written and are left out.")
    return "\n\n".join(parts) + "\n"


def _cells(timings: list[Timing], run: Run) -> Table:
    rows = []
    for row in speed_rows(timings):
        cell = [row.method, row.phase, str(row.width), str(row.length)]
        if row.speedup is None or row.rate is None:
            rows.append([*cell, "FAILED" if row.failed else NOT_MEASURED, row.error, "", "", "", ""])
            continue
        checked = "-" if row.checked is None else f"{row.checked:.2f}"
        interval = f"{row.speedup.low:.3f}–{row.speedup.high:.3f}"
        speed = [f"{row.rate:,.1f}", f"{row.speedup.mean:.3f}", interval]
        read = f"{row.nbytes_read / 2**20:.1f}" if row.nbytes_read else "-"
        rows.append([*cell, *speed, f"{row.nbytes / 2**20:.1f}", read, checked])
    columns = ["method", "phase", "batch", "length", "tok/s", "× full", "95 %", "MiB", "read", "checked"]
    note = (
        "read: MiB that one step reads; "
        "checked: largest error of the attention output over what the cache holds, in units of what rounding explains."
    )
    return Table("every timed cell", columns, rows, [*missing(run), note])


def _table(table: Table) -> str:
    lines = [f"## {table.title}"]
    if table.columns:
        lines += ["", _line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)])]
    lines += [_line(row) for row in table.rows]
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
