"""What methods do to each type of task, and to each task: a mean over all hides one that is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvsuite.analysis.effects import Part, compare
from kvsuite.analysis.runs import noise, parts
from kvsuite.analysis.samples import scored
from kvsuite.analysis.table import Cell, Column, Note, Row, Table
from kvsuite.columns import Arm
from kvsuite.records import Run

COLUMNS = (
    Column("n", "samples"),
    Column("base", "baseline, pt", "pt"),
    Column("change", "change, pt", "pt"),
    Column("change", "95 %", "pt", "ends"),
    Column("broken", "broken"),
)


def types(run: Run) -> list[Table]:
    """Scores by type of task and, where a type has several, by task; nothing for a run of one task."""
    rows: dict[tuple[str, str], Row] = {}
    for part in [*parts(run), *noise(run)]:
        groups = _groups(part.base) if scored(part.base) and not part.floored else {}
        for name, at in groups.items() if len(groups) > 1 else ():
            for row in compare([_taken(part, at)]):
                cells = {"n": Cell(row.n), "base": Cell(100 * float(part.base.score[at].mean()))}
                if (quality := row.effect("quality")) is not None:
                    seen = quality.estimate
                    cells["change"] = Cell(100 * seen.mean, 100 * seen.low, 100 * seen.high)
                if row.negatives is not None:
                    cells["broken"] = Cell(row.negatives, of=row.eligible)
                rows.setdefault((row.method, name), Row((row.method, name), cells))
    if not rows:
        return []
    order = list(dict.fromkeys(method for method, _ in rows))
    drawn = sorted(rows.values(), key=lambda row: order.index(row.key[0]))
    note = (
        "Exploratory, by type and, where a type has several, by task: samples, the baseline's mean score, its change "
        "with 95 %, which no correction widens, and how many of the samples that the baseline is good at a method "
        "broke. Failed answers are left out."
    )
    return [Table("types", "by type of task", ("method", "type"), COLUMNS, drawn, [Note(note)], detail=True)]


def _groups(arm: Arm) -> dict[str, list[int]]:
    """Places by type, then by task where a type has several."""
    of_type, of_task = dict[str, list[int]](), dict[tuple[str, str], list[int]]()
    for at, task in enumerate(arm.dataset):
        kind = arm.types.get(task) or task
        of_type.setdefault(kind, []).append(at)
        of_task.setdefault((kind, task), []).append(at)
    several = {kind for kind in of_type if sum(k == kind for k, _ in of_task) > 1}
    return of_type | {f"{kind} · {task}": at for (kind, task), at in of_task.items() if kind in several}


def _taken(part: Part, at: Sequence[int]) -> Part:
    control = None if part.control is None else part.control.take(at)
    methods = {name: arm.take(at) for name, arm in part.methods.items()}
    return replace(part, base=part.base.take(at), methods=methods, control=control, asked=0, extremes=None)
