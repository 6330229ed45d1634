"""What a cell's text looks like, whoever draws it: digits, signs, ranges, units, and words for what is not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from kvsuite.analysis.stats import LEVEL, Interval
from kvsuite.analysis.table import Cell, Column, Row, Shown, State, Table
from kvsuite.analysis.verdict import judge

NONE = "-"
STATES: dict[State, str] = {
    "ok": NONE,
    "partial": NONE,
    "failed": "FAILED",
    "missing": "missing",
    "not measured": "not measured",
    "broken": "BROKEN",
    "differs": "DIFFERS",
    "cannot tell": "cannot tell",
}
"""What stands in place of a value."""
DIGITS = {
    "×": 2, "pt": 1, "%": 1, "nats": 4, "score": 2, "tok/s": 0, "tokens": 0, "samples": 0, "MiB": 1, "ms": 1, "s": 2,
    "tolerances": 1, "× the tok/s of width 1": 1, "× the prefill alone": 2,
}  # fmt: skip
"""Decimals by unit; figures of other units have three significant digits."""
MORE = 4
"""Further digits that a judged interval may take."""
SLOW = 10
"""Tokens a second below which two digits are shown."""
OPEN = 100
"""A ratio's interval that reaches so far tells nothing."""


@dataclass(frozen=True)
class Text:
    """What is drawn of one cell."""

    text: str
    loud: bool = False


def header(table: Table) -> list[str]:
    """The names above a table's columns, its rows' own first."""
    return [*table.heads, *(column.name for column in table.columns)]


def body(table: Table) -> list[list[Text]]:
    """A table's rows: what each is called, then its cells."""
    return [
        [*map(Text, row.names or row.key), *(_drawn(table, row, column) for column in table.columns)]
        for row in table.rows
    ]


def _drawn(table: Table, row: Row, column: Column) -> Text:
    cell = row.cells.get(column.key, Cell())
    return Text(SHOWN[column.shows](cell, table.unit(row, column), int(table.detail)), cell.loud)


def _value(cell: Cell, unit: str, more: int) -> str:
    if cell.value is None:
        return STATES[cell.state]
    if isinstance(cell.value, str):
        return cell.value or NONE
    if cell.of is None:
        said = _number(cell, cell.value, unit, more)
    elif unit == "pairs":
        said = f"{cell.value}:{cell.of}{'*' if cell.p is not None and cell.p < LEVEL else ''}"
    else:
        said = f"{cell.value}/{cell.of}"
    return f"{said} {cell.unit}" if cell.unit else said


def _ends(cell: Cell, unit: str, more: int, between: str = ", ") -> str:
    """Of a judged figure, ``between`` stands between signed ends."""
    if cell.low is None or cell.high is None:
        return NONE
    if cell.limits is None:
        if unit == "×" and cell.high >= OPEN:
            return "–"
        between = "–"
    return between.join(_number(cell, x, unit, more) for x in (cell.low, cell.high))


def _half(cell: Cell, unit: str, more: int) -> str:
    if cell.low is None or cell.high is None:
        return _value(cell, unit, more)
    return f"{_value(cell, unit, more)} ± {_number(cell, (cell.high - cell.low) / 2, unit, more)}"


def _range(cell: Cell, unit: str, more: int) -> str:
    said = _value(cell, unit, more)
    return said if cell.low is None else f"{said} ({_ends(cell, unit, more, ' to ')})"


def _p(cell: Cell, unit: str, more: int) -> str:
    return NONE if cell.p is None else f"{cell.p:.2g}"


def _verdict(cell: Cell, unit: str, more: int) -> str:
    said = cell.verdict or STATES[cell.state]
    return f"{said} {cell.lacking[0]}/{cell.lacking[1]}" if cell.lacking else said


def _clock(cell: Cell, unit: str, more: int) -> str:
    return (
        str(timedelta(seconds=round(cell.value))) if isinstance(cell.value, (int, float)) else _value(cell, unit, more)
    )


SHOWN: dict[Shown, Callable[[Cell, str, int], str]] = {
    "value": _value, "ends": _ends, "half": _half, "range": _range, "p": _p, "verdict": _verdict, "clock": _clock,
}  # fmt: skip


def _number(cell: Cell, x: float, unit: str, more: int) -> str:
    if math.isnan(x):
        return NONE
    sign = "+" if cell.limits is not None and unit != "×" else ""
    if math.isinf(x):
        return "-∞" if x < 0 else f"{sign}∞"
    if cell.limits is not None and unit == "×" and x >= OPEN:
        return f">{OPEN}"
    if cell.limits is not None:
        return f"{x:{sign},.{_judged(cell, DIGITS.get(unit, 1) + more)}f}"
    if unit == "tok/s" and 0 < x < SLOW:
        return f"{x:.2g}"
    if unit in DIGITS:
        return f"{x:,.{DIGITS[unit] + more}f}"
    return f"{x:,}" if isinstance(x, int) else f"{x:.3g}"


def _judged(cell: Cell, few: int) -> int:
    """So many decimals that the printed ends lie on the same sides of the margin as the ends themselves, ``few`` at
    least."""
    low, high, limits = cell.low, cell.high, cell.limits
    if low is None or high is None or limits is None:
        return few
    for digits in range(few, few + MORE):
        drawn = Interval(0, round(low, digits), round(high, digits))
        if judge(drawn, limits) == judge(Interval(0, low, high), limits):
            break
    return digits
