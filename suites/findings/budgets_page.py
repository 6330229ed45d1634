"""docs/budgets.md and its pictures: ``python -m suites.findings.budgets_page`` writes them, from the two runs of
``suites/findings/budgets.py`` in ``reports/cpu``."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from kvsuite import disk
from kvsuite.analysis.report import Report, analyse
from kvsuite.analysis.table import Cell, Column, Row, Table
from kvsuite.records import Answer, Run, read
from kvsuite.report import html, markdown
from kvsuite.report.html.svg import Look, draw, rules
from suites.findings.budgets import CODECS, SHARES, methods

ROOT = Path(__file__).parents[2]
REPORTS, DOCS = ROOT / "reports" / "cpu", ROOT / "docs"
PICTURES = {"tradeoff:divergence": "budgets-drift.svg", "tradeoff:quality": "budgets-score.svg"}
TASKS = ("multi-needle", "summarize", "json", "code-line", "qa", "few-shot")
COLUMNS = (
    Column("held", "of full", "×"), Column("kl", "KL", "nats", "range"), Column("needle", "needle", "score", "range"),
    *(Column(task, task, "score", "range") for task in TASKS),
)  # fmt: skip
TEXT = """# Every method at a half, a quarter and an eighth of the bytes

Written by `python -m suites.findings.budgets_page`, from two runs on SmolLM2-135M-Instruct:

* `reports/cpu/budgets` (`python suites/findings/budgets.py --kv-tasks document,needle --kv-samples
  4,document=4,needle=16`): KL divergence from `full` over four documents, of which 128 tokens each are forced, in nats
  a token; the mean score of 16 needles in 1,024 tokens.
* `reports/cpu/budgets-tasks` (`python suites/findings/budgets.py --kv-tasks
  multi-needle,json,qa,summarize,code-line,few-shot --kv-samples 4`): the mean score of four samples each.

Behind each figure: its 95 % interval. *of full*: bytes held after the prompt, residuals and tables included, over
`full`'s. Budgets are shares of the tokens; `layers` and `pyramid` hold more bytes than others at the same share, a
reader (quest, rocketkv) holds what it does not read, too. `random` is what a selector is worth that knows nothing.

The first run's KL and needles against bytes; named are those that no other beats in both, as far as there is room:

![KL against bytes](budgets-drift.svg)

![needles against bytes](budgets-score.svg)"""


def main() -> None:
    """Write the page and its pictures."""
    for name, text in drawn().items():
        disk.write(DOCS / name, text)


def drawn() -> dict[str, str]:
    """By their names, the page and its pictures."""
    forced, answered = (analyse(read(REPORTS / run)) for run in ("budgets", "budgets-tasks"))
    first, second = ({table.key: table for table in report.tables} for report in (forced, answered))
    cells: dict[str, dict[str, Cell]] = {}
    for name, table, key in (
        ("held", first["decision"], "held"),
        ("kl", first["divergence:document"], "kl"),
        ("needle", first["samples:needle"], "score"),
        *((task, second[f"samples:{task}"], "score") for task in TASKS),
    ):
        for row in table.rows:
            cells.setdefault(row.key[0], {"held": Cell(1.0)})[name] = row.cells.get(key, Cell())
    parts = [TEXT, *(f"kvsuite says of the second run: *{note.text}*" for note in second["headlines"].notes)]
    for name, report in (("first", forced), ("second", answered)):
        arms = ", ".join(f"`{arm}`" for arm in _reference(report.run))
        parts.append(f"In the {name} run the reference backend computed {arms}.")
    for title, chosen in _groups().items():
        rows = [Row((arm,), cells[arm]) for arm in chosen]
        rows.sort(key=lambda row: float(row.cells["held"].value or 0))
        parts.append(markdown.table(Table(title, title, ("method",), COLUMNS, rows)))
    return {"budgets.md": "\n\n".join(parts) + "\n", **_pictures(forced)}


def _groups() -> dict[str, list[str]]:
    found = {"Codecs": ["full", "jitter", *CODECS]}
    selecting = [m for m in methods() if m not in found["Codecs"]]
    for share, title in zip(SHARES, ("A half", "A quarter", "An eighth"), strict=True):
        found[f"{title} of the tokens"] = [m for m in selecting if re.search(rf"budget={share:g}\b(?!.*budget=)", m)]
    return found


def _pictures(report: Report) -> dict[str, str]:
    """Each as a file that stands by itself."""
    arms = [m for m in report.run.facts["methods"] if m != "full" and not report.run.is_control(m)]
    style = escape(rules((Path(html.__file__).parent / "style.css").read_text(encoding="utf-8")), quote=False)
    found = {}
    for figure in report.figures:
        if name := PICTURES.get(figure.key):
            svg = draw(figure, Look.of(arms, ["full", "jitter"]), "figure")
            svg = svg.replace(
                "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" ', 1
            )
            found[name] = svg.replace("</title>", f"</title><style>{style}</style>", 1) + "\n"
    return found


def _reference(run: Run) -> list[str]:
    found = {r.method for r in run.records if isinstance(r, Answer) and "reference" in r.path}
    return [arm for arm in run.facts["methods"] if arm in found] or ["none"]


if __name__ == "__main__":
    main()
