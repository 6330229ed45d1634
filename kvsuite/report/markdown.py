"""Report plugin: ``report.md`` in the run's folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from kvsuite import disk
from kvsuite.analysis.report import Report
from kvsuite.analysis.table import Table
from kvsuite.analysis.tables.shared import formats
from kvsuite.errors import printable
from kvsuite.report.text import body, header


def pytest_kv_report(report: Report, terminalreporter: Any) -> None:
    """Write the report beside the records."""
    disk.write(report.run.folder / "report.md", render(report))


def render(report: Report) -> str:
    """The whole report as markdown."""
    facts, where = report.run.facts, report.run.facts["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    git = where["git"]
    commit = "no checkout" if git is None else git["commit"][:12] + (", with changes" if git["dirty"] else "")
    reason = f" ({where['dtype_reason']})" if where.get("dtype_reason") else ""
    how = f"{where['threads']} threads, {formats(report.run)}{reason} · " if where["threads"] else ""
    short = f" · {report.shortfall.title}" if report.shortfall else ""
    command = shlex.join(["pytest", *facts["command"]]).replace("`", "'")
    said = [
        f"# kvsuite report · {facts['model']['name']}{short}",
        f"{facts['started']} · `{command}` · preset {facts['preset']}",
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores, {how}"
        f"Python {where['python']}, {packages} · kvsuite {where['kvsuite']} ({commit})",
        "It speaks of this model, these texts and this machine.",
    ]
    notes = [f"**{note.text}**" for note in report.notes]
    tables = map(table, (*report.tables, *report.appendix))
    return printable("\n\n".join([*map(plain, said), *tables, *map(plain, notes)])) + "\n"


def table(shown: Table) -> str:
    """One table under its title, with its notes."""
    lines = [plain(f"## {shown.title}")]
    if names := header(shown):
        marks = ["---"] * len(shown.heads) + ["---:"] * len(shown.columns)
        lines += ["", *map(_line, [names, marks, *([cell.text for cell in row] for row in body(shown))])]
    for note in shown.notes:
        lines += ["", plain(note.text)]
    return "\n".join(lines)


def plain(text: str) -> str:
    """One line, in which names and answers that others gave are text: no HTML, links, pictures, tables or headings."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.splitlines()))
    return text.replace("](", "]\\(")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"
