"""Report plugin: ``report.html`` in the run's folder, one page without a request to any host."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite import disk
from kvsuite.analysis.figure import Figure, Map
from kvsuite.analysis.report import Report
from kvsuite.analysis.table import Note, Table
from kvsuite.analysis.tables import changes
from kvsuite.errors import UsageError
from kvsuite.margins import Margins

if TYPE_CHECKING:
    from kvsuite.report.html.svg import Look
    from kvsuite.report.html.view import Grid

HERE = Path(__file__).parent
CONTROLS = {
    code: "\ufffd" for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000)) if chr(code) not in "\n\t"
}
"""Characters that HTML or UTF-8 cannot hold."""


def pytest_kv_report(report: Report, terminalreporter: Any) -> None:
    """Write the page beside the records. One that cannot be drawn costs itself alone."""
    file = report.run.folder / "report.html"
    try:
        disk.write(file, render([report]))
    except Exception as error:
        terminalreporter.write_line(f"no {file}: {type(error).__name__}: {error}", red=True, bold=True)


def render(reports: Sequence[Report]) -> str:
    """The page on one run, or on several side by side."""
    from markupsafe import Markup

    from kvsuite.analysis.pairs import MEANINGS
    from kvsuite.report.html import raw
    from kvsuite.report.html.samples import LIMIT, payload
    from kvsuite.report.html.view import Seen

    scripts, looks = _files("*.js"), _looks(reports)
    runs = [Seen(report, at, looks, raw.MOST // len(reports)) for at, report in enumerate(reports)]
    return _filled(
        "page.html",
        runs=runs,
        changed=[change for later in reports[1:] for change in _changed(reports[0], later)],
        figures=[[(run, drawn) for run in runs for drawn in run.drawn(key)] for key in _keys(reports)],
        payloads=[payload(report, LIMIT // len(reports)) for report in reports if report.pairs],
        meanings=MEANINGS,
        hashes=[_hash(script) for script in scripts],
        scripts=list(map(Markup, scripts)),
    )


def board(title: str, tables: Sequence[Table], maps: Sequence[Map] = ()) -> str:
    """A page of maps and tables."""
    from markupsafe import Markup

    from kvsuite.report.html.tiles import LEGEND, draw
    from kvsuite.report.html.view import Grid

    drawn = [(m.title, Markup(draw(m, f"m{at}"))) for at, m in enumerate(maps)]
    return _filled("board.html", title=title, tables=[Grid.of(table) for table in tables], maps=drawn, legend=LEGEND)


def picture(title: str, maps: Sequence[Map]) -> str:
    """Maps one below the other as one SVG that stands by itself."""
    from kvsuite.report.html.tiles import picture

    return picture(title, maps, (HERE / "style.css").read_text(encoding="utf-8"))


def _files(kind: str) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(HERE.glob(kind))]


def _filled(template: str, **values: Any) -> str:
    import jinja2
    from markupsafe import Markup

    from kvsuite.report.html.svg import short

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["short"] = short
    styles = list(map(Markup, _files("*.css")))
    return env.get_template(template).render(styles=styles, **values).translate(CONTROLS)


def _hash(script: str) -> str:
    """As the page's policy names a script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _keys(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(figure.key for report in reports for figure in report.figures))


def _looks(reports: Sequence[Report]) -> dict[str, Look]:
    """An arm looks alike in all figures of a page."""
    from kvsuite.report.html.svg import Look

    series = [s for report in reports for figure in report.figures if isinstance(figure, Figure) for s in figure.series]
    plain = dict.fromkeys(s.arm for s in series if s.control)
    arms = [
        arm for r in reports for arm in r.run.facts["methods"] if arm != r.run.baseline and not r.run.is_control(arm)
    ]
    return Look.of(list(dict.fromkeys(arms)), list(plain))


def _changed(one: Report, later: Report) -> list[Grid]:
    """What changed beyond noise, or why that cannot be told."""
    from kvsuite.report.html.view import Grid

    try:
        margins = Margins.of(one.run.facts)
        return [Grid.of(table) for table in changes.runs(one.run, later.run, margins)]
    except UsageError as error:
        return [Grid(f"{later.run.folder} against {one.run.folder}", [], [], [Note(f"{error}.", "warning")])]
