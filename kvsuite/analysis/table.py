"""Figures as typed tables: what analysis returns and report plugins draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvsuite.analysis.stats import Interval
from kvsuite.errors import unknown

State = Literal["ok", "partial", "failed", "missing", "not measured", "broken", "differs", "cannot tell"]
"""*partial*: of the samples (or rounds) that are there, since others are not. *missing*: it was to be measured and was
not. *not measured*: too few rounds for a figure. *broken*: a server's answers are no answers, so it has no figures.
*differs*: likewise, as it did not read the same prompts. *cannot tell*: what was measured cannot be believed
(`validity`)."""
Severity = Literal["info", "warning", "error"]
Shown = Literal["value", "ends", "half", "range", "p", "verdict", "clock"]


@dataclass(frozen=True)
class Cell:
    """One figure, count or word, or why there is none. Without a value, and with the state *ok*, there is nothing to be
    told."""

    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    """The ends of the 95 % interval, infinite where it is open; None where the figure has no interval."""
    of: int | None = None
    """Of a count: of how many. Of ``pairs``: how many the other arm alone has."""
    unit: str = ""
    """Where it is not the row's or column's."""
    p: float | None = None
    verdict: str = ""
    limits: tuple[float, float] | None = None
    """The margin's edges: values below the one, or above the other, do harm; infinite where there is no such side."""
    state: State = "ok"
    lacking: tuple[int, int] | None = None
    """Of so many samples (or rounds) that were to be there, those that are; None where all are."""

    @classmethod
    def estimated(cls, found: Interval | None, state: State = "ok") -> Cell:
        """A figure with its interval; nothing where there is none."""
        return cls(state=state) if found is None else cls(found.mean, found.low, found.high, state=state)

    @property
    def loud(self) -> bool:
        """Whether it must not be overlooked."""
        return self.state not in ("ok", "not measured")


@dataclass(frozen=True)
class Column:
    """A part of the cells of one key, under a name. Several columns can show parts of the same cells."""

    key: str
    name: str
    unit: str = ""
    shows: Shown = "value"
    """The value, the interval's ends, the value and half the interval's width, the value and its ends, p, the verdict,
    or seconds as a clock shows them."""
    beside: bool = False
    """Whether it says nothing without the column before it: the ratio of a figure."""


@dataclass(frozen=True)
class Row:
    """Cells by their columns' keys."""

    key: tuple[str, ...]
    cells: dict[str, Cell]
    names: tuple[str, ...] = ()
    """What is written in front of it, where that is not its key."""
    unit: str = ""
    """Of all its cells, where it is not their columns'."""


@dataclass(frozen=True)
class Note:
    """A sentence to be read beside a table."""

    text: str
    severity: Severity = "info"


@dataclass(frozen=True)
class Table:
    """Rows under ``heads``, which say what each part of a row's key is, and what must be read beside them."""

    key: str
    title: str
    heads: tuple[str, ...] = ()
    columns: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    notes: Sequence[Note] = ()
    severity: Severity = "info"
    """Of its title."""
    detail: bool = False
    """Whether figures are so many, or so close, that one digit more is worth it."""

    def cell(self, row: str | tuple[str, ...], column: str) -> Cell:
        """The cell of these keys, empty where a row has none. Raises UsageError for keys that are not there."""
        wanted = (row,) if isinstance(row, str) else row
        found = next((r for r in self.rows if r.key == wanted), None)
        if found is None:
            raise unknown(f"row of {self.key}", ", ".join(wanted), (", ".join(r.key) for r in self.rows))
        if column not in {c.key for c in self.columns}:
            raise unknown(f"column of {self.key}", column, (c.key for c in self.columns))
        return found.cells.get(column, Cell())

    def unit(self, row: Row, column: Column) -> str:
        """The unit of a cell."""
        return row.cells.get(column.key, Cell()).unit or row.unit or column.unit


def infos(texts: Sequence[str]) -> list[Note]:
    """Sentences as notes that explain."""
    return [Note(text) for text in texts]


def errors(texts: Sequence[str]) -> list[Note]:
    """Sentences as notes that must not be overlooked."""
    return [Note(text, "error") for text in texts]


def span(numbers: Sequence[int]) -> str:
    """The smallest and the largest of some numbers, or the one that they all are."""
    return "–".join(str(n) for n in sorted({min(numbers), max(numbers)}))
