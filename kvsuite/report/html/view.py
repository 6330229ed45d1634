"""What a page shows of a run: its tables, figures and facts, ready to be filled in."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvsuite.analysis.figure import Figure, Map, Series
from kvsuite.analysis.report import Report
from kvsuite.analysis.table import Note, Table
from kvsuite.analysis.tables.shared import formats
from kvsuite.report.html import raw, tiles
from kvsuite.report.html.svg import Look, draw, look_of, marker, short
from kvsuite.report.text import Text, body, header

HIDDEN = ("headline",)
"""Tables that are said otherwise."""
TINTS = {
    "harmful": "bad", "worse": "bad", "damaged": "bad", "BROKEN": "bad", "DIFFERS": "bad", "FAILED": "bad",
    "missing": "bad", "cannot tell": "quiet",
    "within margin": "good", "not worse": "good", "use it": "good", "noise": "quiet", "capped": "quiet",
}  # fmt: skip
"""How words that a cell begins with are tinted."""


@dataclass(frozen=True)
class Grid:
    """A table as it is drawn."""

    title: str
    header: list[tuple[str, bool]]
    """Names of columns, and whether they hold words."""
    rows: list[list[tuple[Text, str]]]
    """Cells and their tints."""
    notes: Sequence[Note]
    heads: int = 0
    severity: str = "info"

    @classmethod
    def of(cls, table: Table) -> Grid:
        """Of a table of the report."""
        rows = body(table)
        words = [at < len(table.heads) or _wordy(row[at].text for row in rows) for at in range(len(header(table)))]
        tinted = [[(cell, _tint(cell, at >= len(table.heads))) for at, cell in enumerate(row)] for row in rows]
        names = list(zip(header(table), words, strict=True))
        return cls(table.title, names, tinted, table.notes, len(table.heads), table.severity)


def _wordy(texts: Iterable[str]) -> bool:
    return any(text[:1].isalpha() and len(text) > len("missing") for text in texts)


def _tint(cell: Text, figure: bool) -> str:
    if not figure:
        return ""
    return next((tint for word, tint in TINTS.items() if cell.text.startswith(word)), "bad" if cell.loud else "")


@dataclass(frozen=True)
class Drawn:
    """A figure as it is drawn."""

    figure: Figure | Map
    svg: Markup
    legend: list[tuple[Markup, str]]
    """Signs and names; empty where names stand in the drawing."""


class Seen:
    """What a page shows of one run."""

    def __init__(self, report: Report, at: int, looks: Mapping[str, Look], room: int) -> None:
        """``room`` is how many characters its files may take."""
        self.report, self.at, self.looks = report, at, looks
        self.name = report.run.folder.name or str(report.run.folder)
        self.files = raw.files(report.run, room)
        shown = [table for table in (*report.tables, *report.appendix) if table.key not in HIDDEN]
        self.alerts = [note for table in shown if not table.rows for note in table.notes]
        self.alerts += [note for note in report.notes if note.severity != "info"]
        self.short = report.shortfall.title if report.shortfall else ""
        self.tables = [Grid.of(table) for table in shown if table.rows]
        self.headline = next((table.title for table in report.tables if table.key == "headline"), "")

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.report.run.facts["model"]["name"])

    def drawn(self, key: str) -> Iterator[Drawn]:
        """The figure of this key, where the run has it."""
        for at, figure in enumerate(self.report.figures):
            if figure.key != key:
                continue
            name = f"f{self.at}-{at}"
            if isinstance(figure, Map):
                yield Drawn(figure, Markup(tiles.draw(figure, name)), [])
            elif svg := draw(figure, self.looks, name):
                yield Drawn(figure, Markup(svg), self._legend(figure))

    def _legend(self, figure: Figure) -> list[tuple[Markup, str]]:
        if not figure.y.rows:
            listed: Sequence[Series] = [s for s in figure.series if s.draws != "points"]
        else:
            listed = [s for s in figure.series if s.arm not in figure.y.rows]
        found = {s.name: look_of(s, at, self.looks) for at, s in enumerate(listed)}
        return [(Markup(marker(look)), short(name)) for name, look in found.items()]

    def facts(self) -> list[tuple[str, str]]:
        """Where the figures come from."""
        facts, where = self.report.run.facts, self.report.run.facts["environment"]
        git = where["git"]
        commit = "no checkout" if git is None else git["commit"][:12] + (", with changes" if git["dirty"] else "")
        packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
        threads = f", {where['threads']} threads, {formats(self.report.run)}" if where.get("threads") else ""
        print_of = facts["model"].get("fingerprint", "")
        found = [
            ("Model", f"{self.model}{f' (sha256 {print_of[:12]}…)' if print_of else ''}"),
            ("Texts", ", ".join(facts.get("texts", {}))),
            ("Machine", f"{where['gpu'] or where['cpu']}, {where['cores']} cores{threads}"),
            ("Versions", ", ".join(filter(None, [f"Python {where['python']}", packages]))),
            ("kvsuite", f"{where['kvsuite']} ({commit})"),
            ("Command", shlex.join(["pytest", *facts["command"]])),
            ("Started", facts["started"]),
            ("Preset", facts["preset"]),
        ]
        return [(name, text) for name, text in found if text]
