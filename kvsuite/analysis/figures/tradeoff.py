"""What a method costs in quality against the bytes that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvsuite.analysis.figure import MANY, Axis, Band, Figure, Point, Series
from kvsuite.analysis.forced import divergences
from kvsuite.analysis.length import named
from kvsuite.analysis.serving import stored
from kvsuite.analysis.table import Cell, Note, Table
from kvsuite.margins import Margins
from kvsuite.records import Run

BEST = "Methods towards the lower left hold less and change less."


def divergence(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """KL divergence on forced text."""
    seen, held = divergences(run), _held(run, tables)
    series, floors = [], [d.divergence.kl for arm, d in seen.items() if run.is_control(arm)]
    for arm, found in seen.items():
        kl = found.divergence.kl
        if arm in held and kl.mean > 0 and not run.is_control(arm):
            series.append(Series(arm, arm, [Point(held[arm], kl.mean, kl.low, kl.high)]))
    if not series:
        return []
    bands = []
    if floors and floors[0].mean > 0:
        margin = Margins.of(run.facts).kl
        bands = [Band("noise", floors[0].low, floors[0].high), Band("margin", floors[0].mean + margin)]
    y = Axis("KL divergence from the uncompressed cache, nats", "nats", log=True)
    notes = [Note(f"{BEST} {_bars(series, '95 % intervals over documents')} Noise: the control's interval.")]
    drawn = _drawn(series, -1)
    return [Figure("tradeoff:divergence", "Drift against bytes", _bytes(run), y, drawn, bands, notes=notes)]


def quality(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """Change of the mean score of the tasks."""
    held = _held(run, tables)
    cells = {
        row.key[0]: row.cells["effect"]
        for row in (tables["verdicts"].rows if "verdicts" in tables else ())
        if row.key[-1] == "quality" and row.cells["effect"].low is not None
    }
    judged = {arm: cell for arm, cell in cells.items() if arm in held and not run.is_control(arm)}
    series = [Series(arm, arm, [_point(held[arm], cell)]) for arm, cell in judged.items()]
    if not series:
        return []
    noise = next((cell for arm, cell in cells.items() if run.is_control(arm)), None)
    bands = [Band("noise", noise.low, noise.high)] if noise and noise.low is not None else []
    bands += [Band("margin", cell.limits[0]) for cell in list(judged.values())[:1] if cell.limits]
    y = Axis("change of the mean score, points of 100", "pt", shown=(0.0,))
    how = f"Methods towards the upper left hold less and lose less. {_bars(series, 'the intervals of the verdicts')}"
    notes = [Note(f"{how}{' Noise: the interval of the control.' if noise else ''}")]
    drawn = _drawn(series, 1)
    return [Figure("tradeoff:quality", "Task score against bytes", _bytes(run), y, drawn, bands, notes=notes)]


def length(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """Cost of the answers to chats (the paper's Fig. 4, over bytes)."""
    held, found = _held(run, tables), []
    for key, table in tables.items():
        costs = {row.key[0]: row.cells["cost"] for row in table.rows if key.startswith("length:")}
        known = {arm: c for arm, c in costs.items() if c.value is not None and c.low is not None and arm in held}
        series = [Series(arm, arm, [_point(held[arm], c)]) for arm, c in known.items() if not run.is_control(arm)]
        series = [s for s in series if s.arm != run.baseline]
        if series:
            noise = [c for arm, c in costs.items() if arm == named(run.baseline, True) or run.is_control(arm)]
            bands = [Band("noise", c.low, c.high) for c in noise[:1] if c.low is not None]
            y = Axis("tokens of all answers, × the uncompressed cache's", "×", log=True, shown=(1.0,))
            how = "Bars: 95 % intervals over prompts. Noise: the interval of the control."
            title = f"Length of answers against bytes, {key.removeprefix('length:')}"
            found.append(Figure(f"tradeoff:{key}", title, _bytes(run), y, series, bands, notes=[Note(how)]))
    return found


def _drawn(series: Sequence[Series], better: int) -> list[Series]:
    """Series of one point. Of many those come first, and so are named, that no other beats in bytes and in y
    (``better`` 1: more is better, -1: less is); their intervals, which would hide each other, are not drawn."""
    if len(series) <= MANY:
        return list(series)
    lone = [replace(s, points=[replace(s.points[0], low=None, high=None)]) for s in series]

    def beaten(one: Series) -> bool:
        (mine,) = one.points
        others = [s.points[0] for s in lone if s is not one]
        return any(p.x <= mine.x and better * p.y >= better * mine.y and (p.x, p.y) != (mine.x, mine.y) for p in others)

    return sorted(lone, key=beaten)


def _bars(series: Sequence[Series], what: str) -> str:
    if len(series) <= MANY:
        return f"Bars: {what}."
    return f"{len(series)} methods: {what} are in the tables. Those that no other beats in both are named first."


def _bytes(run: Run) -> Axis:
    what = "bytes stored for a token" if "servers" in run.facts else "bytes held after the prompt"
    return Axis(f"{what}, × the uncompressed cache's", "×", shown=(0.0, 1.0))


def _point(held: float, cell: Cell) -> Point:
    assert isinstance(cell.value, (int, float))
    return Point(held, cell.value, cell.low, cell.high)


def _held(run: Run, tables: Mapping[str, Table]) -> dict[str, float]:
    """By method, bytes as a part of the baseline's: after prompts, or of servers for a token."""
    if "decision" not in tables:
        return stored(run)
    cells = {row.key[0]: row.cells.get("held", Cell()).value for row in tables["decision"].rows}
    return {arm: value for arm, value in cells.items() if isinstance(value, float)}
