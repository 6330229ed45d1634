"""What a report plugin draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

RATIO = "×"
"""A column of this name is the ratio of the value in the column before it."""


@dataclass(frozen=True)
class Table:
    """A title, columns (the first is left-aligned), rows of text, and what must be read beside it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    keys: int = 1
    """So many leading columns say what a row is; they come again where a table is too wide for its window."""


def span(numbers: Sequence[int]) -> str:
    """The smallest and the largest of some numbers, or the one that they all are."""
    return "–".join(str(n) for n in sorted({min(numbers), max(numbers)}))
