"""Badges: what a run decides of each method, and its speed, as SVG files and as JSON for shields.io's endpoint.

The JSON has shields.io's own keys alone, so model and date stand in its message. The SVG has them in its title.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvsuite import disk
from kvsuite.analysis.report import Report
from kvsuite.analysis.sentences import Tone
from kvsuite.analysis.table import Row
from kvsuite.errors import UsageError
from kvsuite.report.text import STATES

DECIDED = {"within margin": "no damage found", "harmful": "damaged", "undecided": "cannot tell yet"}
COLOURS = {"within margin": "#2e7d32", "harmful": "#c62828"}
OPEN = "#616161"
"""Colour of what is not decided."""
TONES: dict[Tone, str] = {"good": "within margin", "bad": "harmful", "open": "undecided"}
LONGEST = 80
"""Letters of a text that are drawn, and of a file's name."""
LETTER, PADDING = 6.6, 6
"""Width of a letter, and of the space beside a text, in pixels."""
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{said}">
<title>{said} · {where}</title>
<rect width="{width}" height="20" rx="3" fill="{colour}"/>
<path d="M3 0H{left}V20H3A3 3 0 0 1 0 17V3A3 3 0 0 1 3 0Z" fill="#424242"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{pad}" y="14" textLength="{label_width}" lengthAdjust="spacingAndGlyphs">{label}</text>
<text x="{message_x}" y="14" textLength="{message_width}" lengthAdjust="spacingAndGlyphs">{message}</text>
</g>
</svg>
"""


@dataclass(frozen=True)
class Badge:
    """Two texts side by side."""

    label: str
    message: str
    verdict: str
    """Decides the colour."""
    where: str
    """Model and date of the run."""

    @property
    def colour(self) -> str:
        """Of the right side, as ``#rrggbb``."""
        return COLOURS.get(self.verdict, OPEN)

    def svg(self) -> str:
        """The badge as one SVG document."""
        label, message = _short(self.label), _short(self.message)
        label_width, message_width = (round(LETTER * len(text)) for text in (label, message))
        left = label_width + 2 * PADDING
        texts = {"label": label, "message": message, "where": self.where}
        return SVG.format(
            width=left + message_width + 2 * PADDING, left=left, pad=PADDING, message_x=left + PADDING,
            label_width=label_width, message_width=message_width, colour=self.colour,
            said=_escaped(f"{self.label}: {self.message}"), **{key: _escaped(text) for key, text in texts.items()},
        )  # fmt: skip

    def endpoint(self) -> str:
        """The badge as shields.io's endpoint reads it."""
        message = f"{self.message} ({self.where})"
        found = {"schemaVersion": 1, "label": self.label, "message": message, "color": self.colour}
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def badges(report: Report) -> list[Badge]:
    """Of each method what is decided, and its speed where it was judged. Raises UsageError for a run that decides
    nothing."""
    facts = report.run.facts
    where = f"{facts['model']['name']}, {facts['started'][:10]}"
    if report.shortfall is not None:
        where += ", partial"
    found = [Badge(*texts, where) for texts in (*_decisions(report), *_speeds(report))]
    if not found:
        raise UsageError(f"{report.run.folder} decides nothing of a method, so it has no badges")
    return found


def write(report: Report, folder: Path) -> list[Path]:
    """Write ``NAME.svg`` and ``NAME.json`` for each badge; return the SVG files. Raises UsageError like `badges`, and
    where nothing can be written."""
    found = badges(report)
    names: dict[str, Badge] = {}
    for badge in found:
        plain = re.sub(r"[^\w.]+", "-", badge.label, flags=re.ASCII).strip("-.").lower()
        name = stem = plain[-LONGEST:].lstrip("-.") or "method"
        count = 1
        while name in names:
            count += 1
            name = f"{stem}-{count}"
        names[name] = badge
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, badge in names.items():
            disk.write(folder / f"{name}.svg", badge.svg())
            disk.write(folder / f"{name}.json", badge.endpoint())
    except OSError as error:
        raise UsageError(f"badges cannot be written into {folder}: {error.strerror}") from error
    return [folder / f"{name}.svg" for name in names]


def _decisions(report: Report) -> Iterator[tuple[str, str, str]]:
    """Of servers there is no table of decisions; what their sentences say is told."""
    broken = {row.key[0]: STATES[row.cells["effect"].state] for row in _rows(report, "verdicts") if row.key[1] == "all"}
    rows = _rows(report, "decision")
    for row in rows:
        method, verdict = row.key[0], row.cells["decision"].verdict
        if method not in broken:
            yield method, DECIDED[verdict], verdict
    for said in report.sentences if not rows else ():
        if said.method not in broken:
            verdict = TONES[said.tone]
            yield said.method, said.lead.partition(":")[0].lower() if said.tone == "open" else DECIDED[verdict], verdict
    yield from ((method, broken[method], "harmful") for method in sorted(broken))


def _speeds(report: Report) -> Iterator[tuple[str, str, str]]:
    phase = "speed" if "servers" in report.run.facts else "decode"
    for row in _rows(report, "verdicts"):
        cell = row.cells.get("effect")
        if row.key[1] == "speed" and cell is not None and isinstance(cell.value, float) and cell.verdict != "noise":
            partial = " partial" if cell.state == "partial" else ""
            noise = (
                ", within noise" if cell.low is not None and cell.high is not None and cell.low < 1 < cell.high else ""
            )
            yield f"{row.key[0]} {phase}", f"{cell.value:.2f}×{partial}{noise}", cell.verdict


def _rows(report: Report, key: str) -> list[Row]:
    return [row for table in report.tables if table.key == key for row in table.rows]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _escaped(text: str) -> str:
    """For XML, which has no place for control characters, escaped or not."""
    return html.escape("".join(c if c.isprintable() else " " for c in text))
