"""docs/budgets.md and its pictures: ``python -m suites.findings.budgets_page`` writes them, from two runs of
``suites/findings/budgets.py`` and one of variants, in ``reports/cpu``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from kvsuite import disk
from kvsuite.analysis.report import Report, analyse
from kvsuite.analysis.table import Cell, Column, Row, Table
from kvsuite.records import Answer, Run, read
from kvsuite.report import html, markdown
from kvsuite.report.html.svg import Look, draw, rules
from suites.findings.budgets import SHARES

ROOT = Path(__file__).parents[2]
REPORTS, DOCS = ROOT / "reports" / "cpu", ROOT / "docs"
PICTURES = {"tradeoff:divergence": "budgets-drift.svg", "tradeoff:quality": "budgets-score.svg"}
TASKS = ("multi-needle", "summarize", "json", "code-line", "qa", "few-shot")
COLUMNS = (
    Column("held", "of full", "×"), Column("kl", "KL", "nats", "range"), Column("needle", "needle", "score", "range"),
    *(Column(task, task, "score", "range") for task in TASKS),
)  # fmt: skip
TEXT = """# Quality against bytes: all methods

Selectors at a half, a quarter and an eighth of the *tokens*, codecs at the bytes that they take. Written by
`python -m suites.findings.budgets_page`, from runs on SmolLM2-135M-Instruct:

* `reports/cpu/budgets` (`python suites/findings/budgets.py --kv-tasks document,needle --kv-samples
  4,document=4,needle=16`): KL divergence from `full` over four documents, of which 128 tokens each are forced, in nats
  a token; the mean score of 16 needles in 1,024 tokens.
* `reports/cpu/budgets-tasks` (`python suites/findings/budgets.py --kv-tasks
  multi-needle,json,qa,summarize,code-line,few-shot --kv-samples 4`): the mean score of four samples each.
* `reports/cpu/variants` (its command is in its `run.json`): KL over 16 documents and the score of 48 needles, of
  rotated codecs beside the same ones not rotated, and of other budgets, in a table of its own at the end.

Behind each figure: its 95 % interval. *of full*: bytes held after the prompt, residuals and tables included, over
`full`'s. Budgets are shares of the tokens; `layers` and `pyramid` hold more bytes than others at the same share, a
reader (quest, rocketkv) holds what it does not read, too. `random` is what a selector is worth that knows nothing.

Nothing here is about larger models: a model of 135M parameters may suffer more or less than the one that you serve. A
selector stands here alone; some of their authors run it with another part (KVzip with one threshold for all heads,
Knorm with the first two layers whole: the third run). `kvzap` and `headwise` are not here: they need files that
nobody has made for this model. [findings.md](findings.md) says what the tables show.

The first run against bytes. Named are the methods of which no other has both fewer bytes and less KL, or a higher
score, as far as there is room:

![KL against bytes](budgets-drift.svg)

![needles against bytes](budgets-score.svg)"""


def main() -> None:
    """Write the page and its pictures."""
    for name, text in drawn().items():
        disk.write(DOCS / name, text)


def drawn() -> dict[str, str]:
    """By their names, the page and its pictures."""
    forced, answered, varied = (analyse(read(REPORTS / run)) for run in ("budgets", "budgets-tasks", "variants"))
    second = answered.table
    cells = _cells(*_forced(forced), *((task, second(f"samples:{task}"), "score") for task in TASKS))
    parts = [TEXT, *(f"kvsuite says of the second run: *{note.text}*" for note in second("headlines").notes)]
    for name, report in (("first", forced), ("second", answered), ("third", varied)):
        arms = ", ".join(f"`{arm}`" for arm in _reference(report.run))
        parts.append(f"In the {name} run the reference backend computed {arms}.")
    parts += [_table(title, chosen, cells, COLUMNS) for title, chosen in _groups(forced.run.facts["methods"]).items()]
    parts.append(_table("Variants", varied.run.facts["methods"], _cells(*_forced(varied)), COLUMNS[:3]))
    return {"budgets.md": "\n\n".join(parts) + "\n", **_pictures(forced)}


def _forced(report: Report) -> list[tuple[str, Table, str]]:
    """By the name of a column, where its cells are."""
    kinds = ("held", "decision", "held"), ("kl", "divergence:document", "kl"), ("needle", "samples:needle", "score")
    return [(name, report.table(key), cell) for name, key, cell in kinds]


def _cells(*sources: tuple[str, Table, str]) -> dict[str, dict[str, Cell]]:
    """By method."""
    cells: dict[str, dict[str, Cell]] = {}
    for name, table, key in sources:
        for row in table.rows:
            cells.setdefault(row.key[0], {"held": Cell(1.0)})[name] = row.cells.get(key, Cell())
    return cells


def _table(title: str, arms: Sequence[str], cells: dict[str, dict[str, Cell]], columns: Sequence[Column]) -> str:
    rows = [Row((arm,), cells[arm]) for arm in arms]
    rows.sort(key=lambda row: float(row.cells["held"].value or 0))
    return markdown.table(Table(title, title, ("method",), columns, rows))


def _groups(arms: Sequence[str]) -> dict[str, list[str]]:
    selecting = [arm for arm in arms if "budget=" in arm]
    found = {"Codecs": [arm for arm in arms if arm not in selecting]}
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
