"""How long every arm's answers are against the baseline's to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping

from kvsuite.analysis.figure import Axis, Band, Figure, Point, Series, stand_for, thinned
from kvsuite.analysis.length import beside
from kvsuite.analysis.table import Note, Row, Table
from kvsuite.readers.run import answers
from kvsuite.records import Run


def figures(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """One a task of chats."""
    return [f for key, table in tables.items() if key.startswith("length:") for f in _task(run, key, table)]


def _task(run: Run, key: str, table: Table) -> list[Figure]:
    task = key.removeprefix("length:")
    own = [a for a in answers(run, "length", references=True) if a.task == task]
    known = {arm.name: arm.pairs for arm in beside(own, run.baseline) if arm.name != run.baseline}
    series, names, noise = list[Series](), list[str](), list[Band]()
    for row in table.rows:
        arm = row.key[0]
        ratios = [max(a.length, 1) / max(b.length, 1) for a, b in known.get(arm, [])]
        if not ratios:
            continue
        control = run.is_control(arm) or arm.startswith(f"{run.baseline}, ")
        series.append(Series(arm, arm, [Point(x, len(names)) for x in thinned(ratios)], "dots", control))
        series += [Series(arm, arm, [cost], "points", control) for cost in _cost(row, len(names))]
        names.append(arm)
        cost = row.cells["cost"]
        if control and cost.low is not None and cost.high is not None and cost.low > 0:
            noise = [Band("noise", cost.low, cost.high)]  # the last control: of sampled answers another seed
    if not series:
        return []
    n = max(map(len, known.values()))
    notes = [
        Note(
            f"{stand_for(n, 'pair of answers')} Filled: all tokens against all tokens, with its 95 % interval. "
            "Dashed: as long."
        )
    ]
    x = Axis("tokens of an answer, × the uncompressed cache's", "×", log=True, shown=(0.5, 2.0))
    bands = [*noise, Band("as long", 1.0)]
    title = f"Length of answers, {task}"
    return [Figure(key, title, x, Axis("method", rows=tuple(names)), series, bands, notes=notes)]


def _cost(row: Row, at: int) -> list[Point]:
    cost = row.cells["cost"]
    if not isinstance(cost.value, (int, float)) or cost.value <= 0:
        return []
    return [Point(float(cost.value), at, cost.low, cost.high)]
