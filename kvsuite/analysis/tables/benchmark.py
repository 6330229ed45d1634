"""``kvsuite negatives score``: candidates on the samples that other families fell on, as tables and as JSON."""

from __future__ import annotations

from typing import Any

from kvsuite.analysis.negative_set import LEAST, Row, Scores
from kvsuite.analysis.stats import Interval
from kvsuite.analysis.table import Cell, Column, Table, infos
from kvsuite.analysis.table import Row as Drawn

WORDS = (
    "M − B: the method's score less the baseline's on the same samples, in points of 100, with 95 % (documents drawn "
    "anew). B is {base}: replicate 2, which had no part in choosing; B2 is {control}, the baseline once more. when "
    "chosen: the baseline's score on the replicate that chose, with the luck of having been chosen; nothing is "
    "compared with it. changed: samples whose score is not the baseline's."
)
FEW = f"Of fewer than {LEAST} samples no mean is shown."
UNCHANGED = "Where no score changed (0/n), such a method may still change 3/n of them: the interval does not know that."
NULLS = "A control among the candidates does nothing: its M − B shows what no effect looks like here."


def tables(found: Scores) -> list[Table]:
    """Every candidate, and by type of task."""
    said = [WORDS.format(base=found.base, control=found.control or "not there"), FEW, *found.notes]
    if any(row.null for row in found.rows):
        said.append(NULLS)
    if any(not row.changed and row.scored.drop for row in found.rows):
        said.append(UNCHANGED)
    figures = [
        Column("n", "n"),
        Column("changed", "changed"),
        Column("drop", "M − B, pt", "pt", "range"),
        Column("method", "M, pt", "pt"),
        Column("base", "B, pt", "pt"),
        Column("control", "B2, pt", "pt"),
        Column("floor", "B2 − B, pt", "pt", "range"),
        Column("selecting", "when chosen, pt", "pt"),
    ]
    whole = [Drawn((_name(row),), _cells(row)) for row in found.rows if not row.type]
    parts = [Drawn((_name(row), row.type), _cells(row)) for row in found.rows if row.type and row.scored.n]
    title = "negative benchmark · samples that methods of other families fell on"
    return [
        Table("benchmark", title, ("candidate",), figures, whole, infos(said)),
        Table("benchmark types", "by type of task", ("candidate", "type"), figures[:5], parts, infos([FEW])),
    ]


def _name(row: Row) -> str:
    return f"{row.scored.candidate} (does nothing)" if row.null else row.scored.candidate


def _cells(row: Row) -> dict[str, Cell]:
    found = row.scored
    cells = {"n": Cell(found.n), "changed": Cell(row.changed, of=found.n)}
    for name in ("drop", "method", "base", "control", "floor"):
        if (x := getattr(found, name)) is not None:
            cells[name] = Cell(100 * x.mean, 100 * x.low, 100 * x.high)
    if found.selecting is not None:
        cells["selecting"] = Cell(100 * found.selecting)
    return cells


def as_json(found: Scores) -> dict[str, Any]:
    """The figures, for a program; scores from 0 to 1."""
    rows = [
        {
            "candidate": row.scored.candidate,
            "type": row.type or "all",
            "does_nothing": row.null,
            "n": row.scored.n,
            "changed": row.changed,
            "jurors": list(row.jurors),
            "drop": _ends(row.scored.drop),
            "method": _ends(row.scored.method),
            "base": _ends(row.scored.base),
            "control": _ends(row.scored.control),
            "floor": _ends(row.scored.floor),
        }
        for row in found.rows
    ]
    return {"base": found.base, "control": found.control, "rows": rows, "notes": found.notes}


def _ends(x: Interval | None) -> list[float] | None:
    ends = [] if x is None else [x.mean, x.low, x.high]
    return ends if ends and all(abs(e) < float("inf") for e in ends) else None
